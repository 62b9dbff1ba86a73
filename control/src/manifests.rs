//! The same events as from the API, from a folder of manifests.
//!
//! `Folder` remembers what each file held and turns differences into events. It looks when it is
//! told to (`folder_watch` says when). Rules: a file that does not parse keeps its last good
//! content and is named; a bad object is left out and named; of two files that hold one object the
//! later name wins; names that begin with a dot or end with `~`, and all but `.yaml`, `.yml` and
//! `.json`, are not read. Folders inside the folder are not entered.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::controller::{Event, Rejected};
use crate::document::{self, Entry};
use crate::store::{Object, ObjectKey};

/// The folder cannot be listed.
#[derive(Debug, thiserror::Error)]
#[error("manifests folder {}: {source}", path.display())]
pub struct FolderError {
    path: PathBuf,
    source: io::Error,
}

/// What happened to the files of a folder since the last look.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// Written and closed, moved or deleted: to be read again.
    pub written: BTreeSet<String>,
    /// Somebody is writing them: not to be read yet.
    pub writing: BTreeSet<String>,
}

/// A folder of manifests and what was read from it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    files: BTreeMap<String, File>,
    sent: Content,
    unreadable: Option<Vec<Rejected>>,
}

type Content = BTreeMap<ObjectKey, (Arc<Object>, Arc<str>)>;

#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    is_link: bool,
    entries: Vec<Entry>,
    fault: Option<String>,
}

/// What differs when a file differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Folder {
    /// A folder that was not looked at yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            files: BTreeMap::new(),
            sent: Content::new(),
            unreadable: None,
        }
    }

    /// Looks at every file and tells what is different from the last look.
    ///
    /// # Errors
    /// The folder cannot be listed; everything stays as it was.
    pub fn scan(&mut self) -> Result<Vec<Event>, FolderError> {
        self.scan_after(&Changes::default())
    }

    /// The same, knowing what was written: those files are read even if they look the same.
    ///
    /// # Errors
    /// The folder cannot be listed; everything stays as it was.
    pub fn scan_after(&mut self, changes: &Changes) -> Result<Vec<Event>, FolderError> {
        let names = self.list().map_err(|source| FolderError {
            path: self.path.clone(),
            source,
        })?;
        self.files.retain(|name, _| names.contains(name));
        for name in names {
            if !changes.writing.contains(&name) {
                self.look_at(name, &changes.written);
            }
        }
        Ok(self.differences())
    }

    /// The folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a file is a link: what it points to can change without notice.
    #[must_use]
    pub fn has_links(&self) -> bool {
        self.files.values().any(|file| file.is_link)
    }

    fn list(&self) -> io::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if is_manifest(&name) {
                names.insert(name);
            }
        }
        Ok(names)
    }

    fn look_at(&mut self, name: String, written: &BTreeSet<String>) {
        let path = self.path.join(&name);
        let is_link = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
        let metadata = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => {
                // A folder or a pipe.
                self.files.remove(&name);
                return;
            }
            // Deleted since the listing: the next look will not list it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_link => return,
            Err(error) => return self.fail(name, is_link, error.to_string()),
        };
        let stamp = Stamp::of(&metadata);
        let known = self.files.get(&name).and_then(|file| file.stamp);
        if known == Some(stamp) && !written.contains(&name) {
            return;
        }
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8(bytes),
            Err(error) => return self.fail(name, is_link, error.to_string()),
        };
        let entries = match text {
            Ok(text) => document::read(&text).map_err(|fault| fault.to_string()),
            Err(_) => Err("not UTF-8 text".to_owned()),
        };
        let file = self.files.entry(name).or_default();
        file.stamp = Some(stamp);
        file.is_link = is_link;
        match entries {
            Ok(entries) => {
                file.entries = entries;
                file.fault = None;
            }
            Err(fault) => file.fault = Some(fault),
        }
    }

    fn fail(&mut self, name: String, is_link: bool, fault: String) {
        let file = self.files.entry(name).or_default();
        file.stamp = None;
        file.is_link = is_link;
        file.fault = Some(fault);
    }

    fn differences(&mut self) -> Vec<Event> {
        let (now, rejected) = self.content();
        let gone = self.sent.keys().filter(|key| !now.contains_key(*key));
        let mut events: Vec<Event> = gone.map(|key| Event::Deleted(key.clone())).collect();
        for (key, (object, place)) in &now {
            // Where it stands matters too: it is named when something is wrong with it.
            let is_same = |sent: &(Arc<Object>, Arc<str>)| {
                (Arc::ptr_eq(&sent.0, object) || sent.0 == *object) && sent.1 == *place
            };
            if !self.sent.get(key).is_some_and(is_same) {
                events.push(Event::Applied(Arc::clone(object), Some(Arc::clone(place))));
            }
        }
        if self.unreadable.as_ref() != Some(&rejected) {
            events.push(Event::Unreadable(rejected.clone()));
        }
        self.sent = now;
        self.unreadable = Some(rejected);
        events
    }

    /// All objects with their places, and what cannot be used.
    fn content(&self) -> (Content, Vec<Rejected>) {
        let mut rejected = Vec::new();
        let mut now = Content::new();
        for (name, file) in &self.files {
            rejected.extend(
                file.fault
                    .as_ref()
                    .map(|fault| file_rejected(name, file, fault)),
            );
            for entry in &file.entries {
                match &entry.content {
                    Ok(object) => {
                        let place: Arc<str> = format!("{name} line {}", entry.line).into();
                        let key = object.key();
                        let value = (Arc::clone(object), Arc::clone(&place));
                        if let Some((_, before)) = now.insert(key.clone(), value) {
                            let reason = format!("{before}: it is also in {place}, which counts");
                            rejected.push(object_rejected(&key, reason));
                        }
                    }
                    Err(bad) => rejected.push(Rejected {
                        kind: bad.kind.clone(),
                        namespace: bad.namespace.clone(),
                        name: bad.name.clone(),
                        reason: format!("{name} {}", bad.fault),
                    }),
                }
            }
        }
        (now, rejected)
    }
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Whether a file of this name is read.
#[must_use]
pub fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    !name.starts_with('.') && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn file_rejected(name: &str, file: &File, fault: &str) -> Rejected {
    let kept = if file.entries.is_empty() {
        ""
    } else {
        " (its last good content is served)"
    };
    Rejected {
        kind: "File".into(),
        namespace: String::new(),
        name: name.into(),
        reason: format!("{name} {fault}{kept}"),
    }
}

fn object_rejected(key: &ObjectKey, reason: String) -> Rejected {
    Rejected {
        kind: key.kind.name().into(),
        namespace: (*key.namespace).into(),
        name: (*key.name).into(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lab {
        folder: Folder,
        path: tempfile::TempDir,
    }

    impl Lab {
        fn new() -> Self {
            let path = tempfile::tempdir().expect("a temporary folder");
            Self {
                folder: Folder::new(path.path()),
                path,
            }
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path.path().join(name), text).expect("writing into it");
        }

        fn scan(&mut self) -> Vec<String> {
            let written = self.folder.files.keys().cloned().collect();
            let changes = Changes {
                written,
                ..Changes::default()
            };
            let events = self
                .folder
                .scan_after(&changes)
                .expect("a folder that can be listed");
            events.iter().flat_map(describe).collect()
        }
    }

    fn describe(event: &Event) -> Vec<String> {
        match event {
            Event::Applied(object, _) => vec![format!("applied {}", object.key())],
            Event::Deleted(key) => vec![format!("deleted {key}")],
            Event::Unreadable(all) => all
                .iter()
                .map(|r| format!("rejected {} {}: {}", r.kind, r.name, r.reason))
                .collect(),
            other => vec![format!("{other:?}")],
        }
    }

    fn service(name: &str, port: u16) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n---\n"
        )
    }

    #[test]
    fn a_look_tells_only_what_is_different() {
        let mut lab = Lab::new();
        lab.write("a.yaml", &(service("one", 80) + &service("two", 80)));
        assert_eq!(
            lab.scan(),
            ["applied Service default/one", "applied Service default/two"]
        );
        assert_eq!(lab.scan(), Vec::<String>::new());
        lab.write("a.yaml", &(service("one", 81) + &service("two", 80)));
        assert_eq!(lab.scan(), ["applied Service default/one"]);
        lab.write("a.yaml", &service("two", 80));
        assert_eq!(
            lab.scan(),
            ["deleted Service default/one", "applied Service default/two"]
        );
        fs::remove_file(lab.path.path().join("a.yaml")).expect("deleting it");
        assert_eq!(lab.scan(), ["deleted Service default/two"]);
    }

    #[test]
    fn a_file_that_does_not_parse_keeps_its_last_good_content() {
        let mut lab = Lab::new();
        lab.write("a.yaml", &service("one", 80));
        lab.scan();
        lab.write("a.yaml", "apiVersion: v1\nkind: {Service\n");
        let told = lab.scan();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].starts_with("rejected File a.yaml: a.yaml line "),
            "{told:?}"
        );
        assert!(
            told[0].ends_with("(its last good content is served)"),
            "{told:?}"
        );
        lab.write("a.yaml", &service("one", 81));
        assert_eq!(lab.scan(), ["applied Service default/one"]);
    }

    #[test]
    fn a_bad_object_is_left_out_and_the_rest_goes_live() {
        let mut lab = Lab::new();
        lab.write("a.yaml", &service("one", 80));
        lab.scan();
        let bad = service("one", 80).replace("80", "eighty");
        lab.write("a.yaml", &(bad + &service("two", 80)));
        assert_eq!(
            lab.scan(),
            [
                "deleted Service default/one",
                "applied Service default/two",
                "rejected Service one: a.yaml line 4: invalid type: string \"eighty\", expected i32",
            ]
        );
    }

    #[test]
    fn of_two_files_the_later_name_wins_and_both_are_named() {
        let mut lab = Lab::new();
        lab.write("b.yaml", &service("one", 82));
        lab.write("a.yaml", &service("one", 81));
        let told = lab.scan();
        assert_eq!(
            told,
            [
                "applied Service default/one",
                "rejected Service one: a.yaml line 1: it is also in b.yaml line 1, which counts",
            ]
        );
        fs::remove_file(lab.path.path().join("b.yaml")).expect("deleting it");
        assert_eq!(lab.scan(), ["applied Service default/one"]);
    }

    #[test]
    fn other_files_and_files_being_written_are_not_read() {
        let mut lab = Lab::new();
        for name in [
            ".hidden.yaml",
            "a.yaml~",
            "notes.txt",
            ".a.yaml.swp",
            "yaml",
        ] {
            lab.write(name, &service("one", 80));
        }
        fs::create_dir(lab.path.path().join("folder.yaml")).expect("a folder in it");
        assert_eq!(lab.scan(), Vec::<String>::new());
        lab.write("half.yaml", "");
        let changes = Changes {
            writing: ["half.yaml".into()].into(),
            ..Changes::default()
        };
        lab.folder
            .scan_after(&changes)
            .expect("a folder that can be listed");
        assert!(lab.folder.files.is_empty());
    }

    #[test]
    fn a_dangling_link_is_named_and_read_once_it_leads_somewhere() {
        let mut lab = Lab::new();
        let target = lab.path.path().join("target");
        std::os::unix::fs::symlink(&target, lab.path.path().join("a.yaml")).expect("a link");
        let told = lab.scan();
        assert!(
            told[0].starts_with("rejected File a.yaml: a.yaml No such file"),
            "{told:?}"
        );
        lab.write("target", &service("one", 80));
        assert_eq!(lab.scan(), ["applied Service default/one"]);
        assert!(lab.folder.has_links());
    }
}
