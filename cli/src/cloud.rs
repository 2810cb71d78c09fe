//! Which cloud to talk to, and as whom: clouds.yaml and the OS_* variables, read as OpenStack's own tools do.

use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A cloud, ready to log in to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cloud {
    /// What the values come from, for messages: a cloud in a file, or the environment.
    pub(crate) origin: String,
    /// Identity URL, ends in `/v3`, no slash after it.
    pub(crate) auth_url: String,
    /// The `user` part of a password login, password included.
    user: Value,
    /// The `project` scope.
    project: Value,
    /// Words for the user and project.
    pub(crate) who: String,
    /// A file of certificates in PEM to trust instead of the system's.
    pub(crate) cacert: Option<PathBuf>,
    /// Whether certificates are verified.
    pub(crate) verify: bool,
    /// Only endpoints of this region.
    pub(crate) region: Option<String>,
    /// `public`, `internal` or `admin`.
    pub(crate) interface: String,
}

impl Cloud {
    /// The body of `POST /auth/tokens`.
    pub(crate) fn token_request(&self) -> Value {
        json!({"auth": {
            "identity": {"methods": ["password"], "password": {"user": self.user}},
            "scope": {"project": self.project},
        }})
    }

    /// The operator API's URL: beside the identity service, not in the catalog.
    pub(crate) fn operator_url(&self) -> String {
        let root = self.auth_url.trim_end_matches("/v3").trim_end_matches("/identity");
        format!("{root}/operator/v1")
    }
}

/// What the process's surroundings say; tests make their own.
pub(crate) struct Surroundings<'a> {
    /// A variable's value; an empty one counts as unset.
    pub(crate) variable: &'a dyn Fn(&str) -> Option<String>,
    /// Folders in which clouds.yaml is looked for, first found wins.
    pub(crate) folders: Vec<PathBuf>,
}

impl Surroundings<'_> {
    fn var(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }
}

#[derive(Deserialize)]
struct CloudsFile {
    clouds: BTreeMap<String, Entry>,
}

#[derive(Deserialize, Default)]
struct Entry {
    #[serde(default)]
    auth: Auth,
    auth_type: Option<String>,
    cacert: Option<String>,
    verify: Option<bool>,
    region_name: Option<String>,
    interface: Option<String>,
}

#[derive(Deserialize, Default)]
struct Auth {
    auth_url: Option<String>,
    username: Option<String>,
    user_id: Option<String>,
    password: Option<String>,
    #[serde(alias = "tenant_name")]
    project_name: Option<String>,
    #[serde(alias = "tenant_id")]
    project_id: Option<String>,
    user_domain_name: Option<String>,
    user_domain_id: Option<String>,
    project_domain_name: Option<String>,
    project_domain_id: Option<String>,
}

/// Chooses the cloud: the one asked for (`--os-cloud`, `OS_CLOUD`), else the OS_* variables, else the only
/// one in the first clouds.yaml found.
///
/// # Errors
/// [`Error::Cloud`], which says where was looked and what is missing.
pub(crate) fn choose(wanted: Option<&str>, around: &Surroundings<'_>) -> Result<Cloud> {
    let wanted = wanted.map(str::to_owned).or_else(|| around.var("OS_CLOUD"));
    if wanted.is_none() && around.var("OS_AUTH_URL").is_some() {
        return resolve(from_environment(around), "the OS_* variables of the environment".into(), None);
    }
    let Some(path) = find_file(around)? else {
        let looked: Vec<_> = around.folders.iter().map(|folder| folder.display().to_string()).collect();
        return Err(Error::Cloud(format!(
            "no cloud to talk to: there is no clouds.yaml in {} and OS_AUTH_URL is not set.\n\
             Set OS_CLIENT_CONFIG_FILE to the clouds.yaml that `godwit-coordinator init` wrote.",
            looked.join(", ")
        )));
    };
    let mut file = read_file(&path)?;
    let names = file.clouds.keys().cloned().collect::<Vec<_>>().join(", ");
    let name = match wanted {
        Some(name) => name,
        None if file.clouds.len() == 1 => names.clone(),
        None => {
            return Err(Error::Cloud(format!(
                "{} describes several clouds or none ({names}): choose one with --os-cloud or OS_CLOUD",
                path.display()
            )));
        }
    };
    let Some(mut entry) = file.clouds.remove(&name) else {
        return Err(Error::Cloud(format!("{} has no cloud '{name}'; it has: {names}", path.display())));
    };
    // A file without the secret, which is then given at hand, is a common and good habit.
    entry.auth.password = entry.auth.password.or_else(|| around.var("OS_PASSWORD"));
    entry.cacert = entry.cacert.or_else(|| around.var("OS_CACERT"));
    let home = around.var("HOME");
    resolve(entry, format!("cloud '{name}' in {}", path.display()), home.as_deref())
}

fn find_file(around: &Surroundings<'_>) -> Result<Option<PathBuf>> {
    if let Some(path) = around.var("OS_CLIENT_CONFIG_FILE") {
        let path = PathBuf::from(path);
        // Taking another file silently could act on another cloud.
        return if path.is_file() {
            Ok(Some(path))
        } else {
            Err(Error::Cloud(format!("OS_CLIENT_CONFIG_FILE names {}, which is no file", path.display())))
        };
    }
    let names = ["clouds.yaml", "clouds.yml"];
    let candidates = around.folders.iter().flat_map(|folder| names.map(|name| folder.join(name)));
    Ok(candidates.into_iter().find(|path| path.is_file()))
}

fn read_file(path: &Path) -> Result<CloudsFile> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::Cloud(format!("cannot read {}: {error}", path.display())))?;
    serde_yaml_ng::from_str(&text)
        .map_err(|error| Error::Cloud(format!("{} is not a clouds.yaml: {error}", path.display())))
}

fn from_environment(around: &Surroundings<'_>) -> Entry {
    let var = |name: &str| around.var(name);
    Entry {
        auth: Auth {
            auth_url: var("OS_AUTH_URL"),
            username: var("OS_USERNAME"),
            user_id: var("OS_USER_ID"),
            password: var("OS_PASSWORD"),
            project_name: var("OS_PROJECT_NAME").or_else(|| var("OS_TENANT_NAME")),
            project_id: var("OS_PROJECT_ID"),
            user_domain_name: var("OS_USER_DOMAIN_NAME"),
            user_domain_id: var("OS_USER_DOMAIN_ID"),
            project_domain_name: var("OS_PROJECT_DOMAIN_NAME"),
            project_domain_id: var("OS_PROJECT_DOMAIN_ID"),
        },
        auth_type: var("OS_AUTH_TYPE"),
        cacert: var("OS_CACERT"),
        verify: None,
        region_name: var("OS_REGION_NAME"),
        interface: var("OS_INTERFACE"),
    }
}

fn resolve(entry: Entry, origin: String, home: Option<&str>) -> Result<Cloud> {
    let Entry { auth, .. } = entry;
    let missing = |key: &str| Error::Cloud(format!("{origin}: {key} is missing"));
    if let Some(kind) = entry.auth_type.filter(|kind| !matches!(kind.as_str(), "password" | "v3password")) {
        return Err(Error::Cloud(format!("{origin}: auth_type '{kind}' is not supported, only password")));
    }
    let url = auth.auth_url.ok_or_else(|| missing("auth_url"))?;
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(Error::Cloud(format!(
            "{origin}: auth_url '{url}' starts with neither http:// nor https://"
        )));
    }
    let url = url.trim_end_matches('/');
    let auth_url = if url.ends_with("/v3") { url.to_owned() } else { format!("{url}/v3") };
    let password = auth.password.ok_or_else(|| missing("password"))?;
    let user_domain = domain(auth.user_domain_id, auth.user_domain_name);
    let project_domain = domain(auth.project_domain_id, auth.project_domain_name);
    let (user, user_words) = match (auth.user_id, auth.username) {
        (Some(id), _) => (json!({"id": id, "password": password}), format!("user {id}")),
        (None, Some(name)) => {
            (json!({"name": name, "domain": user_domain, "password": password}), format!("user '{name}'"))
        }
        (None, None) => return Err(missing("username")),
    };
    let (project, project_words) = match (auth.project_id, auth.project_name) {
        (Some(id), _) => (json!({"id": id}), format!("project {id}")),
        (None, Some(name)) => (json!({"name": name, "domain": project_domain}), format!("project '{name}'")),
        (None, None) => return Err(missing("project_name")),
    };
    let cacert = entry.cacert.map(|path| match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => Path::new(home).join(rest),
        _ => PathBuf::from(path),
    });
    Ok(Cloud {
        who: format!("{user_words} of {project_words}"),
        origin,
        auth_url,
        user,
        project,
        cacert,
        verify: entry.verify.unwrap_or(true),
        region: entry.region_name,
        // "publicURL" is the old spelling.
        interface: entry
            .interface
            .map_or("public".into(), |interface| interface.trim_end_matches("URL").to_owned()),
    })
}

fn domain(id: Option<String>, name: Option<String>) -> Value {
    match (id, name) {
        (Some(id), _) => json!({"id": id}),
        (None, Some(name)) => json!({"name": name}),
        (None, None) => json!({"id": "default"}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "clouds:\n  godwit:\n    auth:\n      auth_url: https://198.18.0.1:8774/identity/v3\n      \
        username: admin\n      password: secret\n      project_name: admin\n      user_domain_name: Default\n      \
        project_domain_id: default\n    region_name: RegionOne\n    cacert: ~/ca.pem\n";

    struct Place(tempfile::TempDir);

    impl Place {
        fn new(content: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("clouds.yaml"), content).unwrap();
            Place(folder)
        }

        fn choose(&self, wanted: Option<&str>, variables: &[(&str, &str)]) -> Result<Cloud> {
            let variables: BTreeMap<_, _> = variables.iter().copied().collect();
            let variable = |name: &str| variables.get(name).map(|value| value.to_string());
            choose(wanted, &Surroundings { variable: &variable, folders: vec![self.0.path().to_owned()] })
        }
    }

    #[test]
    fn the_only_cloud_of_the_file_is_used() {
        let cloud = Place::new(FILE).choose(None, &[("HOME", "/home/u")]).unwrap();
        assert_eq!(cloud.auth_url, "https://198.18.0.1:8774/identity/v3");
        assert_eq!(cloud.operator_url(), "https://198.18.0.1:8774/operator/v1");
        assert_eq!(cloud.cacert, Some(PathBuf::from("/home/u/ca.pem")));
        assert_eq!(cloud.region.as_deref(), Some("RegionOne"));
        assert_eq!(cloud.interface, "public");
        let request = cloud.token_request();
        assert_eq!(
            request["auth"]["identity"]["password"]["user"],
            json!({"name": "admin", "domain": {"name": "Default"}, "password": "secret"})
        );
        assert_eq!(
            request["auth"]["scope"],
            json!({"project": {"name": "admin", "domain": {"id": "default"}}})
        );
    }

    #[test]
    fn one_of_several_clouds_must_be_chosen() {
        let two = format!(
            "{FILE}  other: {{auth: {{auth_url: 'http://o/identity', username: u, password: p, project_name: q}}}}\n"
        );
        let place = Place::new(&two);
        let message = place.choose(None, &[]).unwrap_err().to_string();
        assert!(message.contains("godwit, other") && message.contains("OS_CLOUD"), "{message}");
        assert_eq!(place.choose(None, &[("OS_CLOUD", "other")]).unwrap().auth_url, "http://o/identity/v3");
        assert_eq!(
            place.choose(Some("other"), &[("OS_CLOUD", "godwit")]).unwrap().auth_url,
            "http://o/identity/v3"
        );
        assert!(place.choose(Some("absent"), &[]).unwrap_err().to_string().contains("no cloud 'absent'"));
    }

    #[test]
    fn the_environment_alone_is_enough() {
        let variables = [
            ("OS_AUTH_URL", "http://127.0.0.1:1/identity/v3/"),
            ("OS_USERNAME", "u"),
            ("OS_PASSWORD", "p"),
            ("OS_PROJECT_NAME", "q"),
            ("OS_CACERT", "/ca.pem"),
        ];
        let cloud = Place::new(FILE).choose(None, &variables).unwrap();
        assert_eq!(cloud.auth_url, "http://127.0.0.1:1/identity/v3");
        assert_eq!(cloud.who, "user 'u' of project 'q'");
        assert_eq!(cloud.cacert, Some(PathBuf::from("/ca.pem")));
        let named = Place::new(FILE).choose(Some("godwit"), &variables).unwrap();
        assert_eq!(named.auth_url, "https://198.18.0.1:8774/identity/v3", "a named cloud is of the file");
    }

    #[test]
    fn what_is_missing_is_named_with_its_file() {
        let place = Place::new("clouds: {godwit: {auth: {auth_url: 'http://x', username: u}}}");
        let message = place.choose(None, &[]).unwrap_err().to_string();
        assert!(message.contains("clouds.yaml") && message.contains("password is missing"), "{message}");
        let message = Place::new("clouds: [").choose(None, &[]).unwrap_err().to_string();
        assert!(message.contains("is not a clouds.yaml"), "{message}");
        let message =
            place.choose(None, &[("OS_CLIENT_CONFIG_FILE", "/nowhere.yaml")]).unwrap_err().to_string();
        assert!(message.contains("/nowhere.yaml"), "{message}");
    }

    #[test]
    fn another_kind_of_login_is_refused_by_name() {
        let text = FILE.replace("    region_name", "    auth_type: v3token\n    region_name");
        assert!(Place::new(&text).choose(None, &[]).unwrap_err().to_string().contains("v3token"));
    }
}
