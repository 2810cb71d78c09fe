//! Messages of rtnetlink, of which those about links are cut down to what is read of them before they are parsed. The
//! parser of packet_route writes all settings of a link out as text for each one of them, in case that one is malformed: a
//! bridge, which has fifty, takes it half a millisecond, and a host may have a thousand.

use rtnetlink::packet_core::{
    DecodeError, NLA_TYPE_MASK, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;

/// A request, or an answer.
#[derive(Clone, Debug)]
pub(super) struct Message(pub(super) RouteNetlinkMessage);

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.0.message_type()
    }

    fn buffer_len(&self) -> usize {
        self.0.buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.serialize(buffer);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        // What cannot be cut is for the parser to refuse.
        let short = if header.message_type == libc::RTM_NEWLINK { cut(payload) } else { None };
        RouteNetlinkMessage::deserialize(header, short.as_deref().unwrap_or(payload)).map(Self)
    }
}

/// Bytes of `struct ifinfomsg`.
const HEADER_BYTES: usize = 16;

/// A link's attributes that [`super::links::LinkState`] has; the kernel's numbers are in linux/if_link.h.
const OF_LINK: [u16; 5] =
    [libc::IFLA_ADDRESS, libc::IFLA_IFNAME, libc::IFLA_MTU, libc::IFLA_LINK, libc::IFLA_MASTER];

/// Settings that it has by the kind of link: IFLA_BR_STP_STATE and _MCAST_SNOOPING; IFLA_VXLAN_ID, _GROUP, _LINK, _LOCAL,
/// _TTL, _LEARNING, _PORT, _GROUP6 and _LOCAL6; IFLA_VLAN_ID.
const OF_KIND: [(&[u8], &[u16]); 3] =
    [(b"bridge\0", &[5, 23]), (b"vxlan\0", &[1, 2, 3, 4, 5, 7, 15, 16, 17]), (b"vlan\0", &[1])];

/// And by the kind of link that it is a port of: IFLA_BRPORT_LEARNING, _UNICAST_FLOOD and _NEIGH_SUPPRESS.
const OF_PORT: [(&[u8], &[u16]); 1] = [(b"bridge\0", &[8, 9, 32])];

/// The message without what nobody reads; none if it is malformed.
fn cut(link: &[u8]) -> Option<Vec<u8>> {
    let (header, attributes) = link.split_at_checked(HEADER_BYTES)?;
    let mut short = header.to_vec();
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute.ok()?;
        match attribute.kind() {
            libc::IFLA_LINKINFO => nest(&mut short, libc::IFLA_LINKINFO, &cut_info(attribute.value())?),
            kind if OF_LINK.contains(&kind) => nest(&mut short, kind, attribute.value()),
            _ => {}
        }
    }
    Some(short)
}

fn cut_info(info: &[u8]) -> Option<Vec<u8>> {
    let mut short = Vec::new();
    let mut wanted: &[u16] = &[];
    for attribute in NlasIterator::new(info) {
        let attribute = attribute.ok()?;
        let (kind, value) = (attribute.kind(), attribute.value());
        let of = |kinds: &[(&[u8], &'static [u16])]| {
            kinds.iter().find(|(name, _)| *name == value).map_or(&[][..], |(_, settings)| settings)
        };
        match kind {
            // A kind comes before its settings.
            libc::IFLA_INFO_KIND => wanted = of(&OF_KIND),
            libc::IFLA_INFO_SLAVE_KIND => wanted = of(&OF_PORT),
            libc::IFLA_INFO_DATA | libc::IFLA_INFO_SLAVE_DATA => {
                if !wanted.is_empty() {
                    nest(&mut short, kind, &keep(value, wanted)?);
                }
                continue;
            }
            _ => continue,
        }
        nest(&mut short, kind, value);
    }
    Some(short)
}

fn keep(settings: &[u8], wanted: &[u16]) -> Option<Vec<u8>> {
    let mut short = Vec::new();
    for setting in NlasIterator::new(settings) {
        let setting = setting.ok()?;
        if wanted.contains(&(setting.kind() & NLA_TYPE_MASK)) {
            nest(&mut short, setting.kind(), setting.value());
        }
    }
    Some(short)
}

/// Adds an attribute (`struct nlattr`). It is no longer than the one that it was, so its length has room.
fn nest(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(((value.len() + 4) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}
