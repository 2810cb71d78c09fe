//! A conversation with the kernel about links: one request, then its answers, blocking.

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::fmt;
use std::io;

/// The kernel's refusal.
#[derive(Debug)]
pub struct KernelError {
    /// Its error number, as the operating system's error.
    error: io::Error,
    /// Its own words, if it had any.
    message: Option<String>,
}

impl fmt::Display for KernelError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => write!(formatter, "{message} ({})", self.error),
            None => self.error.fmt(formatter),
        }
    }
}

impl std::error::Error for KernelError {}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        Self { error, message: None }
    }
}

impl KernelError {
    /// Whether it is one of these error numbers.
    pub(super) fn is(&self, numbers: &[i32]) -> bool {
        self.error.raw_os_error().is_some_and(|number| numbers.contains(&number))
    }

    fn malformed(what: impl fmt::Display) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, what.to_string()).into()
    }

    /// Reads an error message with its attributes (`NETLINK_EXT_ACK`; the request is cut to its header by
    /// `NETLINK_CAP_ACK`).
    fn from_message(error: &ErrorMessage) -> Self {
        const HEADER_BYTES: usize = 16;
        const ATTRIBUTE_MESSAGE: u16 = 1;
        let mut rest = error.header.get(HEADER_BYTES..).unwrap_or_default();
        let mut message = None;
        while let Some(([l0, l1, k0, k1], _)) = rest.split_first_chunk() {
            let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
            let Some(value) = rest.get(4..length) else { break };
            if u16::from_ne_bytes([*k0, *k1]) == ATTRIBUTE_MESSAGE {
                let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
                message = Some(String::from_utf8_lossy(text).into_owned());
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Self { error: error.to_io(), message }
    }
}

/// A socket of the network namespace in which it was made.
pub(super) struct Conversation {
    socket: Socket,
    sequence: u32,
}

impl Conversation {
    pub(super) fn open() -> Result<Self, KernelError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        // Without it, filters of a dump are ignored rather than applied or refused.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for a change.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), KernelError> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.receive(|_| {}).map(|_| ())
    }

    /// Asks for one object.
    pub(super) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK)?;
        let mut answers = Vec::new();
        self.receive(|answer| answers.push(answer))?;
        Ok(answers)
    }

    /// Asks for all objects of a kind, again if they changed meanwhile.
    pub(super) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        const ATTEMPTS: u32 = 10;
        for _ in 0..ATTEMPTS {
            self.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            let mut answers = Vec::new();
            if self.receive(|answer| answers.push(answer))? {
                return Ok(answers);
            }
        }
        Err(KernelError::malformed("what was asked for changed while it was read, ten times in a row"))
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), KernelError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(())
    }

    /// Reads answers to the last request until its end. `false`: they are not consistent with each other.
    fn receive(&mut self, mut take: impl FnMut(RouteNetlinkMessage)) -> Result<bool, KernelError> {
        let mut consistent = true;
        loop {
            let (datagram, sender) = self.socket.recv_from_full()?;
            if sender.port_number() != 0 {
                continue;
            }
            let mut rest = datagram.as_slice();
            while let Some(length) = rest.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes) as usize) {
                let Some(bytes) = rest.get(..length).filter(|bytes| bytes.len() >= 16) else {
                    return Err(KernelError::malformed("a message that is longer than its datagram"));
                };
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if u32::from_ne_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) != self.sequence {
                    // The rest of an answer that was given up.
                    continue;
                }
                let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
                    Ok(message) => message,
                    Err(error) => {
                        // One link of a kind that the library misreads must not hide all others.
                        tracing::warn!(%error, "a message of the kernel is not understood and left out");
                        continue;
                    }
                };
                consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => take(answer),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(consistent),
                    NetlinkPayload::Error(error) => return Err(KernelError::from_message(&error)),
                    NetlinkPayload::Done(done) if done.code == 0 => return Ok(consistent),
                    NetlinkPayload::Done(done) => {
                        return Err(io::Error::from_raw_os_error(done.code.saturating_neg()).into());
                    }
                    NetlinkPayload::Overrun(_) => return Err(KernelError::malformed("an overrun")),
                    _ => {}
                }
            }
        }
    }
}
