//! `godwit server create`.

use super::{ROWS, Waiting, wait_status};
use crate::App;
use crate::error::{Error, Result};
use crate::resource::{FLAVOR, IMAGE, NETWORK, PORT, SECURITY_GROUP, SERVER, id};
use crate::session::Service;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;

/// The compute service's limit for encoded user data.
const USER_DATA_LIMIT_BYTES: usize = 65_535;

/// What the server is to be.
#[derive(Args)]
pub(crate) struct Create {
    /// The server's name
    name: String,
    /// Its size and hardware, by id or name
    #[arg(long)]
    flavor: String,
    /// What its disk starts as, by id or name
    #[arg(long)]
    image: String,
    /// Attach it to this network, by id or name; may be repeated [default: the project's only network]
    #[arg(long)]
    network: Vec<String>,
    /// Attach it by this port, by id or name, after the networks; may be repeated
    #[arg(long)]
    port: Vec<String>,
    /// Attach it to nothing
    #[arg(long, conflicts_with_all = ["network", "port"])]
    no_network: bool,
    /// Let pass at its new ports what this security group allows, by id or name; may be repeated [default: the
    /// project's default group]
    #[arg(long, value_name = "GROUP")]
    security_group: Vec<String>,
    /// Put this keypair into it
    #[arg(long, value_name = "NAME")]
    key_name: Option<String>,
    /// Hand it this file as user data
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Start it on this host and nowhere else
    #[arg(long)]
    host: Option<String>,
    #[command(flatten)]
    waiting: Waiting,
}

impl Create {
    /// Creates the server and, if asked, waits until it runs.
    pub(super) fn run(self, app: &App) -> Result<()> {
        let mut server = json!({
            "name": self.name, "min_count": 1, "max_count": 1,
            "imageRef": IMAGE.find_id(&app.session, &self.image)?,
            "flavorRef": FLAVOR.find_id(&app.session, &self.flavor)?,
            "networks": self.networks(app)?,
        });
        if !self.security_group.is_empty() {
            let find = |group| SECURITY_GROUP.find_id(&app.session, group).map(|id| json!({"name": id}));
            let groups = self.security_group.iter().map(String::as_str).map(find);
            server["security_groups"] = groups.collect::<Result<_>>()?;
        }
        if let Some(key) = &self.key_name {
            server["key_name"] = json!(key);
        }
        if let Some(path) = &self.user_data {
            let data = STANDARD.encode(std::fs::read(path).map_err(Error::file(path))?);
            if data.len() > USER_DATA_LIMIT_BYTES {
                let limit = USER_DATA_LIMIT_BYTES / 4 * 3;
                let path = path.display();
                return Err(Error::Usage(format!(
                    "{path} is too large for user data: the limit is {limit} bytes"
                )));
            }
            server["user_data"] = json!(data);
        }
        if let Some(host) = &self.host {
            server["availability_zone"] = json!(format!("nova:{host}"));
        }
        let answer = app.session.post(Service::Compute, "/servers", &json!({"server": server}))?;
        let id = id(&SERVER.unwrap(answer))?;
        let server = SERVER.get(&app.session, &id)?;
        let server = match self.waiting.wait {
            true => wait_status(app, &server, &["ACTIVE"], "creating", self.waiting.timeout())?,
            false => server,
        };
        app.output.object(&server, ROWS, "id")
    }

    fn networks(&self, app: &App) -> Result<Value> {
        if self.no_network {
            return Ok(json!("none"));
        }
        if self.network.is_empty() && self.port.is_empty() {
            return Ok(json!("auto"));
        }
        let mut attachments = Vec::new();
        for network in &self.network {
            attachments.push(json!({"uuid": NETWORK.find_id(&app.session, network)?}));
        }
        for port in &self.port {
            attachments.push(json!({"port": PORT.find_id(&app.session, port)?}));
        }
        Ok(Value::Array(attachments))
    }
}
