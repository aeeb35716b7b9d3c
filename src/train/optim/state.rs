//! Where the optimizer's state is: in memory, or in a file without a name in the data folder, of which a piece at a time is in memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::moments::{Form, Moments};
use crate::error::{Error, Result};

/// A file of zeros for the state. The system forgets it with the process that has it open, however that ends.
#[derive(Debug)]
pub struct StateFile {
    file: File,
    /// Whose disk it is on.
    folder: PathBuf,
}

impl StateFile {
    /// Makes room for so many bytes in a new file, so that a disk too small is known before the first step.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn new(file: File, folder: &Path, bytes: u64) -> Result<Self> {
        match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            // Not all file systems can, and then it is found out later.
            Err(Errno::OPNOTSUPP) => file.set_len(bytes).map_err(Error::at(folder))?,
            room => room.map_err(|e| Error::at(folder)(e.into()))?,
        }
        Ok(Self { file, folder: folder.to_owned() })
    }
}

/// The moments of all pieces, in their order.
#[derive(Debug)]
pub(super) enum State<'f> {
    Memory(Vec<Moments>),
    Paged {
        file: &'f StateFile,
        /// The form of each piece, and where it begins.
        pieces: Vec<(Form, u64)>,
        /// That of one piece.
        moved: Moments,
    },
}

impl<'f> State<'f> {
    pub fn new(pieces: impl Iterator<Item = Form>, file: Option<&'f StateFile>) -> Self {
        let Some(file) = file else { return Self::Memory(pieces.map(Moments::zeros).collect()) };
        let mut next = 0;
        let place = |form: Form| {
            let at = next;
            next += form.bytes();
            (form, at)
        };
        let pieces: Vec<(Form, u64)> = pieces.map(place).collect();
        let largest = pieces.iter().map(|(form, _)| *form).max_by_key(|form| form.bytes());
        Self::Paged { file, moved: Moments::zeros(largest.unwrap_or(Form::Float(0))), pieces }
    }

    /// The bytes that are in memory.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Memory(pieces) => pieces.iter().map(Moments::bytes).sum(),
            Self::Paged { moved, .. } => moved.bytes(),
        }
    }

    /// Has the moments of a piece changed.
    pub fn change(&mut self, piece: usize, change: impl FnOnce(&mut Moments)) -> Result<()> {
        match self {
            Self::Memory(pieces) => change(&mut pieces[piece]),
            Self::Paged { file: StateFile { file, folder }, pieces, moved } => {
                let (form, at) = pieces[piece];
                moved.resize(form);
                each_part(moved, at, |part, at| file.read_exact_at(part, at)).map_err(Error::at(folder))?;
                change(moved);
                each_part(moved, at, |part, at| file.write_all_at(part, at)).map_err(Error::at(folder))?;
            }
        }
        Ok(())
    }
}

/// Runs `f` over the parts of moments, which lie one after another from `at`.
fn each_part(
    moments: &mut Moments,
    mut at: u64,
    f: impl Fn(&mut [u8], u64) -> std::io::Result<()>,
) -> std::io::Result<()> {
    for part in moments.parts() {
        f(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}
