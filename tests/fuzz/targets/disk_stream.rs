//! What a peer may send on a connection that carries a disk.
#![no_main]

use godwit_agent::datapath::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzzing::read_disk_stream(bytes));
