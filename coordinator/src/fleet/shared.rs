//! Parts of records that many records have in common, held once: a flavor with its specs would be half of an instance.

use crate::fleet::instance::Flavor;
use std::collections::HashMap;
use std::sync::Arc;

/// What instances share.
#[derive(Default)]
pub(crate) struct Shared {
    /// By id; a flavor that was made anew under its old id is another.
    flavors: HashMap<String, Vec<Arc<Flavor>>>,
}

impl Shared {
    /// The same flavor, as other instances have it already.
    pub(super) fn flavor(&mut self, flavor: Arc<Flavor>) -> Arc<Flavor> {
        let known = self.flavors.entry(flavor.id.clone()).or_default();
        if let Some(same) = known.iter().find(|other| **other == flavor) {
            return same.clone();
        }
        // Those that no instance has any more go when there is a reason to look.
        known.retain(|other| Arc::strong_count(other) > 1);
        known.push(flavor.clone());
        flavor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flavor(vcpus: u32) -> Arc<Flavor> {
        let flavor = Flavor {
            id: "1".into(),
            name: "small".into(),
            vcpus,
            memory_mib: 1,
            disk_gib: 0,
            public: true,
            extra_specs: Default::default(),
            description: None,
        };
        flavor.into()
    }

    #[test]
    fn equal_flavors_become_one_and_unused_ones_go() {
        let mut shared = Shared::default();
        let first = shared.flavor(flavor(1));
        assert!(Arc::ptr_eq(&first, &shared.flavor(flavor(1))));
        let second = shared.flavor(flavor(2));
        assert_eq!((second.vcpus, Arc::strong_count(&first)), (2, 2));
        drop(second);
        shared.flavor(flavor(3));
        assert_eq!(shared.flavors["1"].len(), 2, "the first is in use, the second is not");
    }
}
