//! The kinds of things that have an id and perhaps a name, and how one is found by either.

use crate::error::{Error, Result};
use crate::http::encode;
use crate::session::{Service, Session};
use serde_json::Value;

/// A kind of thing with its place in the API.
pub(crate) struct Resource {
    /// The word in commands and messages.
    pub(crate) noun: &'static str,
    service: Service,
    /// `/servers`.
    pub(crate) path: &'static str,
    /// Where lists with all fields are, perhaps with a query.
    list: &'static str,
    /// The key that wraps one; the image service wraps none.
    singular: Option<&'static str>,
    /// The key that wraps a list.
    plural: &'static str,
    /// The field that people call it by.
    name: &'static str,
    /// Whether the list can be narrowed by `name=`.
    filter: bool,
}

pub(crate) const SERVER: Resource = Resource {
    noun: "server",
    service: Service::Compute,
    path: "/servers",
    list: "/servers/detail?deleted=False",
    singular: Some("server"),
    plural: "servers",
    name: "name",
    filter: true,
};
pub(crate) const FLAVOR: Resource = Resource {
    noun: "flavor",
    service: Service::Compute,
    path: "/flavors",
    list: "/flavors/detail?is_public=None",
    singular: Some("flavor"),
    plural: "flavors",
    name: "name",
    filter: false,
};
pub(crate) const MIGRATION: Resource = Resource {
    noun: "migration",
    service: Service::Compute,
    path: "/os-migrations",
    list: "/os-migrations",
    singular: None,
    plural: "migrations",
    name: "uuid",
    filter: false,
};
pub(crate) const IMAGE: Resource = Resource {
    noun: "image",
    service: Service::Image,
    path: "/images",
    list: "/images",
    singular: None,
    plural: "images",
    name: "name",
    filter: true,
};
pub(crate) const NETWORK: Resource = Resource {
    noun: "network",
    service: Service::Network,
    path: "/networks",
    list: "/networks",
    singular: Some("network"),
    plural: "networks",
    name: "name",
    filter: true,
};
pub(crate) const SUBNET: Resource = Resource {
    noun: "subnet",
    service: Service::Network,
    path: "/subnets",
    list: "/subnets",
    singular: Some("subnet"),
    plural: "subnets",
    name: "name",
    filter: true,
};
pub(crate) const PORT: Resource = Resource {
    noun: "port",
    service: Service::Network,
    path: "/ports",
    list: "/ports",
    singular: Some("port"),
    plural: "ports",
    name: "name",
    filter: true,
};
pub(crate) const SECURITY_GROUP: Resource = Resource {
    noun: "security group",
    service: Service::Network,
    path: "/security-groups",
    list: "/security-groups",
    singular: Some("security_group"),
    plural: "security_groups",
    name: "name",
    filter: true,
};
pub(crate) const HOST: Resource = Resource {
    noun: "host",
    service: Service::Operator,
    path: "/hosts",
    list: "/hosts",
    singular: Some("host"),
    plural: "hosts",
    name: "name",
    filter: false,
};
pub(crate) const POOL: Resource = Resource {
    noun: "pool",
    service: Service::Operator,
    path: "/pools",
    list: "/pools",
    singular: Some("pool"),
    plural: "pools",
    name: "name",
    filter: false,
};
pub(crate) const OPERATION: Resource = Resource {
    noun: "operation",
    service: Service::Operator,
    path: "/operations",
    list: "/operations",
    singular: Some("operation"),
    plural: "operations",
    name: "id",
    filter: false,
};

pub(crate) const EVENT: Resource = Resource {
    noun: "event",
    service: Service::Operator,
    path: "/events",
    list: "/events",
    singular: None,
    plural: "events",
    name: "at",
    filter: false,
};

impl Resource {
    /// The one with this id or, if none has it, with this name, as OpenStack's own clients look.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Ambiguous`], besides those of the requests.
    pub(crate) fn find(&self, session: &Session, wanted: &str) -> Result<Value> {
        if wanted.is_empty() {
            return Err(Error::Usage(format!("the id or name of a {} is empty", self.noun)));
        }
        match self.get(session, wanted) {
            Err(error) if error.is_not_found() => self.find_by_name(session, wanted),
            other => other,
        }
    }

    /// The id of [`Self::find`].
    pub(crate) fn find_id(&self, session: &Session, wanted: &str) -> Result<String> {
        id(&self.find(session, wanted)?)
    }

    /// The one with this id.
    pub(crate) fn get(&self, session: &Session, id: &str) -> Result<Value> {
        let answer = session.get(self.service, &format!("{}/{}", self.path, encode(id)))?;
        Ok(self.unwrap(answer))
    }

    /// Takes the wrapping off one.
    pub(crate) fn unwrap(&self, mut answer: Value) -> Value {
        match self.singular {
            Some(key) if answer.get(key).is_some() => answer[key].take(),
            _ => answer,
        }
    }

    /// All that match `query` (`a=b&c=d`, may be empty), following pages.
    pub(crate) fn list(&self, session: &Session, query: &str) -> Result<Vec<Value>> {
        let mut base = self.list.to_owned();
        if !query.is_empty() {
            base.push(if base.contains('?') { '&' } else { '?' });
            base.push_str(query);
        }
        let mut found: Vec<Value> = Vec::new();
        let mut path = base.clone();
        loop {
            let mut answer = session.get(self.service, &path)?;
            let Value::Array(page) = answer[self.plural].take() else {
                return Err(Error::Answer {
                    url: path,
                    reason: format!("it has no list of {}", self.plural),
                });
            };
            let links = answer[format!("{}_links", self.plural)].as_array();
            let more = answer["next"].is_string()
                || links.is_some_and(|links| links.iter().any(|link| link["rel"] == "next"));
            // Only what comes in pages needs ids: events have none.
            let last = page.last().filter(|_| more).map(id).transpose()?;
            found.extend(page);
            let Some(last) = last else { return Ok(found) };
            let separator = if base.contains('?') { '&' } else { '?' };
            path = format!("{base}{separator}marker={}", encode(&last));
        }
    }

    fn find_by_name(&self, session: &Session, wanted: &str) -> Result<Value> {
        // The compute service takes the name for a pattern: only harmless ones may narrow the list.
        let plain = wanted.chars().all(|c| c.is_alphanumeric() || "-_. ".contains(c));
        let query = if self.filter && plain { format!("name={}", encode(wanted)) } else { String::new() };
        let mut found = self.list(session, &query)?;
        found.retain(|item| item[self.name] == wanted);
        match found.len() {
            0 => Err(Error::NotFound { noun: self.noun, name: wanted.to_owned() }),
            1 => Ok(found.remove(0)),
            _ => Err(Error::Ambiguous {
                noun: self.noun,
                name: wanted.to_owned(),
                ids: found.iter().map(id).collect::<Result<_>>()?,
            }),
        }
    }
}

/// The id of a thing; migrations have a number.
pub(crate) fn id(item: &Value) -> Result<String> {
    match &item["id"] {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        _ => Err(Error::Answer { url: "the service".into(), reason: "an item without an id".into() }),
    }
}
