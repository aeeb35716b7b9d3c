//! Where an optimizer's moments are: in memory, or in a file of which one piece at a time is read, updated and written back.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use crate::error::{Error, Result};
use crate::request::Optimizer;
use crate::train::optim::moments::{Form, Moments};

/// Values of a piece at most: 8 MiB of moments in float32.
const PIECE: usize = 1 << 20;

/// Fewest values of a tensor whose moments may be in eight bits, as in bitsandbytes: less is saved than is lost on a small one.
const MIN_EIGHT_BIT: usize = 4096;

/// Returns the pieces of a tensor and its gradient, in their order.
pub fn pieces_of<'t>(tensor: &'t mut [f32], gradient: &'t [f32]) -> impl Iterator<Item = (&'t mut [f32], &'t [f32])> {
    tensor.chunks_mut(PIECE).zip(gradient.chunks(PIECE))
}

/// The pieces of all tensors: the form of their moments, and how many values they have.
#[derive(Debug)]
pub struct Layout(Vec<(Form, usize)>);

impl Layout {
    /// Returns that of tensors of these lengths.
    pub fn new(optimizer: Optimizer, lengths: impl IntoIterator<Item = usize>) -> Self {
        let pieces = |len: usize| {
            let form = match optimizer {
                Optimizer::AdamW8Bit if len >= MIN_EIGHT_BIT => Form::EightBit,
                Optimizer::AdamW8Bit | Optimizer::AdamW => Form::Float,
            };
            (0..len).step_by(PIECE).map(move |start| (form, PIECE.min(len - start)))
        };
        Self(lengths.into_iter().flat_map(pieces).collect())
    }

    /// Returns the bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(form, len)| form.bytes(*len)).sum()
    }

    /// Returns the bytes of the largest piece.
    pub fn largest_piece(&self) -> u64 {
        self.0.iter().map(|(form, len)| form.bytes(*len)).max().unwrap_or(0)
    }
}

/// The moments of all pieces.
#[derive(Debug)]
pub struct State {
    layout: Layout,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(Vec<Moments>),
    /// One after the other, and room for one of them in each form.
    File {
        file: File,
        float: Moments,
        eight_bit: Moments,
    },
}

impl State {
    /// Returns moments that are zero, in a file of zeros where there is one.
    pub fn new(layout: Layout, file: Option<File>) -> Self {
        let of_piece = |(form, len): &(Form, usize)| {
            let mut moments = Moments::empty(*form);
            moments.resize(*len);
            moments
        };
        let place = match file {
            None => Place::Memory(layout.0.iter().map(of_piece).collect()),
            Some(file) => {
                let [float, eight_bit] = [Form::Float, Form::EightBit].map(Moments::empty);
                Place::File { file, float, eight_bit }
            }
        };
        Self { layout, place }
    }

    /// Returns the bytes that are in memory.
    pub fn memory_bytes(&self) -> u64 {
        match self.place {
            Place::Memory(_) => self.layout.bytes(),
            Place::File { .. } => self.layout.largest_piece(),
        }
    }

    /// Calls `work` with the moments of each piece and with what comes with it, in order.
    ///
    /// # Errors
    /// Those of the file.
    pub fn for_each<T>(&mut self, with: impl Iterator<Item = T>, mut work: impl FnMut(&mut Moments, T)) -> Result<()> {
        match &mut self.place {
            Place::Memory(pieces) => pieces.iter_mut().zip(with).for_each(|(moments, with)| work(moments, with)),
            Place::File { file, float, eight_bit } => {
                let failed = Error::at("the optimizer's state, a file in the data folder");
                let work_through = || {
                    let mut start = 0;
                    for ((form, len), with) in self.layout.0.iter().zip(with) {
                        let moments = match form {
                            Form::Float => &mut *float,
                            Form::EightBit => &mut *eight_bit,
                        };
                        moments.resize(*len);
                        let mut at = start;
                        for part in moments.bytes_mut() {
                            file.read_exact_at(part, at)?;
                            at += part.len() as u64;
                        }
                        work(moments, with);
                        for part in moments.bytes_mut() {
                            file.write_all_at(part, start)?;
                            start += part.len() as u64;
                        }
                    }
                    Ok(())
                };
                work_through().map_err(failed)?;
            }
        }
        Ok(())
    }
}
