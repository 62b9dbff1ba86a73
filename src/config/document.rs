//! A configuration document, read key by key: each key is taken once, a wrong value is noted and
//! read as absent, and what is left at the end is unknown. So one pass names every mistake.
//!
//! It knows no key; the keys are `config`'s.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value};

/// Something to say about one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.value.is_empty() {
            return write!(out, "{}: {}", self.key, self.reason);
        }
        write!(out, "{}: {}: {}", self.key, self.value, self.reason)
    }
}

/// What reading a document found: mistakes end the start, warnings do not.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) mistakes: Vec<Finding>,
    pub(crate) warnings: Vec<Finding>,
}

/// What unknown keys of a section are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unknown {
    Mistake,
    Warning,
}

/// One mapping of the document. Whoever reads it calls [`Section::finish`] last.
pub(crate) struct Section<'a> {
    path: String,
    entries: Map<String, Value>,
    unknown: Unknown,
    document: &'a Document,
}

/// The root of the keys, who set them, and the findings so far.
pub(crate) struct Document {
    /// Dotted key -> the flag that set it.
    flags: BTreeMap<String, String>,
    findings: RefCell<Findings>,
    /// Every key that was asked for; the documentation of the keys is compared with it.
    #[cfg(test)]
    known: RefCell<std::collections::BTreeSet<String>>,
}

impl Document {
    pub(crate) fn new(flags: BTreeMap<String, String>) -> Self {
        Self {
            flags,
            findings: RefCell::default(),
            #[cfg(test)]
            known: RefCell::default(),
        }
    }

    pub(crate) fn root(&self, entries: Map<String, Value>) -> Section<'_> {
        Section {
            path: String::new(),
            entries,
            unknown: Unknown::Warning,
            document: self,
        }
    }

    /// Notes a mistake about a key, named as the operator wrote it: the flag, or the key.
    pub(crate) fn mistake(&self, key: &str, value: &str, reason: impl Into<String>) {
        let finding = self.finding(key, value, reason.into());
        self.findings.borrow_mut().mistakes.push(finding);
    }

    pub(crate) fn warning(&self, key: &str, value: &str, reason: impl Into<String>) {
        let finding = self.finding(key, value, reason.into());
        self.findings.borrow_mut().warnings.push(finding);
    }

    /// The keys that have a meaning, sections left out.
    #[cfg(test)]
    pub(crate) fn known_keys(&self) -> Vec<String> {
        let known = self.known.borrow();
        let is_section = |key: &String| known.iter().any(|k| k.starts_with(&format!("{key}.")));
        known
            .iter()
            .filter(|key| !is_section(key))
            .cloned()
            .collect()
    }

    pub(crate) fn into_findings(self) -> Findings {
        self.findings.into_inner()
    }

    fn finding(&self, key: &str, value: &str, reason: String) -> Finding {
        let key = self
            .flags
            .get(key)
            .cloned()
            .unwrap_or_else(|| key.to_owned());
        Finding {
            key,
            value: value.to_owned(),
            reason,
        }
    }
}

impl<'a> Section<'a> {
    /// The mapping under `key`; empty where the key is absent or no mapping.
    pub(crate) fn section(&mut self, key: &str, unknown: Unknown) -> Section<'a> {
        let entries = self.take(key, |value| match value {
            Value::Object(entries) => Ok(entries.clone()),
            _ => Err("must be a mapping".to_owned()),
        });
        Section {
            path: self.key(key),
            entries: entries.unwrap_or_default(),
            unknown,
            document: self.document,
        }
    }

    /// The value under `key` as `read` understands it; absent and null are `None`, and so is a
    /// wrong value, after it was noted.
    pub(crate) fn take<T>(
        &mut self,
        key: &str,
        read: impl FnOnce(&Value) -> Result<T, String>,
    ) -> Option<T> {
        self.know(key);
        let value = self.entries.remove(key).filter(|value| !value.is_null())?;
        match read(&value) {
            Ok(read) => Some(read),
            Err(reason) => {
                self.document
                    .mistake(&self.key(key), &shown(&value), reason);
                None
            }
        }
    }

    /// Whether the key is there and not null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|value| !value.is_null())
    }

    /// Takes a key that means something to kube-proxy and nothing here.
    pub(crate) fn ignore(&mut self, key: &str) {
        self.know(key);
        self.entries.remove(key);
    }

    /// Notes a mistake about a key of this section.
    pub(crate) fn mistake(&self, key: &str, value: &str, reason: impl Into<String>) {
        self.document.mistake(&self.key(key), value, reason);
    }

    pub(crate) fn warning(&self, key: &str, value: &str, reason: impl Into<String>) {
        self.document.warning(&self.key(key), value, reason);
    }

    /// Names what nobody took.
    pub(crate) fn finish(self) {
        for (key, value) in &self.entries {
            let (key, value) = (self.key(key), shown(value));
            match self.unknown {
                Unknown::Mistake => self.document.mistake(&key, &value, "unknown key"),
                Unknown::Warning => {
                    self.document
                        .warning(&key, &value, "unknown key, it has no effect");
                }
            }
        }
    }

    #[cfg(test)]
    fn know(&self, key: &str) {
        self.document.known.borrow_mut().insert(self.key(key));
    }

    #[cfg(not(test))]
    fn know(&self, _key: &str) {}

    fn key(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => format!("{text:?}"),
        other => other.to_string(),
    };
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

const SHOWN_CHARACTERS: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entries(value: Value) -> Map<String, Value> {
        let Value::Object(entries) = value else {
            panic!("no mapping: {value}")
        };
        entries
    }

    fn boolean(value: &Value) -> Result<bool, String> {
        value
            .as_bool()
            .ok_or_else(|| "must be true or false".to_owned())
    }

    #[test]
    fn a_wrong_value_reads_as_absent_and_is_named_with_its_whole_key() {
        let document = Document::new(BTreeMap::new());
        let mut root = document.root(entries(json!({"a": {"b": 3}})));
        let mut inner = root.section("a", Unknown::Mistake);
        assert_eq!(inner.take("b", boolean), None);
        let mistakes = document.into_findings().mistakes;
        assert_eq!(mistakes[0].to_string(), "a.b: 3: must be true or false");
    }

    #[test]
    fn a_mistake_in_a_flag_names_the_flag() {
        let flags = BTreeMap::from([("mode".to_owned(), "--proxy-mode".to_owned())]);
        let document = Document::new(flags);
        document.mistake("mode", "x", "is none");
        assert_eq!(
            document.into_findings().mistakes[0].to_string(),
            "--proxy-mode: x: is none"
        );
    }

    #[test]
    fn what_nobody_took_is_unknown() {
        let document = Document::new(BTreeMap::new());
        let mut root = document.root(entries(json!({"x": 1, "a": {"y": 2}, "z": null})));
        root.section("a", Unknown::Mistake).finish();
        root.ignore("z");
        root.finish();
        let findings = document.into_findings();
        assert_eq!(findings.mistakes[0].to_string(), "a.y: 2: unknown key");
        assert_eq!(
            findings.warnings[0].to_string(),
            "x: 1: unknown key, it has no effect"
        );
    }

    #[test]
    fn long_values_are_cut() {
        assert_eq!(
            shown(&json!("é".repeat(100))).chars().count(),
            SHOWN_CHARACTERS + 1
        );
    }
}
