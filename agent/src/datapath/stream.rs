//! Migration streams: relayed between unix sockets and TLS.
