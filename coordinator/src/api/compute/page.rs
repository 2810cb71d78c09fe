//! Pages of compute's lists: `limit`, `marker`, and a link to the next page.

use super::Asked;
use crate::api::context::Params;
use crate::api::fault::{Answer, Fault};
use serde_json::{Value, json};

/// Most things on a page, also when no limit is asked for.
const MAX: usize = 1000;

/// One page of a list.
pub(super) struct Page<T> {
    /// What is on it.
    pub(super) items: Vec<T>,
    next: Option<String>,
}

impl<T> Page<T> {
    /// Cuts a page out of `all`, which is in its final order; `id` is what markers name.
    ///
    /// # Errors
    /// 400 for a marker that names nothing.
    pub(super) fn cut(mut all: Vec<T>, params: &Params, id: impl Fn(&T) -> String) -> Answer<Self> {
        let limit = params.number::<usize>("limit")?.map_or(MAX, |limit| limit.min(MAX));
        if let Some(marker) = params.get("marker") {
            let at = all.iter().position(|item| id(item) == marker);
            let at = at.ok_or_else(|| Fault::bad_request(format!("marker [{marker}] not found")))?;
            all.drain(..=at);
        }
        let more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().filter(|_| more).map(|last| params.with("marker", &id(last)));
        Ok(Self { items: all, next })
    }

    /// The body of the answer: the views under `name`, and the next page's link when there is one.
    pub(super) fn body(&self, asked: &Asked, name: &str, path: &str, views: Vec<Value>) -> Value {
        let mut body = json!({ name: views });
        if let Some(query) = &self.next {
            let href = asked.links.to(&format!("/compute/v2.1{path}?{query}"));
            body[format!("{name}_links")] = json!([{ "rel": "next", "href": href }]);
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(query: &str) -> Answer<(Vec<u32>, Option<String>)> {
        let page = Page::cut(vec![1, 2, 3], &Params::parse(query), u32::to_string)?;
        Ok((page.items, page.next))
    }

    #[test]
    fn pages_follow_each_other_to_the_end_and_a_marker_of_nothing_is_refused() {
        assert_eq!(cut("").unwrap(), (vec![1, 2, 3], None));
        assert_eq!(cut("limit=2&a=b").unwrap(), (vec![1, 2], Some("limit=2&a=b&marker=2".into())));
        assert_eq!(cut("limit=2&marker=2").unwrap(), (vec![3], None));
        assert_eq!(cut("marker=3").unwrap(), (vec![], None));
        assert_eq!(cut("limit=0").unwrap(), (vec![], None));
        assert!(cut("marker=9").is_err());
        assert!(cut("limit=-1").is_err());
    }
}
