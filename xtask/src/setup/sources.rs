//! Apt's sources: adds the backports suite of this machine's own mirror.
//!
//! The mirror is never named here: the source that offers the release is repeated with its suite renamed,
//! so that whatever this machine is configured to use is what is used.

use std::path::{Path, PathBuf};

use super::SetupError;

const OURS: &str = "/etc/apt/sources.list.d/godwit-backports";

/// Makes the backports of `codename` known to apt, unless another source offers them already.
pub(crate) fn ensure_backports(codename: &str) -> Result<(), SetupError> {
    let suite = format!("{codename}-backports");
    let mut derived = None;
    for path in source_files()? {
        if path.to_string_lossy().starts_with(OURS) {
            continue;
        }
        let text = read(&path)?;
        let format = Format::of(&path);
        if !format.with_suite(&text, &suite, &suite).is_empty() {
            return Ok(());
        }
        let renamed = format.with_suite(&text, codename, &suite);
        if derived.is_none() && !renamed.is_empty() {
            derived = Some((format, renamed));
        }
    }
    let (format, text) = derived.ok_or_else(|| SetupError::NoSource { suite: codename.to_owned() })?;
    let path = PathBuf::from(format!("{OURS}.{}", format.extension()));
    if read(&path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    println!("setup: adding {suite} to apt's sources ({})", path.display());
    std::fs::write(&path, text).map_err(|source| error(&path, source))
}

fn source_files() -> Result<Vec<PathBuf>, SetupError> {
    let folder = Path::new("/etc/apt/sources.list.d");
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if folder.is_dir() {
        for entry in std::fs::read_dir(folder).map_err(|source| error(folder, source))? {
            files.push(entry.map_err(|source| error(folder, source))?.path());
        }
    }
    files.retain(|path| {
        path.is_file()
            && path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
    });
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String, SetupError> {
    std::fs::read_to_string(path).map_err(|source| error(path, source))
}

fn error(path: &Path, source: std::io::Error) -> SetupError {
    SetupError::Sources { path: path.display().to_string(), source }
}

/// The two ways apt's sources are written (sources.list(5)).
#[derive(Clone, Copy)]
enum Format {
    /// One line a source.
    Lines,
    /// Paragraphs of fields.
    Deb822,
}

impl Format {
    fn of(path: &Path) -> Format {
        if path.extension().is_some_and(|extension| extension == "sources") {
            Format::Deb822
        } else {
            Format::Lines
        }
    }

    fn extension(self) -> &'static str {
        match self {
            Format::Lines => "list",
            Format::Deb822 => "sources",
        }
    }

    /// The enabled binary sources in `text` that offer exactly `suite`, repeated with the suite `renamed`.
    fn with_suite(self, text: &str, suite: &str, renamed: &str) -> String {
        match self {
            Format::Lines => lines_with_suite(text, suite, renamed),
            Format::Deb822 => paragraphs_with_suite(text, suite, renamed),
        }
    }
}

fn lines_with_suite(text: &str, suite: &str, renamed: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let mut words: Vec<&str> = line.split_whitespace().collect();
        if words.first() != Some(&"deb") {
            continue;
        }
        // `deb [option=value …] uri suite component…`; options may hold spaces within their brackets.
        let options_end = match words.get(1) {
            Some(word) if word.starts_with('[') => words.iter().position(|word| word.ends_with(']')),
            _ => Some(0),
        };
        let Some(at) = options_end.map(|end| end + 2) else { continue };
        if words.get(at) == Some(&suite) {
            words[at] = renamed;
            out.push_str(&words.join(" "));
            out.push('\n');
        }
    }
    out
}

fn paragraphs_with_suite(text: &str, suite: &str, renamed: &str) -> String {
    let uncommented: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let mut out = Vec::new();
    for paragraph in uncommented.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            paragraph.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then_some(value.trim())
            })
        };
        let offers = |name: &str, word: &str| {
            field(name).is_some_and(|value| value.split_whitespace().any(|w| w == word))
        };
        let enabled = !field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if !(enabled && offers("Types", "deb") && offers("Suites", suite)) {
            continue;
        }
        let lines = paragraph.iter().map(|line| match line.split_once(':') {
            Some((key, _)) if key.eq_ignore_ascii_case("Suites") => format!("Suites: {renamed}\n"),
            Some((key, _)) if key.eq_ignore_ascii_case("Types") => "Types: deb\n".to_owned(),
            _ => format!("{line}\n"),
        });
        out.push(lines.collect::<String>());
    }
    out.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paragraph_is_repeated_for_the_release_only() {
        let text = "# mirror\nTypes: deb deb-src\nURIs: http://mirror.invalid/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By:\n -----BEGIN-----\n .\n key: x\n\n\
                    Types: deb\nURIs: http://mirror.invalid/debian-security\nSuites: bookworm-security\nComponents: main\n";
        let backports = paragraphs_with_suite(text, "bookworm", "bookworm-backports");
        assert_eq!(
            backports,
            "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bookworm-backports\nComponents: main\n\
             Signed-By:\n -----BEGIN-----\n .\n key: x\n"
        );
        assert!(paragraphs_with_suite(text, "bookworm-backports", "x").is_empty());
    }

    #[test]
    fn a_disabled_or_source_only_paragraph_is_passed_over() {
        let disabled = "Enabled: no\nTypes: deb\nURIs: http://mirror.invalid/\nSuites: bookworm\n";
        assert!(paragraphs_with_suite(disabled, "bookworm", "x").is_empty());
        let source_only = "Types: deb-src\nURIs: http://mirror.invalid/\nSuites: bookworm\n";
        assert!(paragraphs_with_suite(source_only, "bookworm", "x").is_empty());
    }

    #[test]
    fn one_line_sources_keep_their_options() {
        let text = "#deb http://old.invalid/debian bookworm main\n\
                    deb [ arch=amd64 signed-by=/k.gpg ] http://mirror.invalid/debian bookworm main contrib # x\n\
                    deb http://mirror.invalid/debian bookworm-updates main\n\
                    deb-src http://mirror.invalid/debian bookworm main\n";
        assert_eq!(
            lines_with_suite(text, "bookworm", "bookworm-backports"),
            "deb [ arch=amd64 signed-by=/k.gpg ] http://mirror.invalid/debian bookworm-backports main contrib\n"
        );
        assert_eq!(
            lines_with_suite("deb http://mirror.invalid/ bookworm main\n", "bookworm", "b"),
            "deb http://mirror.invalid/ b main\n"
        );
        assert!(lines_with_suite("deb [unclosed http://x bookworm main\ndeb\n", "bookworm", "b").is_empty());
    }
}
