//! Builds the real Kubernetes programs from their Go modules, once per version, into the user's cache.
//!
//! `tests/cluster/go/` holds a module for each source, with the sums of all that is fetched. A program is built beside its
//! place and renamed into it, so that an interrupted build leaves nothing that looks finished.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The store.
    pub etcd: PathBuf,
    /// The API server.
    pub kube_apiserver: PathBuf,
    /// The judge.
    pub kube_proxy: PathBuf,
}

/// Builds what the cache lacks. `root` is the repository.
pub fn build(root: &Path) -> Result<Programs> {
    let modules = root.join("tests/cluster/go");
    let program = |module: &str, version: &str, name: &str, package: &str| {
        build_one(&modules.join(module), version, name, package)
            .with_context(|| format!("build {name} {version}"))
    };
    Ok(Programs {
        etcd: program("etcd", ETCD, "etcd", "go.etcd.io/etcd/server/v3")?,
        kube_apiserver: program(
            "kubernetes",
            KUBERNETES,
            "kube-apiserver",
            "k8s.io/kubernetes/cmd/kube-apiserver",
        )?,
        kube_proxy: program(
            "kubernetes",
            KUBERNETES,
            "kube-proxy",
            "k8s.io/kubernetes/cmd/kube-proxy",
        )?,
    })
}

fn build_one(module: &Path, version: &str, name: &str, package: &str) -> Result<PathBuf> {
    let folder = cache()?.join(version);
    let place = folder.join(name);
    if place.is_file() {
        return Ok(place);
    }
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    println!(
        "building {name} {version}: minutes the first time, kept in {}",
        folder.display()
    );
    let start = Instant::now();
    let unfinished = folder.join(format!(".{name}.{}", std::process::id()));
    let status = Command::new("go")
        .current_dir(module)
        .env("CGO_ENABLED", "0")
        .args(["build", "-mod=readonly", "-trimpath", "-o"])
        .args([unfinished.as_os_str(), package.as_ref()])
        .status()
        .context("run go; it must be installed")?;
    ensure!(status.success(), "go build {package}: {status}");
    fs::rename(&unfinished, &place)?;
    println!("built {name} in {:.0} s", start.elapsed().as_secs_f32());
    Ok(place)
}

fn cache() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let folder = match (set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => PathBuf::from(home).join(".cache"),
        (None, None) => anyhow::bail!("neither XDG_CACHE_HOME nor HOME is set"),
    };
    Ok(folder.join("sluice"))
}

/// As `go/kubernetes/go.mod` requires it.
const KUBERNETES: &str = "v1.37.2";
/// As `go/etcd/go.mod` requires it.
const ETCD: &str = "v3.7.3";
