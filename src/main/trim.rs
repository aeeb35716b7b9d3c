//! Gives memory that was freed back to the system: large pieces when they are freed, and what the C library keeps of small ones, in an arena
//! for each of many threads, from time to time. It would keep the most that the process has ever used.

use std::time::Duration;

/// How often it is looked whether memory can go back.
const INTERVAL: Duration = Duration::from_secs(5);
/// Bytes that must have come since it went back last.
const STEP: u64 = 32 << 20;

/// Bytes from which on a piece of memory is the system's own, and goes back when it is freed. That is the C library's own figure, which it would raise
/// to the size of each such piece, up to 32 MiB, and then keep pieces that large: a training on one long record held half as much again.
const LARGE: libc::c_int = 128 << 10;

/// Begins to do so, in a thread of its own, until the process ends.
pub fn give_memory_back() {
    #[expect(unsafe_code, reason = "a call of the C library")]
    // SAFETY: it sets a figure of the allocator, under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE)
    };
    let look = || {
        let mut kept = 0;
        loop {
            std::thread::sleep(INTERVAL);
            let resident = resident_bytes().unwrap_or(0);
            if resident > kept + STEP {
                #[expect(unsafe_code, reason = "a call of the C library")]
                // SAFETY: it may be called at any time from any thread, and takes the allocator's own locks.
                unsafe {
                    libc::malloc_trim(0)
                };
                kept = resident_bytes().unwrap_or(resident);
            }
            kept = kept.min(resident);
        }
    };
    // Without the thread the server works as well, and keeps more.
    let _ = std::thread::Builder::new().name("memory".into()).spawn(look);
}

/// Bytes of this process that are in memory. The system says it in kB here, elsewhere in pages of its own size.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
