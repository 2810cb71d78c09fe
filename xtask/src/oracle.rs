//! `cargo xtask oracle`: answers placement and topology questions with Godwit's own code, stdin to stdout.

use std::path::PathBuf;

use clap::Subcommand;

use crate::command::{self, CommandError};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    question: Question,
}

#[derive(Subcommand)]
enum Question {
    /// Answer placement cases: `{"cases": […]}` on stdin, `{"results": […]}` on stdout
    Placement,
    /// Describe the cells and CPUs of the machine whose tree lies in a folder
    Topology {
        /// Folder that holds the machine's sys/ and proc/
        #[arg(long, value_name = "DIR")]
        sysfs_root: PathBuf,
    },
}

/// Builds the program that imports the daemons' crates, which this one does not, and runs it.
pub(crate) fn run(arguments: &Arguments) -> Result<(), CommandError> {
    let mut oracle = command::cargo();
    oracle.args([
        "run",
        "--quiet",
        "--package",
        "godwit-tests",
        "--features",
        "oracle",
        "--bin",
        "oracle",
        "--",
    ]);
    match &arguments.question {
        Question::Placement => oracle.arg("placement"),
        Question::Topology { sysfs_root } => {
            // Cargo runs in the workspace's folder, the user elsewhere.
            let root = std::path::absolute(sysfs_root).unwrap_or_else(|_| sysfs_root.clone());
            oracle.args(["topology", "--sysfs-root"]).arg(root)
        }
    };
    command::run(&mut oracle)
}
