//! What the coordinator counts.
