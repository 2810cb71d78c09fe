//! Word from the kernel that links have come or gone.

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// After so long without a word the links are looked at anyway.
const PATIENCE: Duration = Duration::from_secs(5);

/// Calls `changed` whenever links have come, gone or changed, for as long as it is awaited. Many changes at once are
/// one call, which may block.
///
/// # Errors
/// The kernel offers no netlink socket, or ends it.
pub async fn links(changed: Arc<dyn Fn() + Send + Sync>) -> io::Result<()> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind(&SocketAddr::new(0, libc::RTMGRP_LINK as u32))?;
    loop {
        let call = changed.clone();
        if tokio::task::spawn_blocking(move || call()).await.is_err() {
            tracing::error!("the links were not looked at");
        }
        if let Ok(heard) = timeout(PATIENCE, hear(&socket)).await {
            heard?;
        }
        while let Ok(heard) = timeout(Duration::ZERO, hear(&socket)).await {
            heard?;
        }
    }
}

/// Waits for a message. What it says does not matter: everything is read anew.
async fn hear(socket: &TokioSocket) -> io::Result<()> {
    // What has no room is cut off.
    match socket.recv(&mut Vec::with_capacity(1)).await {
        // Messages were dropped, because this reader was late: a word like any other.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        heard => heard.map(drop),
    }
}
