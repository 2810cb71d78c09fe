//! `godwit keypair`: SSH public keys put into servers. A keypair has a name and no id.

use crate::App;
use crate::error::{Error, Result};
use crate::http::encode;
use crate::output::{Column, cell};
use crate::session::Service;
use clap::Subcommand;
use serde_json::{Value, json};
use std::path::PathBuf;

/// What can be done with keypairs.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Register a public key
    Create {
        /// The keypair's name
        name: String,
        /// The file with the public key, such as ~/.ssh/id_ed25519.pub
        #[arg(long, value_name = "FILE")]
        public_key: PathBuf,
    },
    /// List keypairs
    List,
    /// Delete keypairs; servers keep the keys they have
    Delete {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

const COLUMNS: &[Column] = &[
    ("name", |keypair| cell(&keypair["name"])),
    ("type", |keypair| cell(&keypair["type"])),
    ("fingerprint", |keypair| cell(&keypair["fingerprint"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create { name, public_key } => {
                let text = std::fs::read_to_string(&public_key).map_err(Error::file(&public_key))?;
                if text.contains("PRIVATE KEY") {
                    let path = public_key.display();
                    return Err(Error::Usage(format!(
                        "{path} is a private key; give the .pub file beside it"
                    )));
                }
                let body = json!({"keypair": {"name": name, "public_key": text.trim_end()}});
                let mut answer = app.session.post(Service::Compute, "/os-keypairs", &body)?;
                app.output.object(&answer["keypair"].take(), COLUMNS, "name")
            }
            Command::List => {
                let mut answer = app.session.get(Service::Compute, "/os-keypairs")?;
                let keypairs = answer["keypairs"].as_array_mut().into_iter().flatten();
                let keypairs: Vec<Value> = keypairs.map(|wrapped| wrapped["keypair"].take()).collect();
                app.output.list(&keypairs, COLUMNS, "name")
            }
            Command::Delete { names } => {
                for name in &names {
                    let path = format!("/os-keypairs/{}", encode(name));
                    app.session.delete(Service::Compute, &path).map_err(|error| {
                        let missing = Error::NotFound { noun: "keypair", name: name.clone() };
                        if error.is_not_found() { missing } else { error }
                    })?;
                }
                let deleted: Vec<Value> = names.into_iter().map(|name| json!({"id": name})).collect();
                app.output.done("deleted keypair", &deleted)
            }
        }
    }
}
