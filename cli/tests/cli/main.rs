//! The built `godwit` against a service that remembers what it was asked.

mod commands;
mod exit_codes;
mod images;
mod resizes;
mod support;
