//! What happens around the programs: real packets, restarts, links that come and go.
