//! Microversions: the version of a resource's shape that a client asks for, request by request.

use crate::api::Service;
use crate::api::fault::Fault;
use axum::extract::FromRequestParts;
use axum::http::header::{HeaderName, HeaderValue, VARY};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use std::convert::Infallible;

/// Newest compute microversion. From 2.88 on hypervisors lose their sizes, which clients then want from placement.
pub const COMPUTE_MAX: u32 = 87;

/// Newest placement microversion: the one that the resource-provider client asks for.
pub const PLACEMENT_MAX: u32 = 29;

const HEADER: HeaderName = HeaderName::from_static("openstack-api-version");
const OLD_COMPUTE_HEADER: HeaderName = HeaderName::from_static("x-openstack-nova-api-version");

/// The microversion of a request, in force for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Microversion {
    major: u32,
    minor: u32,
}

/// Oldest and newest version of a service, when it has microversions.
fn range(service: Service) -> Option<(&'static str, Microversion, Microversion)> {
    let version = |major, minor| Microversion { major, minor };
    match service {
        Service::Compute => Some(("compute", version(2, 1), version(2, COMPUTE_MAX))),
        Service::Placement => Some(("placement", version(1, 0), version(1, PLACEMENT_MAX))),
        _ => None,
    }
}

impl Microversion {
    /// Compute's `2.<minor>`.
    pub const fn compute(minor: u32) -> Self {
        Self { major: 2, minor }
    }

    /// The part after the dot.
    pub fn minor(self) -> u32 {
        self.minor
    }

    /// Whether it is `<major>.<minor>` or newer, whatever the major: a service has one.
    pub fn at_least(self, minor: u32) -> bool {
        self.minor >= minor
    }

    /// What a request asks for: none for services without microversions, the oldest when it does not say.
    ///
    /// # Errors
    /// 400 for what is no version, 406 for one that this server does not have.
    pub fn of_request(service: Service, headers: &HeaderMap) -> Result<Option<Self>, Fault> {
        let Some((name, oldest, newest)) = range(service) else { return Ok(None) };
        let Some(wish) = wish(name, service, headers) else { return Ok(Some(oldest)) };
        if wish == "latest" {
            return Ok(Some(newest));
        }
        let version = parse(wish).ok_or_else(|| {
            Fault::bad_request(format!(
                "API Version String {wish} is of invalid format. Must be of format MajorNum.MinorNum."
            ))
        })?;
        if version < oldest || version > newest {
            return Err(Fault::new(
                StatusCode::NOT_ACCEPTABLE,
                format!(
                    "Version {wish} is not supported by the API. Minimum is {oldest} and maximum is {newest}."
                ),
            ));
        }
        Ok(Some(version))
    }

    /// Tells in an answer which version it has, and that the headers made the difference.
    pub fn echo(self, service: Service, headers: &mut HeaderMap) {
        let Some((name, ..)) = range(service) else { return };
        if let Ok(value) = HeaderValue::from_str(&format!("{name} {self}")) {
            headers.insert(HEADER, value);
        }
        headers.append(VARY, HeaderValue::from_static("OpenStack-API-Version"));
        if service == Service::Compute
            && let Ok(value) = HeaderValue::from_str(&self.to_string())
        {
            headers.insert(OLD_COMPUTE_HEADER, value);
            headers.append(VARY, HeaderValue::from_static("X-OpenStack-Nova-API-Version"));
        }
    }
}

impl std::fmt::Display for Microversion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The new header names several services at once, `compute 2.61, volume 3.0`; the old one is compute's alone.
fn wish<'a>(name: &str, service: Service, headers: &'a HeaderMap) -> Option<&'a str> {
    let values = headers.get_all(HEADER).into_iter().filter_map(|value| value.to_str().ok());
    let new = values.flat_map(|value| value.split(',')).find_map(|wish| {
        let (service, version) = wish.trim().split_once(' ')?;
        service.eq_ignore_ascii_case(name).then_some(version.trim())
    });
    let old = || headers.get(OLD_COMPUTE_HEADER).and_then(|value| value.to_str().ok()).map(str::trim);
    new.or_else(|| if service == Service::Compute { old() } else { None })
}

fn parse(text: &str) -> Option<Microversion> {
    let digits = |part: &str| {
        let plain = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        if plain { part.parse().ok() } else { None }
    };
    let (major, minor) = text.split_once('.')?;
    Some(Microversion { major: digits(major)?, minor: digits(minor)? })
}

/// The version that the frame found; the oldest of compute outside services with microversions.
impl<S: Sync> FromRequestParts<S> for Microversion {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get().copied().unwrap_or(Self::compute(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(service: Service, headers: &[(&'static str, &str)]) -> Result<Option<String>, StatusCode> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_static(name), value.parse().unwrap());
        }
        Microversion::of_request(service, &map).map(|v| v.map(|v| v.to_string())).map_err(|f| f.status())
    }

    #[test]
    fn both_spellings_name_the_version_and_none_means_the_oldest() {
        let found = |version: &str| Ok(Some(version.to_owned()));
        assert_eq!(ask(Service::Compute, &[]), found("2.1"));
        assert_eq!(ask(Service::Compute, &[("openstack-api-version", "compute 2.61")]), found("2.61"));
        assert_eq!(
            ask(Service::Compute, &[("openstack-api-version", "volume 3.1, compute 2.9")]),
            found("2.9")
        );
        assert_eq!(ask(Service::Compute, &[("x-openstack-nova-api-version", "2.30")]), found("2.30"));
        assert_eq!(ask(Service::Compute, &[("openstack-api-version", "compute latest")]), found("2.87"));
        assert_eq!(ask(Service::Compute, &[("openstack-api-version", "volume 3.70")]), found("2.1"));
        assert_eq!(ask(Service::Placement, &[("openstack-api-version", "placement 1.29")]), found("1.29"));
        assert_eq!(ask(Service::Image, &[("openstack-api-version", "compute 2.61")]), Ok(None));
    }

    #[test]
    fn a_version_out_of_range_is_not_acceptable_and_nonsense_is_a_bad_request() {
        for (version, status) in
            [("2.0", 406), ("2.88", 406), ("3.1", 406), ("2", 400), ("2.+1", 400), ("x", 400)]
        {
            let header = format!("compute {version}");
            let answer = ask(Service::Compute, &[("openstack-api-version", &header)]);
            assert_eq!(answer.map_err(|s| s.as_u16()), Err(status), "{version}");
        }
    }

    #[test]
    fn an_answer_names_its_version_and_varies_by_the_headers() {
        let mut headers = HeaderMap::new();
        Microversion::compute(61).echo(Service::Compute, &mut headers);
        assert_eq!(headers["openstack-api-version"], "compute 2.61");
        assert_eq!(headers["x-openstack-nova-api-version"], "2.61");
        assert_eq!(headers.get_all(VARY).iter().count(), 2);
    }
}
