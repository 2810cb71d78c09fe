//! Frames on the channel between coordinator and agent.
#![no_main]

use godwit_protocol::frame::{self, HEADER_BYTES};
use godwit_protocol::request::{AgentMessage, AgentReply, AgentRequest, Hello, JoinRequest, Welcome};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return };
    let Ok(length) = frame::body_length(*header) else { return };
    let body = &body[..length.min(body.len())];
    let _ = frame::decode::<Hello>(body);
    let _ = frame::decode::<Welcome>(body);
    let _ = frame::decode::<JoinRequest>(body);
    let _ = frame::decode::<AgentReply>(body);
    let _ = frame::decode::<AgentMessage>(body);
    // What was understood once is understood again.
    if let Ok(request) = frame::decode::<AgentRequest>(body) {
        let again = frame::encode(&request).unwrap_or_else(|error| panic!("{error}"));
        frame::decode::<AgentRequest>(&again[HEADER_BYTES..]).unwrap_or_else(|error| panic!("{error}"));
    }
});
