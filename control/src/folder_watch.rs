//! When to look at a folder of manifests again.
//!
//! Follows the folder by inotify and tells which files were written. A file is told only when its
//! writer is done (it was closed, or nothing was written for a while), so that a half-written one
//! never takes Services away. Where the kernel gives no inotify, and for links, whose targets
//! change without notice, the caller is woken to look by itself. Nothing is read here.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::net::unix::pipe::Receiver;
use tokio::time::{Instant, sleep_until, timeout};

use crate::manifests::{Changes, is_manifest};

/// Follows one folder.
#[derive(Debug)]
pub struct FolderWatch {
    path: PathBuf,
    /// `None` where the kernel refuses: the folder is then only polled.
    /// (Not a pipe, but read like one: tokio has no safe type for other descriptors.)
    events: Option<Receiver>,
    /// Whether the folder itself is followed; not after it was moved or deleted.
    attached: bool,
    files: BTreeMap<String, File>,
    /// Something happened that no file name tells.
    look: bool,
}

#[derive(Clone, Copy, Debug)]
struct File {
    last: Instant,
    /// Whether somebody may still be writing.
    open: bool,
}

impl FolderWatch {
    /// Starts following. Must run inside a tokio runtime.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(std::io::Error::from)
            .and_then(Receiver::from_owned_fd_unchecked);
        if let Err(error) = &events {
            tracing::warn!(%error, "no inotify, the manifests folder is polled");
        }
        let mut watch = Self {
            path: path.to_owned(),
            events: events.ok(),
            attached: false,
            files: BTreeMap::new(),
            look: false,
        };
        watch.attach();
        // The caller looks after this, not before.
        watch.look = false;
        watch
    }

    /// Waits until files were written, at most `poll`. Empty `Changes` ask to look all the same.
    ///
    /// Nothing is lost if the future is dropped before it is ready.
    pub async fn changed(&mut self, poll: Duration) -> Changes {
        let poll = if self.attached {
            poll
        } else {
            poll.min(POLL_BLIND)
        };
        let end = Instant::now() + poll;
        loop {
            let now = Instant::now();
            let changes = self.take_ready(now);
            if self.look || !changes.written.is_empty() {
                self.look = false;
                return changes;
            }
            if now >= end {
                self.attach();
                return changes;
            }
            let next = self.files.values().map(File::ready_at).min();
            let until = next.map_or(end, |next| next.min(end));
            let Some(events) = &self.events else {
                sleep_until(until).await;
                continue;
            };
            if let Ok(Ok(())) = timeout(until - now, events.readable()).await {
                self.read();
            }
        }
    }

    fn attach(&mut self) {
        let Some(events) = &self.events else {
            return;
        };
        let was = self.attached;
        match inotify::add_watch(events.as_fd(), &self.path, FOLLOWED) {
            Ok(_) => self.attached = true,
            Err(error) => {
                self.attached = false;
                if was {
                    let folder = self.path.display();
                    tracing::warn!(%folder, %error, "the manifests folder is not followed any more, it is polled");
                }
            }
        }
        self.look |= self.attached && !was;
    }

    fn read(&mut self) {
        let mut buffer = [0; 16 * 1024];
        // An error means: drained.
        while let Some(Ok(length)) = self
            .events
            .as_ref()
            .map(|events| events.try_read(&mut buffer))
        {
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((event, after)) = Event::first(rest) {
                self.note(&event);
                rest = after;
            }
            if length == 0 {
                return;
            }
        }
    }

    fn note(&mut self, event: &Event<'_>) {
        if event.what.intersects(FOLDER_GONE) {
            self.attached = false;
            self.look = true;
        }
        self.look |= event.what.contains(ReadFlags::QUEUE_OVERFLOW);
        let name = String::from_utf8_lossy(event.name);
        if is_manifest(&name) {
            let open = event.what.intersects(ReadFlags::CREATE | ReadFlags::MODIFY);
            let last = Instant::now();
            self.files.insert(name.into_owned(), File { last, open });
        } else {
            // A mounted ConfigMap turns a link beside its files.
            self.look |= name.starts_with("..");
        }
    }

    /// Files whose writer is done are taken out, the others are named.
    fn take_ready(&mut self, now: Instant) -> Changes {
        let mut changes = Changes::default();
        self.files.retain(|name, file| {
            let ready = file.ready_at() <= now;
            let list = if ready {
                &mut changes.written
            } else {
                &mut changes.writing
            };
            list.insert(name.clone());
            !ready
        });
        changes
    }
}

/// One event as the kernel writes it: number of the watch, mask, cookie, length of the name (32 bits
/// each), the name, zeros.
struct Event<'a> {
    what: ReadFlags,
    name: &'a [u8],
}

impl<'a> Event<'a> {
    fn first(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (header, rest) = bytes.split_first_chunk::<16>()?;
        let [.., m0, m1, m2, m3, _, _, _, _, l0, l1, l2, l3] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let (padded, rest) = rest.split_at_checked(length)?;
        let what = ReadFlags::from_bits_retain(u32::from_ne_bytes([m0, m1, m2, m3]));
        let name = padded.split(|byte| *byte == 0).next().unwrap_or_default();
        Some((Self { what, name }, rest))
    }
}

impl File {
    fn ready_at(&self) -> Instant {
        self.last + if self.open { QUIET_OPEN } else { QUIET_CLOSED }
    }
}

const FOLLOWED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

const FOLDER_GONE: ReadFlags = ReadFlags::DELETE_SELF
    .union(ReadFlags::MOVE_SELF)
    .union(ReadFlags::IGNORED)
    .union(ReadFlags::UNMOUNT);

/// Editors replace a file in several steps.
const QUIET_CLOSED: Duration = Duration::from_millis(40);
/// A writer that keeps its file open, and links, which nobody closes.
const QUIET_OPEN: Duration = Duration::from_millis(300);
/// How often to look where nothing is told.
const POLL_BLIND: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use std::fs::{self, File as Handle};
    use std::io::Write;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    async fn next(watch: &mut FolderWatch) -> Changes {
        let started = Instant::now();
        loop {
            let changes = watch.changed(PATIENCE).await;
            if !changes.written.is_empty() {
                return changes;
            }
            assert!(started.elapsed() < PATIENCE, "nothing was told");
        }
    }

    fn names(changes: &Changes) -> Vec<&str> {
        changes.written.iter().map(String::as_str).collect()
    }

    #[tokio::test]
    async fn edits_renames_and_deletions_are_told_within_a_second() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut watch = FolderWatch::new(folder.path());
        let path = |name: &str| folder.path().join(name);
        let started = Instant::now();
        fs::write(path("a.yaml"), "one").expect("writing in place");
        assert_eq!(names(&next(&mut watch).await), ["a.yaml"]);
        fs::write(path(".b.yaml.tmp"), "two").expect("writing beside it");
        fs::rename(path(".b.yaml.tmp"), path("b.yaml")).expect("renaming into place");
        assert_eq!(names(&next(&mut watch).await), ["b.yaml"]);
        fs::remove_file(path("a.yaml")).expect("deleting it");
        assert_eq!(names(&next(&mut watch).await), ["a.yaml"]);
        assert!(started.elapsed() < Duration::from_secs(3));
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_is_named_but_not_told() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut watch = FolderWatch::new(folder.path());
        let mut half = Handle::create(folder.path().join("half.yaml")).expect("a file");
        half.write_all(b"apiVersion: v1\n").expect("writing a part");
        fs::write(folder.path().join("whole.yaml"), "").expect("writing another");
        let changes = next(&mut watch).await;
        assert_eq!(names(&changes), ["whole.yaml"]);
        assert!(changes.writing.contains("half.yaml"));
        half.write_all(b"kind: List\n").expect("writing the rest");
        drop(half);
        assert_eq!(names(&next(&mut watch).await), ["half.yaml"]);
    }

    #[tokio::test]
    async fn a_folder_that_was_replaced_is_followed_again() {
        let outer = tempfile::tempdir().expect("a temporary folder");
        let path = outer.path().join("manifests");
        fs::create_dir(&path).expect("a folder");
        let mut watch = FolderWatch::new(&path);
        fs::rename(&path, outer.path().join("old")).expect("moving it away");
        fs::create_dir(&path).expect("another of its name");
        watch.changed(PATIENCE).await;
        assert!(!watch.attached);
        let started = Instant::now();
        while !watch.attached {
            watch.changed(PATIENCE).await;
            assert!(started.elapsed() < PATIENCE, "it is not followed again");
        }
        fs::write(path.join("a.yaml"), "").expect("writing into it");
        assert_eq!(names(&next(&mut watch).await), ["a.yaml"]);
    }
}
