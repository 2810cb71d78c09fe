//! Making, changing and removing flavors.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::instance::Flavor;
use crate::fleet::{Change, Fleet};
use crate::placement::request::Request;
use crate::placement::spec::SpecRule;
use std::collections::BTreeMap;

/// Largest figure of a flavor: beyond it sizes in bytes no longer fit.
const MAX: u64 = i32::MAX as u64;

/// Extra specs of one flavor at most.
const MAX_SPECS: usize = 128;

/// Makes a flavor.
///
/// # Errors
/// An id or name that is taken; sizes out of range; an extra spec that reads as nothing.
pub fn create(fleet: &Fleet, flavor: Flavor) -> Decision<Flavor> {
    check_name("name", &flavor.name)?;
    check_name("id", &flavor.id)?;
    check_description(flavor.description.as_deref())?;
    let sizes =
        [("vcpus", u64::from(flavor.vcpus), 1), ("ram", flavor.memory_mib, 1), ("disk", flavor.disk_gib, 0)];
    for (what, size, least) in sizes {
        if !(least..=MAX).contains(&size) {
            return Err(Error::Invalid(format!("{what} is {size}; it must be from {least} to {MAX}.")));
        }
    }
    check_specs(&flavor, &flavor.extra_specs)?;
    if fleet.flavors.contains_key(&flavor.id) {
        return Err(Error::Conflict(format!("Flavor with ID {} already exists.", flavor.id)));
    }
    if fleet.flavors.values().any(|f| f.name == flavor.name) {
        return Err(Error::Conflict(format!("Flavor with name {} already exists.", flavor.name)));
    }
    Ok((vec![flavor.clone().into()], flavor))
}

/// Gives a flavor another description.
///
/// # Errors
/// No such flavor; the text is too long.
pub fn describe(fleet: &Fleet, id: &str, description: Option<String>) -> Decision<Flavor> {
    check_description(description.as_deref())?;
    let flavor = Flavor { description, ..find(fleet, id)?.clone() };
    Ok((vec![flavor.clone().into()], flavor))
}

/// Sets extra specs; others stay.
///
/// # Errors
/// No such flavor; a key or value that reads as nothing. Keys that only contradict each other are taken: they may
/// be set one after the other, and an instance of such a flavor is refused.
pub fn set_specs(fleet: &Fleet, id: &str, specs: BTreeMap<String, String>) -> Decision<Flavor> {
    let mut flavor = find(fleet, id)?.clone();
    check_specs(&flavor, &specs)?;
    flavor.extra_specs.extend(specs);
    if flavor.extra_specs.len() > MAX_SPECS {
        return Err(Error::Invalid(format!("A flavor has at most {MAX_SPECS} extra specs.")));
    }
    Ok((vec![flavor.clone().into()], flavor))
}

/// Takes an extra spec away.
///
/// # Errors
/// No such flavor, or it has no such key.
pub fn unset_spec(fleet: &Fleet, id: &str, key: &str) -> Decision<()> {
    let mut flavor = find(fleet, id)?.clone();
    match flavor.extra_specs.remove(key) {
        Some(_) => Ok((vec![flavor.into()], ())),
        None => Err(Error::not_found("FlavorExtraSpec", format!("{key} of flavor {id}"))),
    }
}

/// Removes a flavor. Instances keep their copies.
///
/// # Errors
/// No such flavor.
pub fn delete(fleet: &Fleet, id: &str) -> Decision<()> {
    Ok((vec![Change::gone(find(fleet, id)?)], ()))
}

/// The flavor of that id.
///
/// # Errors
/// There is none.
pub fn find<'a>(fleet: &'a Fleet, id: &str) -> Result<&'a Flavor, Error> {
    fleet.flavors.get(id).ok_or_else(|| Error::not_found("Flavor", id))
}

fn check_name(what: &str, text: &str) -> Result<(), Error> {
    check_text(what, text)?;
    if text.is_empty() || text.trim() != text || text.chars().any(char::is_control) {
        return Err(Error::Invalid(format!(
            "The flavor's {what} must have printable characters, and no space at its ends."
        )));
    }
    Ok(())
}

fn check_description(text: Option<&str>) -> Result<(), Error> {
    match text.map(|t| t.chars().count()) {
        Some(length) if length > 65_535 => Err(Error::Invalid(format!(
            "The description has {length} characters; at most 65535 are allowed."
        ))),
        _ => Ok(()),
    }
}

fn check_specs(flavor: &Flavor, specs: &BTreeMap<String, String>) -> Result<(), Error> {
    for (key, value) in specs {
        let fits = |c: char| c.is_ascii_alphanumeric() || " -_:.".contains(c);
        if key.is_empty() || key.len() > 255 || !key.chars().all(fits) {
            return Err(Error::Invalid(format!(
                "The extra spec's key '{key}' must be 1 to 255 letters, digits, spaces, hyphens, underscores, colons \
                 or dots."
            )));
        }
        check_text(&format!("value of extra spec {key}"), value)?;
        Request::check_extra_spec(key, value).map_err(|error| Error::Invalid(error.to_string()))?;
        let alone = BTreeMap::from([(key.clone(), value.clone())]);
        match Request::from_specs(flavor.vcpus, flavor.memory_mib, &alone, &BTreeMap::new()) {
            Err(error) if is_about_one_value(error.rule) => return Err(Error::Invalid(error.to_string())),
            _ => {}
        }
    }
    Ok(())
}

/// Whether a rule is broken by a key's value whatever the other keys say.
fn is_about_one_value(rule: SpecRule) -> bool {
    matches!(
        rule,
        SpecRule::InvalidRequest
            | SpecRule::UnsupportedKey
            | SpecRule::BadNodeCount
            | SpecRule::BadPageSize
            | SpecRule::BadCpuPolicy
            | SpecRule::BadThreadPolicy
            | SpecRule::BadEmulatorPolicy
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flavor() -> Flavor {
        Flavor {
            id: "7".into(),
            name: "numa".into(),
            vcpus: 2,
            memory_mib: 512,
            disk_gib: 1,
            public: true,
            extra_specs: BTreeMap::new(),
            description: None,
        }
    }

    fn set(pairs: &[(&str, &str)]) -> Result<BTreeMap<String, String>, Error> {
        let mut fleet = Fleet::default();
        fleet.apply(flavor().into());
        let specs = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        set_specs(&fleet, "7", specs).map(|(_, flavor)| flavor.extra_specs)
    }

    #[test]
    fn an_extra_spec_that_reads_as_nothing_is_refused_with_key_and_rule() {
        for (key, value, part) in [
            ("hw:numa_nodes", "0", "bad_node_count"),
            ("hw:numa_nodes", "two", "bad_node_count"),
            ("hw:cpu_policy", "mine", "bad_cpu_policy"),
            ("hw:mem_page_size", "huge", "bad_page_size"),
            ("hw:cpu_policy", "", "bad_cpu_policy"),
            ("hw:cpu_dedicated_mask", " ", "bad_dedicated_mask"),
            ("hw:numa_cpus.01", "0", "incomplete_map"),
            ("hw:numa_mem.128", "512", "incomplete_map"),
            ("trait:HW_CPU_HYPERTHREADING", "maybe", "invalid_request"),
            ("hw:cpu_polcy", "dedicated", "unsupported_key"),
            ("no/slash", "1", "no/slash"),
            ("", "1", "1 to 255"),
        ] {
            let error = set(&[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(key), "{key}={value}: {error}");
        }
    }

    #[test]
    fn keys_that_only_make_sense_together_may_be_set_one_by_one() {
        assert_eq!(set(&[("hw:numa_cpus.0", "0,1")]).unwrap().len(), 1);
        assert_eq!(set(&[("hw:cpu_thread_policy", "isolate")]).unwrap().len(), 1);
        assert_eq!(set(&[("aggregate:rack", "7"), ("quota:cpu_shares", "10")]).unwrap().len(), 2);
    }

    #[test]
    fn neither_ids_nor_names_are_given_twice() {
        let mut fleet = Fleet::default();
        fleet.apply(flavor().into());
        for twin in [Flavor { name: "other".into(), ..flavor() }, Flavor { id: "8".into(), ..flavor() }] {
            assert!(matches!(create(&fleet, twin), Err(Error::Conflict(_))));
        }
        assert!(create(&fleet, Flavor { id: "8".into(), name: "other".into(), ..flavor() }).is_ok());
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let big = u64::from(u32::MAX);
        for bad in [
            Flavor { vcpus: 0, ..flavor() },
            Flavor { memory_mib: 0, ..flavor() },
            Flavor { memory_mib: big, ..flavor() },
            Flavor { disk_gib: big, ..flavor() },
            Flavor { name: " x".into(), ..flavor() },
            Flavor { id: String::new(), ..flavor() },
        ] {
            assert!(matches!(create(&Fleet::default(), bad), Err(Error::Invalid(_))));
        }
    }
}
