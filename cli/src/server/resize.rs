//! `godwit server resize`: another flavor, and the decision whether it stays.

use super::{ROWS, Waiting, act, reason, title};
use crate::App;
use crate::error::{Error, Result};
use crate::migration;
use crate::output::cell;
use crate::resource::{FLAVOR, SERVER, id};
use crate::session::Service;
use crate::wait::{Look, Wait};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

/// Which server becomes what.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Resize {
    #[command(subcommand)]
    decision: Option<Decision>,
    /// Id or name
    #[arg(required = true)]
    server: Option<String>,
    /// The flavor that it gets; its disk must not be smaller
    #[arg(long, required = true)]
    flavor: Option<String>,
    #[command(flatten)]
    waiting: Waiting,
}

/// What becomes of a server that was resized or migrated cold.
#[derive(Subcommand)]
enum Decision {
    /// It stays as it is; what it had before is let go of
    Confirm {
        /// Id or name
        server: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// It becomes what it was before, where it was; a disk that was made larger is put back with what was on it
    Revert {
        /// Id or name
        server: String,
        #[command(flatten)]
        waiting: Waiting,
    },
}

/// How a server rests after a decision: as it ran before, or did not.
const DECIDED: &[&str] = &["ACTIVE", "SHUTOFF", "PAUSED"];

impl Resize {
    /// Does it and, if asked, waits for its end.
    pub(super) fn run(self, app: &App) -> Result<()> {
        match self.decision {
            Some(Decision::Confirm { server, waiting }) => {
                act(app, &server, &json!({"confirmResize": null}), DECIDED, "confirming", &waiting)
            }
            Some(Decision::Revert { server, waiting }) => {
                act(app, &server, &json!({"revertResize": null}), DECIDED, "reverting", &waiting)
            }
            None => {
                let server = SERVER.find(&app.session, &self.server.unwrap_or_default())?;
                let flavor = FLAVOR.find_id(&app.session, &self.flavor.unwrap_or_default())?;
                let action = json!({"resize": {"flavorRef": flavor}});
                change(app, &server, &action, "resizing", &self.waiting)
            }
        }
    }
}

/// Starts what leaves a server to be confirmed or reverted and, if asked, waits until it is that.
pub(super) fn change(
    app: &App,
    server: &Value,
    action: &Value,
    doing: &str,
    waiting: &Waiting,
) -> Result<()> {
    let server_id = id(server)?;
    app.session.post(Service::Compute, &format!("/servers/{server_id}/action"), action)?;
    if !waiting.wait {
        return app.output.done(&format!("{doing} server"), std::slice::from_ref(server));
    }
    let what = format!("server {} waits to be confirmed or reverted", title(server));
    let bar = app.progress.spinner(&format!("{doing} {}", title(server)));
    let look = format!("godwit server show {server_id}");
    let server = Wait { what: &what, look, timeout: waiting.timeout() }.run(&bar, || {
        let server = SERVER.get(&app.session, &server_id)?;
        match server["OS-EXT-STS:task_state"].is_null() {
            true => Ok(Look::Done(server)),
            false => Ok(Look::Not(super::state(&server))),
        }
    })?;
    if server["status"] == "VERIFY_RESIZE" {
        return app.output.object(&server, ROWS, "id");
    }
    let record =
        migration::newest(app, &server_id).ok().flatten().map(|newest| migration::record(app, &newest));
    Err(Error::Failed(format!(
        "{doing} {} failed, it is {} as before: {}",
        title(&server),
        cell(&server["status"]),
        reason(record.as_ref(), &server, &server_id),
    )))
}
