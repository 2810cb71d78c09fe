//! The installation's own certificate authority: it vouches for the coordinator and for each host that joined.
//! Beside it, the one-time tokens that hosts join with.

use crate::error::Error;
use crate::fleet::host::{Host, JoinToken};
use crate::fleet::{Change, Fleet, Time};
use crate::tokens::random;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use godwit_protocol::id::HostId;
use godwit_protocol::quic::{COORDINATOR_NAME, host_name};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use x509_parser::extensions::GeneralName;

/// Life of the CA's certificate.
const CA_LIFE: Duration = Duration::from_secs(3650 * DAY);
/// Life of every other certificate.
const LEAF_LIFE: Duration = Duration::from_secs(365 * DAY);
/// A certificate is made anew when it has less than this left.
pub const RENEW_BEFORE: Duration = Duration::from_secs(60 * DAY);
/// Certificates begin this much earlier, for hosts whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// Life of a join token.
pub const JOIN_TOKEN_LIFE: Duration = Duration::from_secs(DAY);
const DAY: u64 = 86_400;

/// What can be wrong with certificates.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file.
    #[error("{path} cannot be read or written")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// What a file holds.
    #[error("the certificate or key does not read or sign")]
    Certificate(#[from] rcgen::Error),
    /// What a file holds.
    #[error("{0} holds no certificate")]
    Malformed(PathBuf),
    /// The system.
    #[error("the system gives no random bytes")]
    Random(#[from] getrandom::Error),
}

/// The CA: its certificate and key.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    digest: String,
}

impl Ca {
    /// A new CA; returns its certificate and key as PEM.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn create(now: Time) -> Result<(String, String), CaError> {
        let mut params = dated(now, CA_LIFE)?;
        params.distinguished_name.push(DnType::CommonName, "Godwit CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
    }

    /// From `DIR/ca.pem` and `DIR/ca.key`.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn open(dir: &Path) -> Result<Self, CaError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read_to_string(&path).map_err(|source| CaError::File { path, source })
        };
        Self::from_pem(read("ca.pem")?, &read("ca.key")?)
    }

    /// From PEM texts.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn from_pem(pem: String, key: &str) -> Result<Self, CaError> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| CaError::Malformed("ca.pem".into()))?;
        let digest = hex::encode(Sha256::digest(&der));
        let issuer = Issuer::from_ca_cert_pem(&pem, KeyPair::from_pem(key)?)?;
        Ok(Self { issuer, pem, digest })
    }

    /// Its certificate, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for a host. Only the request's public key is taken: the name is ours to give.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the request does not read or was not signed with its own key.
    pub fn sign_host(&self, host: HostId, csr: &str, now: Time) -> Result<SignedHost, Error> {
        let bad = |error: rcgen::Error| {
            Error::Invalid(format!("The certificate signing request does not read: {error}."))
        };
        let request = CertificateSigningRequestParams::from_pem(csr).map_err(bad)?;
        let key_digest = hex::encode(Sha256::digest(request.public_key.subject_public_key_info()));
        let certificate = self.certify(host, &request.public_key, now);
        let certificate = certificate
            .map_err(|error| Error::Invalid(format!("The host cannot have a certificate: {error}.")))?;
        Ok(SignedHost { certificate, key_digest })
    }

    /// The certificate (PEM) that follows on `certificate` of a host: for the same key, from now on.
    ///
    /// # Errors
    /// [`CaError::Malformed`] when `certificate` does not read, [`CaError::Certificate`].
    pub fn renew_host(
        &self,
        host: HostId,
        certificate: &CertificateDer<'_>,
        now: Time,
    ) -> Result<String, CaError> {
        let malformed = || CaError::Malformed(host_name(host).into());
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| malformed())?;
        let key = SubjectPublicKeyInfo::from_der(parsed.public_key().raw)?;
        self.certify(host, &key, now)
    }

    fn certify(&self, host: HostId, key: &impl PublicKeyData, now: Time) -> Result<String, CaError> {
        let mut params = dated(now, LEAF_LIFE)?;
        let name = host_name(host);
        params.distinguished_name.push(DnType::CommonName, name.clone());
        params.subject_alt_names = vec![SanType::DnsName(name.try_into()?)];
        // Both ends: hosts send migration streams to each other.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        Ok(params.signed_by(key, &self.issuer)?.pem())
    }

    /// The coordinator's certificate and key, PEM, for these addresses and names beside its own name.
    ///
    /// # Errors
    /// [`CaError`].
    pub fn sign_coordinator(&self, names: &[String], now: Time) -> Result<(String, String), CaError> {
        let mut params = dated(now, LEAF_LIFE)?;
        params.distinguished_name.push(DnType::CommonName, COORDINATOR_NAME);
        let own = [COORDINATOR_NAME.to_owned(), "localhost".into(), "127.0.0.1".into(), "::1".into()];
        for name in own.iter().chain(names) {
            let san = match name.parse::<IpAddr>() {
                Ok(address) if address.is_unspecified() => continue,
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            };
            if !params.subject_alt_names.contains(&san) {
                params.subject_alt_names.push(san);
            }
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem()))
    }

    /// A new join token and its record. The token carries the digest of the CA's certificate, by which the host
    /// knows whom it joins.
    ///
    /// # Errors
    /// [`CaError::Random`].
    pub fn join_token(&self, now: Time, life: Duration) -> Result<(String, JoinToken), CaError> {
        let secret = URL_SAFE_NO_PAD.encode(random::<32>()?);
        let token = format!("gw1.{secret}.{}", self.digest);
        let record = JoinToken { hash: token_hash(&token), expires_at: now + life, used_by: None };
        Ok((token, record))
    }
}

/// A host's new certificate.
#[derive(Clone, Debug)]
pub struct SignedHost {
    /// PEM.
    pub certificate: String,
    /// SHA-256 of its public key, hexadecimal, as [`Host::key_digest`] keeps it.
    pub key_digest: String,
}

/// Parameters every certificate begins with: a random serial number, from an hour ago until `now + life`.
fn dated(now: Time, life: Duration) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + life;
    let mut serial = random::<16>()?;
    serial[0] &= 0x7f; // a positive number
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

/// Whether a certificate (PEM) may go on being shown: it lasts for a while and has all these names and addresses.
pub fn serves(pem: &str, names: &[String], now: Time) -> bool {
    let Ok(der) = CertificateDer::from_pem_slice(pem.as_bytes()) else { return false };
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(&der) else { return false };
    let Ok(Some(sans)) = parsed.subject_alternative_name() else { return false };
    let has = |name: &String| {
        sans.value.general_names.iter().any(|san| match (san, name.parse::<IpAddr>()) {
            (GeneralName::IPAddress(bytes), Ok(IpAddr::V4(address))) => **bytes == address.octets(),
            (GeneralName::IPAddress(bytes), Ok(IpAddr::V6(address))) => **bytes == address.octets(),
            (GeneralName::DNSName(dns), Err(_)) => dns == name,
            _ => false,
        })
    };
    let lasts = parsed.validity().not_after.timestamp() >= (now + RENEW_BEFORE).unix_timestamp();
    lasts && names.iter().all(has)
}

/// What is kept of a join token.
pub fn token_hash(token: &str) -> String {
    hex::encode(Sha256::digest(token.as_bytes()))
}

/// Why a host may not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// No such token.
    #[error("This is no join token of this cloud. Make one with `godwit host token` and use it as it is.")]
    Unknown,
    /// Too old.
    #[error("The join token has expired. Make a new one with `godwit host token`.")]
    Expired,
    /// Used before.
    #[error(
        "The join token was used already; each serves one host. Make a new one with `godwit host token`."
    )]
    Used,
    /// The name is taken.
    #[error(
        "A host named {0} is here already. If this machine replaces it, run `godwit host remove {0}` first; else give \
         this machine a name of its own."
    )]
    NameTaken(String),
    /// The name is none.
    #[error("{0:?} is no host name: 1 to 63 letters, digits, hyphens and dots.")]
    BadName(String),
    /// The request or the store.
    #[error(transparent)]
    Other(#[from] Error),
}

impl From<crate::store::StoreError> for JoinError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Other(error.into())
    }
}

/// Decides whether a host may join, and makes its record; the token is used up in the same commit.
///
/// # Errors
/// [`JoinError`].
pub fn join(
    fleet: &Fleet,
    token: &str,
    host: HostId,
    name: &str,
    key_digest: &str,
    now: Time,
) -> Result<(Vec<Change>, HostId), JoinError> {
    let known = fleet.join_tokens.get(&token_hash(token)).ok_or(JoinError::Unknown)?;
    if known.used_by.is_some() {
        return Err(JoinError::Used);
    }
    if known.expires_at <= now {
        return Err(JoinError::Expired);
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    if name.is_empty() || name.len() > 63 || !name.bytes().all(plain) || name.starts_with(['-', '.']) {
        return Err(JoinError::BadName(name.to_owned()));
    }
    if fleet.host_by_name(name).is_some() {
        return Err(JoinError::NameTaken(name.to_owned()));
    }
    let record = Host {
        id: host,
        number: fleet.hosts.values().map(|h| h.number).max().unwrap_or(0) + 1,
        name: name.to_owned(),
        enabled: true,
        disabled_reason: None,
        drain: None,
        inventory: None,
        joined_at: now,
        key_digest: key_digest.to_owned(),
    };
    let used = JoinToken { used_by: Some(host), ..known.clone() };
    Ok((vec![record.into(), used.into()], host))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::now;
    use godwit_protocol::quic::Identity;

    fn ca() -> Ca {
        let (pem, key) = Ca::create(now()).unwrap();
        Ca::from_pem(pem, &key).unwrap()
    }

    fn csr(name: &str) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let request = CertificateParams::new(vec![name.to_owned()]).unwrap().serialize_request(&key).unwrap();
        (request.pem().unwrap(), key)
    }

    #[test]
    fn a_host_gets_the_name_that_is_its_own_whatever_it_asks_for() {
        let (ca, host) = (ca(), HostId::random());
        let (request, key) = csr("coordinator.godwit");
        let signed = ca.sign_host(host, &request, now()).unwrap();
        let der = CertificateDer::from_pem_slice(signed.certificate.as_bytes()).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        let sans = parsed.subject_alternative_name().unwrap().unwrap().value.general_names.clone();
        assert_eq!(sans, [GeneralName::DNSName(&host_name(host))]);
        assert!(!parsed.is_ca());
        assert_eq!(Some(signed.key_digest), crate::agents::key_digest(&der));
        let identity = Identity::from_pem(&signed.certificate, &key.serialize_pem(), ca.pem()).unwrap();
        identity.quic_client().unwrap();
    }

    #[test]
    fn a_request_changed_after_it_was_signed_is_refused() {
        let (request, _) = csr("a");
        let mut der = pem_bytes(&request);
        let middle = der.len() / 2;
        der[middle] ^= 1;
        let text = base64::engine::general_purpose::STANDARD.encode(&der);
        let pem = format!("-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n");
        for bad in [pem.as_str(), "", "-----BEGIN CERTIFICATE REQUEST-----"] {
            assert!(matches!(ca().sign_host(HostId::random(), bad, now()), Err(Error::Invalid(_))));
        }
    }

    fn pem_bytes(pem: &str) -> Vec<u8> {
        let text: String = pem.lines().filter(|line| !line.starts_with("---")).collect();
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    }

    #[test]
    fn the_coordinators_certificate_serves_its_addresses_until_it_ends_soon() {
        let (ca, now) = (ca(), now());
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let (pem, key) =
            ca.sign_coordinator(&names(&["198.18.0.1", "cloud.example", "0.0.0.0"]), now).unwrap();
        Identity::from_pem(&pem, &key, ca.pem()).unwrap().quic_server().unwrap();
        assert!(serves(&pem, &names(&["198.18.0.1", "cloud.example", COORDINATOR_NAME, "::1"]), now));
        assert!(!serves(&pem, &names(&["198.18.0.2"]), now));
        assert!(!serves(&pem, &[], now + LEAF_LIFE - RENEW_BEFORE + CLOCK_SKEW));
        assert!(!serves("", &[], now));
    }

    /// A fleet with one join token, and the token.
    fn fleet(ca: &Ca) -> (Fleet, String) {
        let (token, record) = ca.join_token(now(), JOIN_TOKEN_LIFE).unwrap();
        let mut fleet = Fleet::default();
        fleet.apply(record.into());
        (fleet, token)
    }

    #[test]
    fn a_join_token_serves_one_host_once_and_not_for_ever() {
        let ca = ca();
        let (mut fleet, token) = fleet(&ca);
        assert!(token.ends_with(&hex::encode(Sha256::digest(pem_bytes(ca.pem())))));
        let host = HostId::random();
        let later = now() + JOIN_TOKEN_LIFE;
        assert!(matches!(join(&fleet, &token, host, "h1", "", later), Err(JoinError::Expired)));
        assert!(matches!(join(&fleet, "gw1.a.b", host, "h1", "", now()), Err(JoinError::Unknown)));
        assert!(matches!(join(&fleet, &token, host, "h 1", "", now()), Err(JoinError::BadName(_))));
        let (changes, joined) = join(&fleet, &token, host, "h1", "key", now()).unwrap();
        changes.into_iter().for_each(|change| fleet.apply(change));
        assert_eq!((joined, fleet.hosts[&host].key_digest.as_str()), (host, "key"));
        assert!(matches!(join(&fleet, &token, HostId::random(), "h2", "", now()), Err(JoinError::Used)));
    }

    #[test]
    fn a_taken_name_is_refused_and_leaves_the_token_unused() {
        let ca = ca();
        let (mut fleet, token) = fleet(&ca);
        let (changes, _) = join(&fleet, &token, HostId::random(), "h1", "", now()).unwrap();
        changes.into_iter().for_each(|change| fleet.apply(change));
        let (token, record) = ca.join_token(now(), JOIN_TOKEN_LIFE).unwrap();
        fleet.apply(record.into());
        assert!(matches!(
            join(&fleet, &token, HostId::random(), "h1", "", now()),
            Err(JoinError::NameTaken(_))
        ));
        assert!(join(&fleet, &token, HostId::random(), "h2", "", now()).is_ok());
    }
}
