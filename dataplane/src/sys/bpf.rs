//! The parts of bpf(2) that the loader lacks: attaching tcx programs without links, asking what is
//! attached, and finding programs and their maps by number.
//!
//! Contract: every attribute is a `repr(C)` struct as long as the kernel's, zeroed where unused
//! (`union bpf_attr`, include/uapi/linux/bpf.h), and every address in it points to memory that
//! lives and is large enough for the duration of the call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Which side of a device a tcx program sits at (`enum bpf_attach_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum TcxHook {
    /// Packets that the device received.
    Ingress = 46,
    /// Packets that the device is about to send.
    Egress = 47,
}

/// What the kernel tells about a loaded program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ProgramInfo {
    /// Its number.
    pub(crate) id: u32,
    /// Its name, at most 15 characters.
    pub(crate) name: String,
    /// The numbers of the maps it uses.
    pub(crate) map_ids: Vec<u32>,
}

/// Attaches first at ingress, last at egress, without a link: the program stays when we die.
///
/// # Errors
/// The kernel's; `EINVAL` before Linux 6.6.
pub(crate) fn attach_tcx(ifindex: u32, hook: TcxHook, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attribute = AttachAttribute {
        flags: match hook {
            TcxHook::Ingress => BPF_F_BEFORE,
            TcxHook::Egress => BPF_F_AFTER,
        },
        ..AttachAttribute::of(ifindex, hook, program)
    };
    call(BPF_PROG_ATTACH, &mut attribute).map(drop)
}

/// Detaches this program and no other.
///
/// # Errors
/// The kernel's; `ENOENT` if it is not attached there.
pub(crate) fn detach_tcx(ifindex: u32, hook: TcxHook, program: BorrowedFd<'_>) -> io::Result<()> {
    call(
        BPF_PROG_DETACH,
        &mut AttachAttribute::of(ifindex, hook, program),
    )
    .map(drop)
}

/// Numbers of the programs attached there, in the order in which they run.
///
/// # Errors
/// The kernel's; `EINVAL` before Linux 6.6.
pub(crate) fn query_tcx(ifindex: u32, hook: TcxHook) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MPROG_MAX as usize];
    let mut attribute = QueryAttribute {
        ifindex,
        hook: hook as u32,
        ids: address_of(&mut ids),
        count: MPROG_MAX,
        ..QueryAttribute::default()
    };
    call(BPF_PROG_QUERY, &mut attribute)?;
    Ok(ids.into_iter().take(attribute.count as usize).collect())
}

/// A descriptor of the program with this number.
///
/// # Errors
/// The kernel's; `ENOENT` if there is none.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(BPF_PROG_GET_FD_BY_ID, id)
}

/// What the kernel knows about a program.
///
/// # Errors
/// The kernel's.
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    let mut ids = [0_u32; MAPS_MAX as usize];
    let mut raw = RawProgramInfo {
        map_count: MAPS_MAX,
        map_ids: address_of(&mut ids),
        ..RawProgramInfo::default()
    };
    info(program, &mut raw)?;
    Ok(ProgramInfo {
        id: raw.id,
        name: text(&raw.name),
        map_ids: ids.into_iter().take(raw.map_count as usize).collect(),
    })
}

/// The name of the map with this number.
///
/// # Errors
/// The kernel's; `ENOENT` if there is none.
pub(crate) fn map_name(id: u32) -> io::Result<String> {
    let map = by_id(BPF_MAP_GET_FD_BY_ID, id)?;
    let mut raw = RawMapInfo::default();
    info(std::os::fd::AsFd::as_fd(&map), &mut raw)?;
    Ok(text(&raw.name))
}

fn by_id(command: libc::c_int, id: u32) -> io::Result<OwnedFd> {
    let mut attribute = IdAttribute {
        id,
        ..IdAttribute::default()
    };
    let descriptor = call(command, &mut attribute)?;
    // SAFETY: the kernel just returned this descriptor, open and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn info<T: FromBytes + IntoBytes>(object: BorrowedFd<'_>, into: &mut T) -> io::Result<()> {
    let mut attribute = InfoAttribute {
        descriptor: object.as_raw_fd().cast_unsigned(),
        length: length_of::<T>(),
        address: address_of(into),
    };
    call(BPF_OBJ_GET_INFO_BY_FD, &mut attribute).map(drop)
}

fn call<T: FromBytes + IntoBytes>(command: libc::c_int, attribute: &mut T) -> io::Result<i32> {
    let bytes = attribute.as_mut_bytes();
    // SAFETY: the attribute is initialised, as long as we say, and every address it holds was made
    // by `address_of` from memory that the caller still borrows.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, bytes.as_mut_ptr(), length_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(|_| io::ErrorKind::InvalidData.into())
}

const fn length_of<T>() -> u32 {
    const {
        assert!(
            size_of::<T>() <= 256,
            "an attribute or info struct is short"
        )
    };
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let length = size_of::<T>() as u32;
    length
}

fn address_of<T: ?Sized>(target: &mut T) -> u64 {
    std::ptr::from_mut(target).cast::<u8>().addr() as u64
}

fn text(name: &[u8]) -> String {
    let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
    String::from_utf8_lossy(name.get(..end).unwrap_or_default()).into_owned()
}

/// `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[derive(Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct AttachAttribute {
    ifindex: u32,
    program: u32,
    hook: u32,
    flags: u32,
    replace: u32,
    relative: u32,
    revision: u64,
}

impl AttachAttribute {
    fn of(ifindex: u32, hook: TcxHook, program: BorrowedFd<'_>) -> Self {
        Self {
            ifindex,
            program: program.as_raw_fd().cast_unsigned(),
            hook: hook as u32,
            ..Self::default()
        }
    }
}

/// `BPF_PROG_QUERY`.
#[derive(Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct QueryAttribute {
    ifindex: u32,
    hook: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
    program_flags: u64,
    link_ids: u64,
    link_flags: u64,
    revision: u64,
}

/// `BPF_PROG_GET_FD_BY_ID` and `BPF_MAP_GET_FD_BY_ID`.
#[derive(Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct IdAttribute {
    id: u32,
    next: u32,
    flags: u32,
}

/// `BPF_OBJ_GET_INFO_BY_FD`.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct InfoAttribute {
    descriptor: u32,
    length: u32,
    address: u64,
}

/// The beginning of `struct bpf_prog_info`; the kernel fills as much as it is given room for.
#[derive(Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RawProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    xlated_length: u32,
    jited: u64,
    xlated: u64,
    load_time: u64,
    created_by: u32,
    map_count: u32,
    map_ids: u64,
    name: [u8; 16],
}

/// The beginning of `struct bpf_map_info`.
#[derive(Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RawMapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; 16],
}

const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_MAP_GET_FD_BY_ID: libc::c_int = 14;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_F_AFTER: u32 = 1 << 4;
/// How many programs the kernel lets sit at one tcx hook (`BPF_MPROG_MAX`).
const MPROG_MAX: u32 = 64;
/// More maps than a program of ours uses (`MAX_USED_MAPS` of the kernel).
const MAPS_MAX: u32 = 64;
