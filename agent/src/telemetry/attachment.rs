//! A program of ours on a link, pinned so that it outlives the agent.

use super::pins::Pins;
use super::{TelemetryError, query};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifier, SchedClassifierLink, TcAttachOptions, TcAttachType};
use aya::programs::{LinkOrder, ProgramError, ProgramInfo};
use aya::sys::SyscallError;
use std::io;

/// Where a program belongs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// The program's name.
    pub(super) program: &'static str,
    /// The link's.
    pub(super) link: &'a str,
    /// Which way packets pass it.
    pub(super) side: TcAttachType,
    /// The name of its pin.
    pub(super) pin: &'a str,
}

/// What comes in is seen before anyone redirects or drops it, what goes out after everyone has had a say.
pub(super) fn outside(side: TcAttachType) -> LinkOrder {
    match side {
        TcAttachType::Egress => LinkOrder::last(),
        _ => LinkOrder::first(),
    }
}

impl Place<'_> {
    /// Attaches a loaded program: by taking over the pinned attachment if it is of this link, else anew.
    pub(super) fn ensure(&self, program: &mut SchedClassifier, pins: &Pins) -> Result<(), TelemetryError> {
        self.ensure_in(program, pins, outside(self.side))
    }

    /// The same in this order.
    pub(super) fn ensure_in(
        &self,
        program: &mut SchedClassifier,
        pins: &Pins,
        order: LinkOrder,
    ) -> Result<(), TelemetryError> {
        if self.adopt(program, pins)? {
            return Ok(());
        }
        let attached = program
            .attach_with_options(self.link, self.side, TcAttachOptions::TcxOrder(order))
            .and_then(|id| program.take_link(id))
            .map_err(|source| self.program_error("attached", source))?;
        let attached = FdLink::try_from(attached).map_err(|error| self.error("pinned", error))?;
        attached.pin(pins.path(self.pin)).map_err(|error| self.error("pinned", error))?;
        Ok(())
    }

    /// Puts a loaded program in the place of the one that a pinned attachment holds, without a packet in between.
    /// `false`: there is none of this link, and none is pinned any more.
    pub(super) fn adopt(&self, program: &mut SchedClassifier, pins: &Pins) -> Result<bool, TelemetryError> {
        let pinned = match PinnedLink::from_pin(pins.path(self.pin)) {
            Ok(pinned) => FdLink::from(pinned),
            Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
                return Ok(false);
            }
            Err(error) => return Err(self.error("opened", error)),
        };
        let pinned = SchedClassifierLink::try_from(pinned).map_err(|error| self.error("adopted", error))?;
        let info = program.info().map_err(|source| self.program_error("inspected", source))?;
        let reason = match program.attach_to_link(pinned) {
            Ok(id) if self.holds(&info)? => {
                // Closes the descriptor: the pin is what holds the attachment.
                program.detach(id).map_err(|source| self.program_error("released", source))?;
                return Ok(true);
            }
            Ok(id) => {
                // Closes the descriptor, so that the attachment ends with its pin.
                program.detach(id).map_err(|source| self.program_error("detached", source))?;
                "it is on another link"
            }
            Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
                if io_error.raw_os_error() == Some(libc::ENOLINK) =>
            {
                "its link is gone"
            }
            Err(source) => return Err(self.program_error("exchanged", source)),
        };
        tracing::info!(
            program = self.program,
            link = self.link,
            reason,
            "a pinned attachment is given up and made anew"
        );
        pins.remove(self.pin)?;
        Ok(false)
    }

    /// Whether the link has this very program.
    pub(super) fn holds(&self, program: &ProgramInfo) -> Result<bool, TelemetryError> {
        let Ok(link) = nix::net::if_::if_nametoindex(self.link) else { return Ok(false) };
        query::has(link, self.side, program.id()).map_err(|error| self.error("looked for", error))
    }

    pub(super) fn program_error(&self, action: &'static str, source: ProgramError) -> TelemetryError {
        TelemetryError::Program { program: self.program, action, source: Box::new(source) }
    }

    fn error(
        &self,
        action: &'static str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> TelemetryError {
        TelemetryError::Attachment { program: self.program, action, source: Box::new(source) }
    }
}
