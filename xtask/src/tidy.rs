//! `cargo xtask tidy`.

/// `cargo xtask tidy`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {}

/// What is untidy.
#[derive(Debug, thiserror::Error)]
#[error("untidy")]
pub(crate) struct TidyError;

pub(crate) fn run(_: &Arguments) -> Result<(), TidyError> {
    Ok(())
}
