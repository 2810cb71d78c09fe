//! Word from the kernel that links have come or gone.

use futures_util::StreamExt;
use rtnetlink::{MulticastGroup, new_multicast_connection};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// After so long without a word the links are looked at anyway: the kernel drops messages to a reader that is late.
const PATIENCE: Duration = Duration::from_secs(5);

/// Calls `changed` whenever links have come, gone or changed, for as long as it is awaited. Many changes at once are
/// one call, which may block.
///
/// # Errors
/// The kernel offers no netlink socket.
pub async fn links(changed: Arc<dyn Fn() + Send + Sync>) -> io::Result<()> {
    let (connection, _handle, mut messages) = new_multicast_connection(&[MulticastGroup::Link])?;
    let mut serving = JoinSet::new();
    serving.spawn(connection);
    loop {
        let call = changed.clone();
        if tokio::task::spawn_blocking(move || call()).await.is_err() {
            tracing::error!("the links were not looked at");
        }
        if let Ok(None) = timeout(PATIENCE, messages.next()).await {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the kernel's messages have ended"));
        }
        while let Ok(Some(_)) = timeout(Duration::ZERO, messages.next()).await {}
    }
}
