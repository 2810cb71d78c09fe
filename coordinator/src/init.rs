//! A new installation.
