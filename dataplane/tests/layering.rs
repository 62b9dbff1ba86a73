//! The fences inside the crate: which module may use which. It reads `use crate::…` and `crate::…`
//! in every source file, tests at the bottom of a file left out, and names the line that crosses.
//!
//! A rule here is one of style's "edges that must never exist"; change both together.

use std::fs;
use std::path::{Path, PathBuf};

/// Module, and the only modules of ours that it may name. `*` stands for everything.
const ALLOWED: &[(&str, &[&str])] = &[
    ("net", &[]),
    ("time", &[]),
    ("command", &["net"]),
    ("packet", &["net", "packet"]),
    ("snapshot", &["net"]),
    ("steer", &["net"]),
    ("counters", &["snapshot"]),
    ("schedule", &["snapshot", "schedule", "counters", "net"]),
    ("sys", &["sys"]),
    ("waker", &[]),
    ("flow", &["flow", "net", "time", "packet", "steer"]),
    ("flow/store", &["flow", "sys", "net", "time"]),
    (
        "nat",
        &["nat", "flow", "packet", "net", "snapshot", "steer"],
    ),
    ("classify", &["command", "net", "pipeline", "snapshot"]),
    (
        "pipeline",
        &[
            "classify", "command", "counters", "flow", "nat", "net", "packet", "pipeline",
            "schedule", "snapshot", "steer", "time",
        ],
    ),
    ("handover", &["device", "pipeline", "command"]),
    ("device", &["device", "net", "sys", "time", "command"]),
    (
        "steering",
        &["command", "net", "steer", "steering", "sys", "time"],
    ),
];

#[test]
fn modules_use_only_what_their_place_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut crossings = Vec::new();
    for file in rust_files(&root) {
        let inside = file
            .strip_prefix(&root)
            .expect("below src")
            .with_extension("");
        let module = inside.to_string_lossy().replace("/mod", "");
        if module.ends_with("tests") {
            continue;
        }
        let Some((name, allowed)) = rule_of(&module) else {
            continue;
        };
        let text = fs::read_to_string(&file).expect("a readable source file");
        for (number, line) in production_lines(&text) {
            for used in uses_of(line) {
                let own = name.split('/').next() == Some(used);
                if !own && !allowed.contains(&used) {
                    crossings.push(format!("{}:{number}: {name} -> {used}", file.display()));
                }
            }
        }
    }
    assert!(
        crossings.is_empty(),
        "edges that must not exist:\n{}",
        crossings.join("\n")
    );
}

#[test]
fn unsafe_code_stays_in_sys() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let strays: Vec<_> = rust_files(&root)
        .into_iter()
        .filter(|file| !file.starts_with(root.join("sys")))
        .filter(|file| {
            let text = fs::read_to_string(file).expect("a readable source file");
            production_lines(&text).any(|(_, line)| {
                line.contains("unsafe {")
                    || line.contains("unsafe fn")
                    || line.contains("unsafe impl")
            })
        })
        .collect();
    assert!(strays.is_empty(), "unsafe outside sys: {strays:?}");
}

/// The longest rule whose name is the module or a folder above it.
fn rule_of(module: &str) -> Option<&'static (&'static str, &'static [&'static str])> {
    ALLOWED
        .iter()
        .filter(|(name, _)| module == *name || module.starts_with(&format!("{name}/")))
        .max_by_key(|(name, _)| name.len())
}

fn production_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]") || line.contains("mod tests;"))
        .enumerate()
        .map(|(at, line)| (at + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn uses_of(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").map(move |(at, prefix)| {
        let rest = &line[at + prefix.len()..];
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        &rest[..end]
    })
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
