//! How far a cell is from the others.

use std::sync::Arc;

/// What a cell is from itself where the host does not tell, by the kernel's convention.
const OWN: u32 = 10;
/// What it is from any other.
const OTHER: u32 = 20;

/// Distances from one cell to the host's cells by their numbers (ACPI SLIT, 10 is the cell itself); empty when untold.
/// Cheap to clone; hosts of one kind share them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Distances(Arc<Row>);

#[derive(Debug, PartialEq, Eq, Hash)]
struct Row {
    /// By number.
    told: Box<[(u32, u32)]>,
    /// Whether the numbers are 0, 1, 2, …
    dense: bool,
    /// The two least, where all are told.
    least: (u32, u32),
    /// The same, where some are not.
    least_or_untold: (u32, u32),
}

impl Distances {
    /// From the cell `own` to `other`.
    pub(super) fn between(&self, own: u32, other: u32) -> u32 {
        let told = &self.0.told;
        match told.get(other as usize) {
            Some(&(number, distance)) if number == other => distance,
            _ => match told.binary_search_by_key(&other, |&(number, _)| number) {
                Ok(at) => told[at].1,
                Err(_) if own == other => OWN,
                Err(_) => OTHER,
            },
        }
    }

    /// The two least that can be between this cell and any of a host's `cells`, itself among them. `dense` says that
    /// the host's cells are numbered 0, 1, 2, …
    pub(super) fn least(&self, cells: usize, dense: bool) -> (u32, u32) {
        let row = &*self.0;
        if dense && row.dense && row.told.len() >= cells {
            return row.least;
        }
        row.least_or_untold
    }
}

impl FromIterator<(u32, u32)> for Distances {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(told: I) -> Self {
        let mut told: Box<[(u32, u32)]> = told.into_iter().collect();
        told.sort_unstable();
        let dense = told.iter().zip(0..).all(|(&(number, _), at)| number == at);
        let mut least: Vec<u32> = told.iter().map(|&(_, distance)| distance).collect();
        let mut two = |more: [u32; 2]| {
            least.extend(more);
            least.sort_unstable();
            (least[0], least[1])
        };
        let (least, least_or_untold) = (two([u32::MAX; 2]), two([OWN, OTHER]));
        Self(Arc::new(Row { told, dense, least, least_or_untold }))
    }
}

impl Default for Distances {
    /// Untold.
    fn default() -> Self {
        Self::from_iter([])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_told_is_between_and_no_two_cells_are_nearer_than_the_least(
            told in proptest::collection::btree_map(0..6_u32, 1..40_u32, 0..6),
            numbers in proptest::collection::btree_set(0..6_u32, 2..6),
        ) {
            let row: Distances = told.iter().map(|(to, distance)| (*to, *distance)).collect();
            let dense = numbers.iter().zip(0..).all(|(number, at)| *number == at);
            for own in &numbers {
                let mut between: Vec<u32> = numbers.iter().map(|to| row.between(*own, *to)).collect();
                for (to, is) in numbers.iter().zip(&between) {
                    let untold = if to == own { 10 } else { 20 };
                    prop_assert_eq!(*is, told.get(to).copied().unwrap_or(untold));
                }
                between.sort_unstable();
                let (first, second) = row.least(numbers.len(), dense);
                prop_assert!(first <= between[0] && second <= between[1]);
            }
        }
    }
}
