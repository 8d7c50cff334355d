//! What libvirt found out about QEMU, kept from one libvirt to the next.
//!
//! Probing costs four seconds for each emulator that is installed, and each libvirt of the lab starts with an empty
//! cache. libvirt itself checks whether what an earlier one found out is still true.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::guest::lab_cache;

/// Fills a libvirt's cache with what is known, and returns whether anything is.
pub(crate) fn lend(cache: &Path) -> bool {
    copy_new_files(&lab_cache().join("capabilities"), cache)
}

/// Keeps what a libvirt has found out.
pub(crate) fn keep(cache: &Path) {
    copy_new_files(cache, &lab_cache().join("capabilities"));
}

fn copy_new_files(from: &Path, to: &Path) -> bool {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let Ok(entries) = fs::read_dir(from) else {
        return false;
    };
    fs::create_dir_all(to).expect("the lab's folders can be written");
    let mut any = false;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let whole = name.to_string_lossy().ends_with(".xml");
        if whole && !to.join(&name).exists() {
            // Other test binaries do the same at the same time; nobody must see half a file.
            let number = COUNT.fetch_add(1, Ordering::Relaxed);
            let draft = to.join(format!("draft.{}.{number}", std::process::id()));
            if fs::copy(entry.path(), &draft).is_ok() {
                fs::rename(draft, to.join(&name)).expect("the lab's folders can be written");
            }
        }
        any |= whole;
    }
    any
}
