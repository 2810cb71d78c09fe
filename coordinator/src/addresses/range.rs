//! Arithmetic of ranges: which address or number of one is usable, and which is free. Luck comes in as an argument.

use godwit_protocol::port::Mac;
use ipnet::IpNet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// First half of every Ethernet address that is made here; the prefix of OpenStack, which clients know.
const MAC_PREFIX: [u8; 3] = [0xfa, 0x16, 0x3e];

/// An address as a number, in the width of its family.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// The address that is `by` after `address`; none past the family's end.
fn after(address: IpAddr, by: u128) -> Option<IpAddr> {
    let number = number(address).checked_add(by)?;
    match address {
        IpAddr::V4(_) => Some(IpAddr::V4(u32::try_from(number).ok()?.into())),
        IpAddr::V6(_) => Some(IpAddr::V6(number.into())),
    }
}

/// The address before `address`; none at the family's start.
fn before(address: IpAddr) -> Option<IpAddr> {
    let number = number(address).checked_sub(1)?;
    match address {
        IpAddr::V4(_) => Some(IpAddr::V4(u32::try_from(number).ok()?.into())),
        IpAddr::V6(_) => Some(IpAddr::V6(number.into())),
    }
}

/// First and last address of a range that a port may have: not the network's own address, not IPv4's broadcast.
/// Ranges of one or two addresses have neither (RFC 3021, RFC 6164).
pub fn usable(cidr: &IpNet) -> (IpAddr, IpAddr) {
    let (first, last) = (cidr.network(), cidr.broadcast());
    if cidr.max_prefix_len() - cidr.prefix_len() <= 1 {
        return (first, last);
    }
    let last = if cidr.addr().is_ipv4() { before(last).unwrap_or(last) } else { last };
    (after(first, 1).unwrap_or(first), last)
}

/// Whether a port may have `address` in `cidr`.
pub fn is_usable(cidr: &IpNet, address: IpAddr) -> bool {
    let (first, last) = usable(cidr);
    cidr.contains(&address) && first <= address && address <= last
}

/// The pools of a subnet whose user named none: everything usable but the gateway.
pub fn default_pools(cidr: &IpNet, gateway: Option<IpAddr>) -> Vec<(IpAddr, IpAddr)> {
    let (first, last) = usable(cidr);
    let Some(gateway) = gateway.filter(|g| first <= *g && *g <= last && g.is_ipv4() == first.is_ipv4())
    else {
        return vec![(first, last)];
    };
    let below = before(gateway).filter(|end| first <= *end && gateway != first).map(|end| (first, end));
    let above =
        after(gateway, 1).filter(|start| *start <= last && gateway != last).map(|start| (start, last));
    below.into_iter().chain(above).collect()
}

/// The lowest address of the pools that is not taken. Looks at no more addresses than are taken, plus one a pool.
pub fn free_address(pools: &[(IpAddr, IpAddr)], is_taken: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    pools.iter().find_map(|&(first, last)| {
        std::iter::successors(Some(first), |address| after(*address, 1))
            .take_while(|address| *address <= last)
            .find(|address| !is_taken(*address))
    })
}

/// An Ethernet address that is not taken: the first from `luck` on. None when all 2^24 are taken.
pub fn free_mac(luck: u32, is_taken: impl Fn(Mac) -> bool) -> Option<Mac> {
    let [a, b, c] = MAC_PREFIX;
    (0..1_u32 << 24).find_map(|step| {
        let [_, d, e, f] = luck.wrapping_add(step).to_be_bytes();
        Some(Mac([a, b, c, d, e, f])).filter(|mac| !is_taken(*mac))
    })
}

/// A VXLAN number of the range that is not taken: the first from `luck` on, and round. A number that was just
/// given back is so seldom given out again while hosts still take the old network down.
pub fn free_vni(range: &RangeInclusive<u32>, luck: u32, is_taken: impl Fn(u32) -> bool) -> Option<u32> {
    let count = range.end().checked_sub(*range.start())?.checked_add(1)?;
    let first = luck % count;
    (0..count).map(|step| range.start() + (first + step) % count).find(|vni| !is_taken(*vni))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn pools(cidr: &str, gateway: Option<&str>) -> Vec<String> {
        let pools = default_pools(&net(cidr), gateway.map(ip));
        pools.iter().map(|(first, last)| format!("{first}-{last}")).collect()
    }

    #[test]
    fn default_pools_hold_all_but_network_broadcast_and_gateway() {
        assert_eq!(pools("10.0.0.0/24", Some("10.0.0.1")), ["10.0.0.2-10.0.0.254"]);
        assert_eq!(pools("10.0.0.0/24", Some("10.0.0.254")), ["10.0.0.1-10.0.0.253"]);
        assert_eq!(pools("10.0.0.0/24", Some("10.0.0.9")), ["10.0.0.1-10.0.0.8", "10.0.0.10-10.0.0.254"]);
        assert_eq!(pools("10.0.0.0/24", None), ["10.0.0.1-10.0.0.254"]);
        assert_eq!(pools("10.0.0.0/31", Some("10.0.0.0")), ["10.0.0.1-10.0.0.1"]);
        assert_eq!(pools("10.0.0.4/32", Some("10.0.0.4")), Vec::<String>::new());
        assert_eq!(pools("255.255.255.0/24", None), ["255.255.255.1-255.255.255.254"]);
        assert_eq!(pools("fd00::/64", Some("fd00::1")), ["fd00::2-fd00::ffff:ffff:ffff:ffff"]);
        assert_eq!(pools("fd00::/64", Some("fe80::1")), ["fd00::1-fd00::ffff:ffff:ffff:ffff"]);
    }

    #[test]
    fn an_exhausted_pool_gives_nothing_and_the_next_pool_is_tried() {
        let pools = [(ip("10.0.0.2"), ip("10.0.0.3")), (ip("10.0.0.9"), ip("10.0.0.9"))];
        let mut taken = BTreeSet::new();
        let mut given = Vec::new();
        while let Some(address) = free_address(&pools, |a| taken.contains(&a)) {
            taken.insert(address);
            given.push(address.to_string());
        }
        assert_eq!(given, ["10.0.0.2", "10.0.0.3", "10.0.0.9"]);
        assert_eq!(free_address(&[(ip("255.255.255.255"), ip("255.255.255.255"))], |_| true), None);
    }

    #[test]
    fn a_mac_is_made_round_the_end_and_never_twice() {
        let taken: BTreeSet<Mac> =
            ["fa:16:3e:ff:ff:ff", "fa:16:3e:00:00:00"].map(|m| m.parse().unwrap()).into();
        let mac = free_mac(0xab_ff_ff_ff, |m| taken.contains(&m)).unwrap();
        assert_eq!(mac.to_string(), "fa:16:3e:00:00:01");
        assert_eq!(free_mac(7, |_| true), None);
    }

    #[test]
    fn vnis_run_out_only_when_each_is_taken() {
        assert_eq!(free_vni(&(1001..=1003), 5, |v| v == 1003), Some(1001));
        assert_eq!(free_vni(&(1001..=1003), 0, |_| true), None);
        assert_eq!(free_vni(&(7..=7), u32::MAX, |_| false), Some(7));
    }

    proptest! {
        #[test]
        fn pools_hold_exactly_the_usable_addresses(bits in any::<u32>(), length in 24..=32_u8, at in any::<u8>()) {
            let cidr = IpNet::new(IpAddr::V4(bits.into()), length).unwrap().trunc();
            let gateway = cidr.hosts().nth(usize::from(at));
            let pools = default_pools(&cidr, gateway);
            for offset in 0..256 {
                let Some(address) = after(cidr.network(), offset) else { break };
                let inside = pools.iter().any(|(first, last)| *first <= address && address <= *last);
                prop_assert_eq!(inside, is_usable(&cidr, address) && Some(address) != gateway, "{}", address);
            }
        }

        #[test]
        fn a_given_vni_is_free_and_in_range(
            first in 1..100_u32, count in 1..20_u32, luck in any::<u32>(),
            taken in proptest::collection::btree_set(1..120_u32, 0..30),
        ) {
            let range = first..=first + count - 1;
            match free_vni(&range, luck, |v| taken.contains(&v)) {
                Some(vni) => prop_assert!(range.contains(&vni) && !taken.contains(&vni)),
                None => prop_assert!(range.clone().all(|v| taken.contains(&v))),
            }
        }
    }
}
