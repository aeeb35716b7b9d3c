//! Reads the tensors of a base's files once, in their order: a thread reads and hashes pieces, and the cores pack them. What is in memory is the
//! packed matrices and a few pieces.

use std::io::{Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::gguf::unreadable;
use super::plan::{Planned, restored_order};
use super::quantise::Quantiser;
use crate::arch::decoder::{FactorKind, Slot};
use crate::arch::unsupported;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::format::{NestedScales, QType};
use crate::kernels::nf4_packer::Nf4Packer;
use crate::kernels::packed::{PackedMatrix, Packer};

/// About how many bytes are read at a time.
const PIECE: usize = 2 << 20;

/// Pieces that may wait to be packed.
const WAITING: usize = 3;

/// Rows of which pieces are made, where heads do not say it.
const ROWS: usize = 16;

/// Is told how many bytes have been read, and of how many.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// What the files hold, by the decoder's numbers.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) embedding: Option<PackedMatrix>,
    pub(super) head: Option<PackedMatrix>,
    pub(super) matrices: Vec<Option<PackedMatrix>>,
    pub(super) biases: Vec<Option<Vec<f32>>>,
    pub(super) norms: Vec<Option<Vec<f32>>>,
    /// For all contexts, for short ones, for long ones.
    pub(super) factors: [Option<Vec<f32>>; 3],
}

/// A piece of a tensor: whole rows, and its tensor's number.
struct Piece {
    tensor: usize,
    bytes: Arc<Vec<u8>>,
}

/// Reads the tensors of files that have so many bytes each; gives the files' digests too.
pub(super) fn read<R: Read + Seek + Send>(
    files: &mut [(R, u64)],
    plan: &[Planned],
    quantiser: Option<&Quantiser>,
    progress: &mut Progress<'_>,
) -> Result<(Parts, Vec<Digest>)> {
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let (pieces, come) = sync_channel(WAITING);
    let (give_back, spare) = channel();
    std::thread::scope(|scope| {
        let reader = Reading { plan, pieces, spare };
        let reader = std::thread::Builder::new().name("tenora-load".into()).spawn_scoped(scope, || reader.run(files));
        let reader = reader.map_err(Error::internal)?;
        let mut assembly = Assembly { plan, quantiser, parts: Parts::default(), done: 0, total, progress };
        let packed = assembly.run(&come, &give_back);
        // Where packing has failed, the reader ends for want of who takes its pieces.
        drop((come, give_back));
        let digests = reader.join().map_err(|_| Error::internal("the thread that reads the base has panicked"))?;
        packed?;
        let digests = digests?;
        (assembly.progress)(total, total);
        Ok((assembly.parts, digests))
    })
}

/// The thread that reads.
struct Reading<'a> {
    plan: &'a [Planned],
    pieces: SyncSender<Piece>,
    spare: Receiver<Arc<Vec<u8>>>,
}

impl Reading<'_> {
    fn run<R: Read + Seek>(self, files: &mut [(R, u64)]) -> Result<Vec<Digest>> {
        let mut digests = Vec::with_capacity(files.len());
        for (number, (file, bytes)) in files.iter_mut().enumerate() {
            file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
            let (mut hasher, mut at) = (Sha256::new(), 0);
            let of_file = self.plan.iter().enumerate().filter(|(_, tensor)| tensor.info.file == number);
            for (tensor, planned) in of_file {
                skip(file, &mut hasher, planned.info.start - at)?;
                if self.tensor(file, &mut hasher, tensor, planned)?.is_break() {
                    return Ok(digests);
                }
                at = planned.info.start + planned.info.bytes;
            }
            skip(file, &mut hasher, *bytes - at)?;
            digests.push(hasher.into());
        }
        Ok(digests)
    }

    /// Reads a tensor; breaks off where nobody takes it.
    fn tensor(
        &self,
        file: &mut impl Read,
        hasher: &mut Sha256,
        number: usize,
        planned: &Planned,
    ) -> Result<ControlFlow<()>> {
        let mut left = usize::try_from(planned.info.bytes).map_err(Error::internal)?;
        let mut piece = if planned.qtype.is_nested() { planned.nested_bytes() } else { planned.piece_bytes() };
        while left > 0 {
            let mut bytes = self.spare.try_recv().ok().and_then(Arc::into_inner).unwrap_or_default();
            bytes.resize(piece.min(left), 0);
            piece = planned.piece_bytes();
            file.read_exact(&mut bytes).map_err(unreadable)?;
            left -= bytes.len();
            let bytes = Arc::new(bytes);
            if self.pieces.send(Piece { tensor: number, bytes: bytes.clone() }).is_err() {
                return Ok(ControlFlow::Break(()));
            }
            hasher.update(&*bytes);
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Hashes what lies between tensors.
fn skip(file: &mut impl Read, hasher: &mut Sha256, mut bytes: u64) -> Result<()> {
    let mut buffer = vec![0; PIECE.min(usize::try_from(bytes).unwrap_or(PIECE))];
    while bytes > 0 {
        let len = buffer.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        file.read_exact(&mut buffer[..len]).map_err(unreadable)?;
        hasher.update(&buffer[..len]);
        bytes -= len as u64;
    }
    Ok(())
}

impl Planned {
    /// Bytes of the nested scales, a piece of their own before the rows, where the format has them.
    fn nested_bytes(&self) -> usize {
        self.qtype.nested_bytes(self.rows, self.cols)
    }

    /// Bytes of a row as it is stored.
    fn row_bytes(&self) -> usize {
        (self.info.bytes as usize - self.nested_bytes()) / self.rows
    }

    /// Rows that stay together.
    fn unit(&self) -> usize {
        match self.heads {
            0 => ROWS,
            heads => (self.rows / heads).max(1),
        }
    }

    /// Bytes of all pieces but the last one.
    fn piece_bytes(&self) -> usize {
        let unit = self.unit().saturating_mul(self.row_bytes());
        (PIECE / unit).max(1).saturating_mul(unit)
    }
}

/// Puts pieces together.
struct Assembly<'a, 'p> {
    plan: &'a [Planned],
    quantiser: Option<&'a Quantiser>,
    parts: Parts,
    done: u64,
    total: u64,
    progress: &'a mut Progress<'p>,
}

impl Assembly<'_, '_> {
    fn run(&mut self, pieces: &Receiver<Piece>, give_back: &Sender<Arc<Vec<u8>>>) -> Result<()> {
        for (number, planned) in self.plan.iter().enumerate() {
            let mut left = planned.info.bytes;
            let mut next = || -> Result<Option<Arc<Vec<u8>>>> {
                if left == 0 {
                    return Ok(None);
                }
                // Where the reader has ended early, its error is the one that counts.
                let piece = pieces.recv().map_err(|_| Error::internal("the base's file could not be read"))?;
                debug_assert_eq!(piece.tensor, number, "pieces come in order");
                left -= piece.bytes.len() as u64;
                self.done += piece.bytes.len() as u64;
                (self.progress)(self.done.min(self.total), self.total);
                Ok(Some(piece.bytes))
            };
            if planned.slot.is_matrix() {
                let matrix = matrix(planned, self.quantiser, &mut next, give_back)?;
                self.parts.put_matrix(planned.slot, matrix);
            } else {
                let values = vector(planned, &mut next, give_back)?;
                self.parts.put_vector(planned.slot, values);
            }
        }
        Ok(())
    }
}

type Next<'a> = dyn FnMut() -> Result<Option<Arc<Vec<u8>>>> + 'a;

fn matrix(
    planned: &Planned,
    quantiser: Option<&Quantiser>,
    next: &mut Next<'_>,
    give_back: &Sender<Arc<Vec<u8>>>,
) -> Result<PackedMatrix> {
    let held = quantiser.map_or(planned.qtype, |quantiser| quantiser.format_of(planned));
    match quantiser.filter(|_| held != planned.qtype) {
        None => {
            let nested = if held.is_nested() { next()? } else { None };
            let nested = nested.as_ref().map_or(&[][..], |bytes| bytes);
            if !NestedScales::of_bytes(nested).is_sound() {
                return Err(unsupported(&planned.name, "has a scale that is not a number: the file is damaged"));
            }
            let mut packer = Packer::nested(held, planned.rows, planned.cols, nested);
            each_piece(planned, next, give_back, |rows| packer.push(rows))?;
            Ok(packer.finish())
        }
        Some(quantiser) if held == QType::NF4 => {
            let mut packer = Nf4Packer::new(planned.rows, planned.cols);
            let mut values = Vec::new();
            each_piece(planned, next, give_back, |rows| {
                exact_values(planned, rows, &mut values);
                packer.push(&values);
            })?;
            let (matrix, cost) = packer.finish().map_err(|e| unsupported(&planned.name, e.to_string()))?;
            quantiser.add(cost);
            Ok(matrix)
        }
        Some(quantiser) => {
            let mut packer = Packer::new(held, planned.rows, planned.cols);
            let mut quantised = Vec::new();
            each_piece(planned, next, give_back, |rows| {
                quantiser.quantise(planned, rows, &mut quantised);
                packer.push(&quantised);
            })?;
            Ok(packer.finish())
        }
    }
}

/// Takes a matrix's pieces, rows in Hugging Face's order.
fn each_piece(
    planned: &Planned,
    next: &mut Next<'_>,
    give_back: &Sender<Arc<Vec<u8>>>,
    mut take: impl FnMut(&[u8]),
) -> Result<()> {
    let (mut ordered, mut row) = (Vec::new(), 0);
    while let Some(piece) = next()? {
        check_piece(planned, &piece, row)?;
        row += piece.len() / planned.row_bytes();
        if planned.heads > 0 {
            restore_order(planned, &piece, &mut ordered);
            take(&ordered);
        } else {
            take(&piece);
        }
        // The reader is gone where it has read all.
        let _ = give_back.send(piece);
    }
    Ok(())
}

/// The values of rows of any format, on all cores.
fn exact_values(planned: &Planned, rows: &[u8], values: &mut Vec<f32>) {
    let (row_bytes, cols) = (planned.row_bytes(), planned.cols);
    values.resize(rows.len() / row_bytes * cols, 0.0);
    let of_rows = rows.par_chunks_exact(row_bytes).zip(values.par_chunks_exact_mut(cols));
    of_rows.for_each(|(row, values)| planned.qtype.dequantize_row(row, values));
}

/// Refuses blocks whose numbers are none; the piece begins at `row`.
fn check_piece(planned: &Planned, piece: &[u8], row: usize) -> Result<()> {
    let row_bytes = planned.row_bytes();
    let broken = |(_, bytes): &(usize, &[u8])| planned.qtype.broken_block(bytes).is_some();
    match piece.par_chunks(row_bytes).with_min_len((1 << 16) / row_bytes + 1).enumerate().find_first(broken) {
        None => Ok(()),
        Some((at, _)) => {
            let message =
                format!("has a scale or a value that is not a number, in row {}: the file is damaged", row + at);
            Err(unsupported(&planned.name, message))
        }
    }
}

/// Puts the rows of whole heads in Hugging Face's order.
fn restore_order(planned: &Planned, rows: &[u8], ordered: &mut Vec<u8>) {
    let (row_bytes, head_rows) = (planned.row_bytes(), planned.unit());
    ordered.clear();
    for head in rows.chunks_exact(head_rows * row_bytes) {
        for row in restored_order(head_rows) {
            ordered.extend_from_slice(&head[row * row_bytes..][..row_bytes]);
        }
    }
}

fn vector(planned: &Planned, next: &mut Next<'_>, give_back: &Sender<Arc<Vec<u8>>>) -> Result<Vec<f32>> {
    let (qtype, cols) = (planned.qtype, planned.cols);
    let mut values = Vec::with_capacity(cols);
    while let Some(piece) = next()? {
        let from = values.len();
        values.resize(from + piece.len() / qtype.file_block().1, 0.0);
        float_values(qtype, &piece, &mut values[from..]);
        let _ = give_back.send(piece);
    }
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        let message = format!("holds {} at element {at}: the file is damaged", values[at]);
        return Err(unsupported(&planned.name, message));
    }
    if matches!(planned.slot, Slot::Factors(_)) && values.iter().any(|factor| *factor <= 0.0) {
        return Err(unsupported(&planned.name, "holds a factor that is not over 0: the file is damaged"));
    }
    if let Some(of_head) = cols.checked_div(planned.heads) {
        let order: Vec<_> = restored_order(of_head).collect();
        values = values.chunks_exact(order.len()).flat_map(|head| order.iter().map(|row| head[*row])).collect();
    }
    Ok(values)
}

/// The values of some floats of any format of floats, of any number.
pub(super) fn float_values(qtype: QType, bytes: &[u8], out: &mut [f32]) {
    match qtype {
        QType::F32 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        QType::F16 => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = half::f16::from_le_bytes(*bytes).to_f32();
            }
        }
        _ => {
            for (bytes, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = half::bf16::from_le_bytes(*bytes).to_f32();
            }
        }
    }
}

impl Parts {
    fn put_matrix(&mut self, slot: Slot, matrix: PackedMatrix) {
        match slot {
            Slot::Embedding => self.embedding = Some(matrix),
            Slot::Head => self.head = Some(matrix),
            Slot::Matrix(id) => put(&mut self.matrices, id, matrix),
            Slot::Bias(_) | Slot::Norm(_) | Slot::Factors(_) => {}
        }
    }

    pub(super) fn put_vector(&mut self, slot: Slot, values: Vec<f32>) {
        match slot {
            Slot::Bias(id) => put(&mut self.biases, id, values),
            Slot::Norm(id) => put(&mut self.norms, id, values),
            Slot::Factors(FactorKind::All) => self.factors[0] = Some(values),
            Slot::Factors(FactorKind::Short) => self.factors[1] = Some(values),
            Slot::Factors(FactorKind::Long) => self.factors[2] = Some(values),
            Slot::Embedding | Slot::Head | Slot::Matrix(_) => {}
        }
    }
}

fn put<T>(list: &mut Vec<Option<T>>, at: usize, value: T) {
    if list.len() <= at {
        list.resize_with(at + 1, || None);
    }
    list[at] = Some(value);
}
