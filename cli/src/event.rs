//! `godwit event`: what hosts saw that should not be.

use crate::App;
use crate::error::Result;
use crate::output::{Column, cell};
use crate::resource::EVENT;
use clap::{Subcommand, ValueEnum};

/// What can be done with events.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List events, the newest last
    List {
        /// Only those of this host, by id or name
        #[arg(long)]
        host: Option<String>,
        /// Only those of this kind
        #[arg(long)]
        kind: Option<Kind>,
        /// Only those in the network with this number
        #[arg(long)]
        vni: Option<u32>,
        /// At most so many, the newest
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
}

/// What happened.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    /// Two stations claim one address
    Conflict,
    /// A guest sent from what is not its own
    Spoof,
    /// A host sent to where a guest no longer is
    Stale,
    /// A host sent for a network that is not there
    #[value(name = "unknown_vni")]
    UnknownVni,
    /// A pool's server does not answer any more
    #[value(name = "pool_stalled")]
    PoolStalled,
    /// A pool that stood still answers again
    #[value(name = "pool_back")]
    PoolBack,
    /// An image's data on the pool is not what was uploaded
    #[value(name = "image_damaged")]
    ImageDamaged,
}

const COLUMNS: &[Column] = &[
    ("at", |event| cell(&event["at"])),
    ("host", |event| cell(&event["host"])),
    ("kind", |event| cell(&event["kind"])),
    ("reason", |event| cell(&event["reason"])),
    ("pool", |event| cell(&event["pool"])),
    ("vni", |event| cell(&event["vni"])),
    ("port", |event| cell(&event["port"])),
    ("mac", |event| cell(&event["mac"])),
    ("address", |event| cell(&event["address"])),
    ("owner", |event| cell(&event["owner"])),
    ("peer", |event| cell(&event["peer"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        let Self::List { host, kind, vni, limit } = self;
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &limit.to_string());
        if let Some(host) = host {
            query.append_pair("host", &host);
        }
        if let Some(kind) = kind.and_then(|kind| kind.to_possible_value()) {
            query.append_pair("kind", kind.get_name());
        }
        if let Some(vni) = vni {
            query.append_pair("vni", &vni.to_string());
        }
        let mut events = EVENT.list(&app.session, &query.finish())?;
        events.reverse();
        app.output.list(&events, COLUMNS, "at")
    }
}
