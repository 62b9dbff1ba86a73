//! Compiles the steering programs with clang into one object, which `steering` embeds.
//!
//! Both C files go into one translation unit, since their programs share maps. Nothing is
//! downloaded; what is missing on the machine is named with the package that has it.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 2] = ["steer.bpf.c", "host_port.bpf.c"];

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(variable("OUT_DIR"));
    let unit = out.join("programs.c");
    std::fs::write(&unit, unit_text()).expect("OUT_DIR is writable");
    if let Err(reason) = compile(&unit, &manifest.join("bpf"), &out.join("programs.o")) {
        println!("cargo::error={reason}");
        std::process::exit(1);
    }
}

fn unit_text() -> String {
    SOURCES
        .map(|name| format!("#include \"{name}\"\n"))
        .concat()
}

fn compile(unit: &Path, include: &Path, object: &Path) -> Result<(), String> {
    let status = Command::new("clang")
        .args([
            "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror",
        ])
        .arg("-I")
        .arg(include)
        .arg("-I")
        .arg(multiarch_include())
        .arg("-c")
        .arg(unit)
        .arg("-o")
        .arg(object)
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(
            "clang cannot compile dataplane/bpf (are the headers of packages libbpf-dev and \
             linux-libc-dev installed?)"
                .into(),
        ),
        Err(error) => Err(format!(
            "clang cannot be started ({error}): install package clang; it compiles dataplane/bpf"
        )),
    }
}

/// Where Debian keeps `asm/types.h`; elsewhere the folder does not exist and does no harm.
fn multiarch_include() -> String {
    format!(
        "/usr/include/{}-linux-gnu",
        variable("CARGO_CFG_TARGET_ARCH")
    )
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}
