//! The host's DHCP responder: it tells guests of this host their own addresses, from what the coordinator said of their
//! ports, whether or not the coordinator is there. The filter at each tap hands it the questions, which go no further.

mod frame;
mod socket;
mod v4;
mod v6;

use super::wanted::WantedNetworks;
use crate::telemetry::filter::{Question, Requests};
use crate::telemetry::taps::name_of;
use godwit_protocol::port::Mac;
use prometheus::{IntCounterVec, Opts, Registry};
use socket::AnswerSocket;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Whose answers they are: the same on every host, so that a guest that has moved finds the server that it had.
const SERVER: Mac = Mac([0x02, 0x67, 0x77, 0x64, 0x68, 0x63]);

/// How long a guest may use an answer, in seconds. The address is its port's for as long as that exists.
const LEASE_SECONDS: u32 = 86_400;

/// Why there is no responder.
#[derive(Debug, thiserror::Error)]
pub enum DhcpError {
    /// No socket to answer with, or no thread.
    #[error("guests cannot be answered by DHCP")]
    Io(#[from] io::Error),
    /// Metrics of these names are there already.
    #[error("metrics cannot be registered")]
    Metrics(#[from] prometheus::Error),
}

/// What answers.
pub struct Responder {
    wanted: Arc<WantedNetworks>,
    socket: AnswerSocket,
    answered: IntCounterVec,
}

impl Responder {
    /// Answers for the ports of `wanted`.
    ///
    /// # Errors
    /// [`DhcpError`].
    pub fn new(wanted: Arc<WantedNetworks>, registry: &Registry) -> Result<Self, DhcpError> {
        let answered = IntCounterVec::new(
            Opts::new(
                "godwit_dhcp_requests_total",
                "Questions of guests by DHCP, by family and by what was answered (none: nothing).",
            ),
            &["family", "answer"],
        )?;
        registry.register(Box::new(answered.clone()))?;
        Ok(Self { wanted, socket: AnswerSocket::open()?, answered })
    }

    /// Answers, on a thread of its own, for as long as the process lives.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn start(self, mut requests: Requests) -> Result<(), DhcpError> {
        let serve = move || loop {
            for question in requests.wait(u16::MAX) {
                self.answer(&question);
            }
            // A ring that cannot be waited for must not take a CPU.
            std::thread::sleep(Duration::from_millis(1));
        };
        std::thread::Builder::new().name("dhcp".into()).spawn(serve)?;
        Ok(())
    }

    fn answer(&self, question: &Question) {
        let Some(tap) = name_of(question.link) else { return };
        let Some(asked) = frame::Asked::read(&question.frame) else { return };
        let port = self.wanted.port(&tap);
        let answer = port.and_then(|(mtu, port)| {
            if asked.mac != port.mac {
                return None;
            }
            if asked.is_v4() { v4::answer(&asked, &port, mtu) } else { v6::answer(&asked, &port) }
        });
        let kind = answer.as_ref().map_or("none", |answer| answer.kind);
        self.answered.with_label_values(&[if asked.is_v4() { "ipv4" } else { "ipv6" }, kind]).inc();
        if let Some(answer) = answer
            && let Err(error) = self.socket.send(question.link, &answer.frame)
        {
            tracing::warn!(tap, %error, "a guest was not answered by DHCP");
        }
    }
}

/// An answer, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    /// The message's name in metrics.
    kind: &'static str,
    /// From the Ethernet header on.
    frame: Vec<u8>,
}

#[cfg(test)]
mod tests;
