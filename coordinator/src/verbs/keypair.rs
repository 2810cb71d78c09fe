//! Making and removing key pairs. A public key is checked before it is taken; a new pair is Ed25519, and its
//! private half is given away once and kept nowhere.

use super::{Decision, check_text};
use crate::error::Error;
use crate::fleet::identity::KeyPair;
use crate::fleet::{Change, Fleet, Time};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use godwit_protocol::id::UserId;
use md5::{Digest, Md5};
use ring::signature::{Ed25519KeyPair, KeyPair as _};

/// Kinds of keys that sshd takes.
const KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// Longest public key, in bytes; RSA of 16384 bits has 2.8 kB.
const MAX_KEY: usize = 16 << 10;

/// Takes a user's public key.
///
/// # Errors
/// A name that is taken or empty; what is no public SSH key.
pub fn create(fleet: &Fleet, user: UserId, name: String, public_key: &str, now: Time) -> Decision<KeyPair> {
    check_text("key pair's name", &name)?;
    if name.is_empty() || name.trim() != name || name.chars().any(char::is_control) || name.contains('/') {
        return Err(Error::Invalid(
            "The key pair's name must have printable characters, no slash, and no space at its ends.".into(),
        ));
    }
    let fingerprint = fingerprint(public_key)?;
    if fleet.keypairs.contains_key(&KeyPair::key_for(user, &name)) {
        return Err(Error::Conflict(format!("Key pair '{name}' already exists.")));
    }
    let public_key = public_key.trim().to_owned();
    let pair = KeyPair { user, name, public_key, fingerprint, created_at: now };
    Ok((vec![pair.clone().into()], pair))
}

/// Removes a user's key pair. Instances keep their copies.
///
/// # Errors
/// There is none of that name.
pub fn delete(fleet: &Fleet, user: UserId, name: &str) -> Decision<()> {
    Ok((vec![Change::gone(find(fleet, user, name)?)], ()))
}

/// A user's key pair.
///
/// # Errors
/// There is none of that name.
pub fn find<'a>(fleet: &'a Fleet, user: UserId, name: &str) -> Result<&'a KeyPair, Error> {
    fleet.keypairs.get(&KeyPair::key_for(user, name)).ok_or_else(|| Error::not_found("Keypair", name))
}

/// MD5 of a public key with colons, as clients know keys by.
fn fingerprint(line: &str) -> Result<String, Error> {
    let bad = |why: &str| Err(Error::Invalid(format!("Keypair data is invalid: {why}.")));
    let line = line.trim();
    if line.len() > MAX_KEY {
        return bad("it is too long for a public key");
    }
    if line.starts_with("-----BEGIN") {
        return bad("it is no public key of OpenSSH's form; give the .pub file");
    }
    if line.contains(['\n', '\r', '\0']) {
        return bad("a public key is one line");
    }
    let mut words = line.split_ascii_whitespace();
    let (kind, text) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !KINDS.contains(&kind) {
        return bad("it starts with no kind of key that sshd takes, such as ssh-ed25519");
    }
    let Ok(blob) = STANDARD.decode(text) else { return bad("its second word is not base64") };
    // RFC 4253, 6.6: the blob starts with the kind again, its length before it.
    let (length, rest) = blob.split_at_checked(4).unwrap_or((&[], &[]));
    if length != (kind.len() as u32).to_be_bytes()
        || !rest.starts_with(kind.as_bytes())
        || rest.len() <= kind.len()
    {
        return bad("its text does not match its kind");
    }
    let digest: Vec<String> = Md5::digest(&blob).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(digest.join(":"))
}

/// A new Ed25519 pair: the private key as OpenSSH's file, and the public line.
///
/// # Errors
/// When the system gives no random bytes.
pub fn generate() -> Result<(String, String), Error> {
    let no_luck = || Error::Unavailable("The system gives no random bytes.".into());
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|_| no_luck())?;
    let check = getrandom::u32().map_err(|_| no_luck())?;
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| no_luck())?;
    let public = pair.public_key().as_ref();
    Ok((private_file(&seed, public, check), format!("{} {}", KINDS[0], STANDARD.encode(public_blob(public)))))
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_be_bytes());
    out.extend(bytes);
}

fn public_blob(public: &[u8]) -> Vec<u8> {
    let mut blob = Vec::new();
    put(&mut blob, KINDS[0].as_bytes());
    put(&mut blob, public);
    blob
}

/// OpenSSH's PROTOCOL.key, without a passphrase.
fn private_file(seed: &[u8; 32], public: &[u8], check: u32) -> String {
    let mut private = Vec::new();
    private.extend(check.to_be_bytes());
    private.extend(check.to_be_bytes());
    put(&mut private, KINDS[0].as_bytes());
    put(&mut private, public);
    put(&mut private, &[seed.as_slice(), public].concat());
    put(&mut private, b"");
    // Padded with 1, 2, 3, … to the cipher's block, which is 8 bytes for none.
    private.extend((1..=8).take((8 - private.len() % 8) % 8));
    let mut file = b"openssh-key-v1\0".to_vec();
    put(&mut file, b"none");
    put(&mut file, b"none");
    put(&mut file, b"");
    file.extend(1_u32.to_be_bytes());
    put(&mut file, &public_blob(public));
    put(&mut file, &private);
    let text = STANDARD.encode(file);
    let lines: Vec<&str> = text.as_bytes().chunks(70).filter_map(|c| std::str::from_utf8(c).ok()).collect();
    format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLIC: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGHCUe3+PxTFkvrOJzMe/eD3gHZb+TYj8KXSPuc+M5IN a@b";

    #[test]
    fn a_public_key_has_openssh_s_fingerprint() {
        let (_, pair) =
            create(&Fleet::default(), UserId::random(), "k".into(), &format!("{PUBLIC}\n"), Time::UNIX_EPOCH)
                .unwrap();
        assert_eq!(pair.public_key, PUBLIC);
        assert_eq!(pair.fingerprint, "b8:da:77:85:82:90:3e:4b:e6:33:67:46:21:9e:cc:c6");
    }

    #[test]
    fn what_is_no_public_key_is_refused() {
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 !!!",
            "ssh-ed25519 AAAA",
            "ssh-rsa AAAAC3NzaC1lZDI1NTE5AAAAIGHCUe3+PxTFkvrOJzMe/eD3gHZb+TYj8KXSPuc+M5IN",
            "ssh-dss AAAAB3NzaC1kc3MAAAAA",
            "-----BEGIN OPENSSH PRIVATE KEY-----",
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGHCUe3+PxTFkvrOJzMe/eD3gHZb+TYj8KXSPuc+M5IN a\nssh-rsa x",
        ] {
            assert!(matches!(fingerprint(bad), Err(Error::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn a_name_is_unique_for_its_user_only() {
        let (mut fleet, ada, bob) = (Fleet::default(), UserId::random(), UserId::random());
        let make = |fleet: &Fleet, user| create(fleet, user, "k".into(), PUBLIC, Time::UNIX_EPOCH);
        let (changes, _) = make(&fleet, ada).unwrap();
        changes.into_iter().for_each(|c| fleet.apply(c));
        assert!(matches!(make(&fleet, ada), Err(Error::Conflict(_))));
        assert!(make(&fleet, bob).is_ok());
        assert!(delete(&fleet, bob, "k").is_err());
    }

    #[test]
    fn a_new_pair_is_a_key_that_its_own_check_takes_and_never_the_same() {
        let (private, public) = generate().unwrap();
        assert!(fingerprint(&public).is_ok());
        assert_ne!(generate().unwrap().1, public);
        let body: String = private.lines().filter(|l| !l.starts_with('-')).collect();
        let file = STANDARD.decode(body).unwrap();
        assert!(file.starts_with(b"openssh-key-v1\0"));
        let key = STANDARD.decode(public.split(' ').nth(1).unwrap()).unwrap();
        let copies = file.windows(key.len()).filter(|w| *w == key).count();
        assert_eq!(copies, 2, "outside and in the private part");
        assert_eq!(
            (file.len() - 15 - 2 * 8 - 4 - 4 - 4 - key.len() - 4) % 8,
            0,
            "the private part is padded"
        );
    }
}
