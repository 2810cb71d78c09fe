//! A conversation with the kernel about links: one request, then its answers, blocking. rtnetlink is asynchronous,
//! and [`super::HostNetwork`] is not: its connection lives on a thread of its own, which callers wait for.

use super::message::Message;
use futures_util::StreamExt;
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::proto::{ConnectionHandle, new_connection};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, SocketAddr};
use std::fmt;
use std::io;
use std::sync::mpsc;
use tokio::sync::mpsc::UnboundedSender;

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

/// A request, and where its answers go.
struct Question {
    message: NetlinkMessage<Message>,
    answers: mpsc::SyncSender<Vec<NetlinkMessage<Message>>>,
}

/// A connection to the kernel of the network namespace in which it was made.
pub(super) struct Conversation {
    // One question waits at a time, so the channel holds one at most. The thread ends with the sender.
    questions: UnboundedSender<Question>,
}

impl Conversation {
    pub(super) fn open() -> Result<Self, KernelError> {
        let (questions, mut asked) = tokio::sync::mpsc::unbounded_channel::<Question>();
        let (opened, result) = mpsc::sync_channel(1);
        // A new thread is in the namespace of the one that starts it.
        std::thread::Builder::new().name("netlink".into()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(opened.send(Err(error))),
            };
            runtime.block_on(async {
                let handle = match connect() {
                    Ok(handle) => handle,
                    Err(error) => return drop(opened.send(Err(error))),
                };
                let _ = opened.send(Ok(()));
                let kernel = SocketAddr::new(0, 0);
                while let Some(question) = asked.recv().await {
                    let answers = match handle.request(question.message, kernel) {
                        Ok(answers) => answers.collect().await,
                        Err(_) => Vec::new(),
                    };
                    let _ = question.answers.send(answers);
                }
            });
        })?;
        result.recv().map_err(|_| gone())??;
        Ok(Self { questions })
    }

    /// Asks for a change.
    pub(super) fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), KernelError> {
        self.ask(message, NLM_F_REQUEST | NLM_F_ACK | flags).map(drop)
    }

    /// Asks for one object.
    pub(super) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        Ok(self.ask(message, NLM_F_REQUEST | NLM_F_ACK)?.objects)
    }

    /// Asks for all objects of a kind, again if they changed meanwhile.
    pub(super) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        const ATTEMPTS: u32 = 10;
        for _ in 0..ATTEMPTS {
            let answer = self.ask(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if answer.is_consistent {
                return Ok(answer.objects);
            }
        }
        Err(KernelError::malformed("what was asked for changed while it was read, ten times in a row"))
    }

    fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Answer, KernelError> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(Message(message)));
        let (answers, answered) = mpsc::sync_channel(1);
        self.questions.send(Question { message, answers }).map_err(|_| gone())?;
        Answer::read(answered.recv().map_err(|_| gone())?)
    }
}

/// A socket whose errors carry the kernel's own words, served by a task of the runtime that runs here.
fn connect() -> io::Result<ConnectionHandle<Message>> {
    let (mut connection, handle, _) = new_connection(NETLINK_ROUTE)?;
    let socket = connection.socket_mut().socket_mut();
    socket.set_ext_ack(true)?;
    socket.set_cap_ack(true)?;
    // Without it, filters of a dump are ignored rather than applied or refused.
    socket.set_netlink_get_strict_chk(true)?;
    tokio::spawn(connection);
    Ok(handle)
}

fn gone() -> KernelError {
    io::Error::new(io::ErrorKind::BrokenPipe, "the netlink thread has ended").into()
}

/// What the kernel said to one request.
struct Answer {
    objects: Vec<RouteNetlinkMessage>,
    /// Whether the objects belong to one state.
    is_consistent: bool,
}

impl Answer {
    fn read(messages: Vec<NetlinkMessage<Message>>) -> Result<Self, KernelError> {
        let mut answer = Self { objects: Vec::new(), is_consistent: true };
        for message in messages {
            answer.is_consistent &= message.header.flags & NLM_F_DUMP_INTR == 0;
            match message.payload {
                NetlinkPayload::InnerMessage(Message(object)) => answer.objects.push(object),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(KernelError::from_message(&error));
                }
                NetlinkPayload::Done(done) if done.code != 0 => {
                    return Err(io::Error::from_raw_os_error(done.code.saturating_neg()).into());
                }
                NetlinkPayload::Overrun(_) => return Err(KernelError::malformed("an overrun")),
                _ => {}
            }
        }
        Ok(answer)
    }
}
