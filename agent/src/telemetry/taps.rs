//! Programs on the taps of guests: how their attachments are named, exchanged, put in place and forgotten.

use super::TelemetryError;
use super::attachment::Place;
use super::pins::Pins;
use super::shared::program_mut;
use aya::Ebpf;
use aya::programs::LinkOrder;
use aya::programs::tc::TcAttachType;
use nix::net::if_::{if_indextoname, if_nametoindex};

/// The two programs that an object has for every tap.
pub(super) struct TapPrograms {
    /// What the name of a tap's pins begins with, behind it the tap and the program.
    pub(super) prefix: &'static str,
    /// The program of each side of a tap, as the host sees it.
    pub(super) sides: [(&'static str, TcAttachType); 2],
    /// Where a side's program goes among others there.
    pub(super) order: fn(TcAttachType) -> LinkOrder,
}

impl TapPrograms {
    /// Puts the object's programs in the place of those that are pinned.
    pub(super) fn exchange(&self, ebpf: &mut Ebpf, pins: &Pins) -> Result<(), TelemetryError> {
        for pin in pins.list(self.prefix)? {
            let Some((tap, program, side)) = self.parse(&pin) else { continue };
            let place = Place { program, link: &tap, side, pin: &pin };
            place.adopt(program_mut(ebpf, program)?, pins)?;
        }
        Ok(())
    }

    /// Attaches what a tap lacks.
    pub(super) fn attach(&self, ebpf: &mut Ebpf, pins: &Pins, tap: &str) -> Result<(), TelemetryError> {
        for (program, side) in self.sides {
            let pin = format!("{}{tap}_{program}", self.prefix);
            let place = Place { program, link: tap, side, pin: &pin };
            let loaded = program_mut(ebpf, program)?;
            let info = loaded.info().map_err(|source| place.program_error("inspected", source))?;
            if !place.holds(&info)? {
                place.ensure_in(loaded, pins, (self.order)(side))?;
                tracing::debug!(tap, program, "attached");
            }
        }
        Ok(())
    }

    /// Unpins what belongs to taps that are not there any more.
    pub(super) fn forget_gone(&self, pins: &Pins) -> Result<(), TelemetryError> {
        for pin in pins.list(self.prefix)? {
            let tap = self.parse(&pin).map(|(tap, _, _)| tap).unwrap_or_default();
            if if_nametoindex(tap.as_str()).is_err() {
                pins.remove(&pin)?;
            }
        }
        Ok(())
    }

    /// The tap, program and side of a pin.
    fn parse(&self, pin: &str) -> Option<(String, &'static str, TcAttachType)> {
        let rest = pin.strip_prefix(self.prefix)?;
        self.sides.iter().find_map(|(program, side)| {
            let tap = rest.strip_suffix(program)?.strip_suffix('_')?;
            Some((tap.to_owned(), *program, *side))
        })
    }
}

/// Sets up each tap that is there. One that cannot be does not keep others from it; the first reason is told.
pub(super) fn each_present<W>(
    wanted: impl IntoIterator<Item = (String, W)>,
    mut set_up: impl FnMut(&str, u32, &W) -> Result<(), TelemetryError>,
) -> Result<(), TelemetryError> {
    let mut failed = None;
    for (tap, wish) in wanted {
        if let Ok(index) = if_nametoindex(tap.as_str())
            && let Err(error) = set_up(&tap, index, &wish)
            // Gone meanwhile: then there is nothing to set up.
            && if_nametoindex(tap.as_str()).is_ok()
        {
            failed.get_or_insert(error);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// A link's name; none if it is gone, for which nix has an empty one.
pub(crate) fn name_of(link: u32) -> Option<String> {
    let name = if_indextoname(link).ok()?.into_string().ok()?;
    Some(name).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::{filter, ports};

    #[test]
    fn a_pins_name_says_which_program_is_on_which_tap() {
        for programs in [ports::TAPS, filter::TAPS] {
            for (program, _) in programs.sides {
                let (tap, found, _) =
                    programs.parse(&format!("{}gwt0123_{program}", programs.prefix)).unwrap();
                assert_eq!((tap.as_str(), found), ("gwt0123", program));
            }
            assert!(programs.parse("networks").is_none());
        }
    }
}
