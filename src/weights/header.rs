//! The header of a GGUF file, read within bounds: no length, count or offset is believed before the file is seen to be as long. What is kept
//! is as long as it is in the file.
//!
//! The file: `GGUF`, a version, the number of tensors and of metadata entries; the entries (key, type, value); the tensors (name, dimensions,
//! type, offset); and from the next multiple of the alignment on the tensors' bytes. Integers are little-endian.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};

use super::gguf::unreadable;
use crate::error::{Error, Result};
use crate::kernels::format::{NestedScales, QType};

/// Most bytes of a header. Vocabularies of 256,000 tokens take 10 MB.
const MAX_HEADER_BYTES: u64 = 256 << 20;

/// Most metadata entries, and most tensors.
const MAX_ENTRIES: u64 = 1 << 16;

/// Most bytes of a key or of a tensor's name.
const MAX_NAME_BYTES: u64 = 1 << 10;

/// Most dimensions of a tensor.
const MAX_DIMENSIONS: u32 = 4;

/// Where tensors begin, as a file says it.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";

/// Where tensors begin when the file says nothing of it.
pub(super) const ALIGNMENT: u64 = 32;

/// The largest alignment that is taken for one.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// How a tensor's values are stored: blocks of so many values and so many bytes, with nested scales before them or without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) name: &'static str,
    values: u64,
    bytes: u64,
    nested: bool,
}

/// The types of tensors that are not served as matrices, by their numbers in the file; the others are in [`QType`].
const OTHER_STORAGES: [(u32, &str, u64, u64); 23] = [
    (9, "Q8_1", 32, 36),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (31, "Q4_0_4_4", 32, 18),
    (32, "Q4_0_4_8", 32, 18),
    (33, "Q4_0_8_8", 32, 18),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (36, "IQ4_NL_4_4", 32, 18),
    (37, "IQ4_NL_4_8", 32, 18),
    (38, "IQ4_NL_8_8", 32, 18),
    (39, "MXFP4", 32, 17),
];

impl Storage {
    pub(super) fn of(number: u32) -> Option<Self> {
        if let Some(qtype) = QType::of_number(number) {
            let (values, bytes) = qtype.file_block();
            let (values, bytes) = (values as u64, bytes as u64);
            return Some(Self { name: qtype.name(), values, bytes, nested: qtype.is_nested() });
        }
        let found = OTHER_STORAGES.iter().find(|(of, ..)| *of == number);
        found.map(|(_, name, values, bytes)| Self { name, values: *values, bytes: *bytes, nested: false })
    }

    /// Bytes of so many values, whole blocks; `None` where there can't be as many.
    fn bytes_of(self, values: u64) -> Option<u64> {
        let blocks = values / self.values;
        let nested = if self.nested { NestedScales::bytes_of(usize::try_from(blocks).ok()?) } else { 0 };
        blocks.checked_mul(self.bytes)?.checked_add(nested as u64)
    }

    /// Bytes of a value, of formats of floats.
    pub(super) fn value_bytes(self) -> u64 {
        self.bytes / self.values
    }
}

/// A tensor of the file. It lies within the file, and no other overlaps it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorInfo {
    /// As in the file: the innermost first.
    pub(super) dims: Vec<u64>,
    pub(super) storage: Storage,
    /// Which of the base's files it is in.
    pub(super) file: usize,
    /// From the beginning of the file.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i64),
    /// Over what [`Value::Integer`] can hold.
    Large,
    Float(f64),
    Bool(bool),
    Text(Vec<u8>),
    /// The values' kind, their number, and their bytes in the file.
    List(Kind, usize, Vec<u8>),
}

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Integer { bytes: usize, signed: bool },
    Float { bytes: usize },
    Bool,
    Text,
    List,
}

impl Kind {
    /// All types; a type's place is its number in the file.
    const ALL: [Self; 13] = [
        Self::Integer { bytes: 1, signed: false },
        Self::Integer { bytes: 1, signed: true },
        Self::Integer { bytes: 2, signed: false },
        Self::Integer { bytes: 2, signed: true },
        Self::Integer { bytes: 4, signed: false },
        Self::Integer { bytes: 4, signed: true },
        Self::Float { bytes: 4 },
        Self::Bool,
        Self::Text,
        Self::List,
        Self::Integer { bytes: 8, signed: false },
        Self::Integer { bytes: 8, signed: true },
        Self::Float { bytes: 8 },
    ];

    fn of(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    fn number(self) -> u32 {
        Self::ALL.iter().position(|kind| *kind == self).unwrap_or_default() as u32
    }

    /// Bytes of a value; `None` where they differ.
    fn bytes(self) -> Option<usize> {
        match self {
            Self::Integer { bytes, .. } | Self::Float { bytes } => Some(bytes),
            Self::Bool => Some(1),
            Self::Text | Self::List => None,
        }
    }

    /// A value of so many bytes.
    fn value(self, bytes: &[u8]) -> Value {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        match self {
            Self::Integer { signed: false, .. } => i64::try_from(unsigned).map_or(Value::Large, Value::Integer),
            Self::Integer { bytes, .. } => {
                let unused = 64 - 8 * bytes as u32;
                Value::Integer((unsigned << unused) as i64 >> unused)
            }
            Self::Float { bytes: 4 } => Value::Float(f32::from_bits(unsigned as u32).into()),
            Self::Float { .. } => Value::Float(f64::from_bits(unsigned)),
            Self::Bool => Value::Bool(unsigned != 0),
            Self::Text | Self::List => Value::Text(bytes.to_vec()),
        }
    }
}

impl Value {
    /// The values of a list of integers.
    pub(super) fn integers(&self) -> Option<Vec<i64>> {
        let Self::List(kind @ Kind::Integer { bytes, .. }, _, data) = self else { return None };
        let values = data.chunks_exact(*bytes).map(|bytes| match kind.value(bytes) {
            Self::Integer(value) => Some(value),
            _ => None,
        });
        values.collect()
    }

    /// The values of a list of yes and no, also where they are whole numbers.
    pub(super) fn flags(&self) -> Option<Vec<bool>> {
        match self {
            Self::List(Kind::Bool, _, data) => Some(data.iter().map(|byte| *byte != 0).collect()),
            _ => self.integers().map(|values| values.into_iter().map(|value| value != 0).collect()),
        }
    }

    /// The values of a list of numbers.
    pub(super) fn numbers(&self) -> Option<Vec<f32>> {
        let Self::List(kind @ (Kind::Float { bytes } | Kind::Integer { bytes, .. }), _, data) = self else {
            return None;
        };
        let values = data.chunks_exact(*bytes).map(|bytes| match kind.value(bytes) {
            Self::Float(value) => Some(value as f32),
            Self::Integer(value) => Some(value as f32),
            _ => None,
        });
        values.collect()
    }

    /// The values of a list of texts.
    pub(super) fn texts(&self) -> Option<Vec<String>> {
        let Self::List(Kind::Text, count, data) = self else { return None };
        let (mut texts, mut rest) = (Vec::with_capacity(*count), data.as_slice());
        while let Some((len, after)) = rest.split_first_chunk::<8>() {
            let (text, after) = after.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
            texts.push(String::from_utf8(text.to_vec()).ok()?);
            rest = after;
        }
        Some(texts)
    }
}

/// What a file says before its tensors.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

/// A refusal of a broken file. The caller adds which file it is.
fn broken(what: impl std::fmt::Display) -> Error {
    let message = format!("{what}: the file is damaged, truncated, or no GGUF file; fetch it again");
    Error::invalid_because("BASE_UNREADABLE", "base", message)
}

impl Header {
    /// Reads the header of a file from its beginning.
    ///
    /// # Errors
    /// BASE_UNREADABLE where it is none, ends too early, or says what cannot be.
    pub(super) fn read(file: &mut (impl Read + Seek)) -> Result<Self> {
        let file_bytes = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
        file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
        let mut reader = Reader { file, left: file_bytes.min(MAX_HEADER_BYTES), at: 0, wide: true };
        if reader.array()? != *b"GGUF" {
            return Err(broken("it does not begin with \"GGUF\""));
        }
        match reader.u32()? {
            1 => reader.wide = false,
            2 | 3 => {}
            other if other.swap_bytes() <= 3 => {
                return Err(broken("it is in the byte order of another machine (big-endian)"));
            }
            other => return Err(broken(format!("it is of version {other}; versions 1 to 3 can be read"))),
        }
        let (tensors, entries) =
            (reader.count("tensors", MAX_ENTRIES)?, reader.count("metadata entries", MAX_ENTRIES)?);
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = reader.name()?;
            let value = reader.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(broken(format!("it says {key} twice")));
            }
        }
        let mut found = BTreeMap::new();
        for _ in 0..tensors {
            let (name, info) = reader.tensor()?;
            if found.insert(name.clone(), info).is_some() {
                return Err(broken(format!("it has the tensor {name} twice")));
            }
        }
        let start = reader.at.next_multiple_of(alignment(&metadata)?);
        place(&mut found, start, file_bytes, alignment(&metadata)?)?;
        Ok(Self { metadata, tensors: found })
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(ALIGNMENT),
        Some(Value::Integer(value)) if (8..=MAX_ALIGNMENT as i64).contains(value) && value.count_ones() == 1 => {
            Ok(*value as u64)
        }
        Some(other) => {
            Err(broken(format!("{ALIGNMENT_KEY} is {other:?}; must be a power of two from 8 to {MAX_ALIGNMENT}")))
        }
    }
}

/// Gives the tensors their places in the file, and refuses what lies outside of it or over another.
fn place(tensors: &mut BTreeMap<String, TensorInfo>, start: u64, file_bytes: u64, alignment: u64) -> Result<()> {
    let mut by_place: Vec<_> = tensors.iter_mut().collect();
    by_place.sort_by_key(|(_, info)| info.start);
    let mut end = start;
    for (name, info) in by_place {
        if !info.start.is_multiple_of(alignment) {
            return Err(broken(format!("the tensor {name} begins at {}, no multiple of {alignment}", info.start)));
        }
        let begins = info.start.checked_add(start);
        let (Some(begins), Some(ends)) = (begins, begins.and_then(|begins| begins.checked_add(info.bytes))) else {
            return Err(broken(format!("the tensor {name} lies beyond the end of the file")));
        };
        if ends > file_bytes {
            return Err(broken(format!("the tensor {name} ends at byte {ends}, and the file at {file_bytes}")));
        }
        if begins < end {
            return Err(broken(format!("the tensor {name} overlaps the one before it")));
        }
        (info.start, end) = (begins, ends);
    }
    Ok(())
}

struct Reader<'a, R> {
    file: &'a mut R,
    /// Bytes that the file or the bound still has.
    left: u64,
    at: u64,
    /// Lengths have eight bytes, not four.
    wide: bool,
}

impl<R: Read> Reader<'_, R> {
    fn take(&mut self, to: &mut [u8]) -> Result<()> {
        let ends = || broken("it ends within its header");
        self.left = self.left.checked_sub(to.len() as u64).ok_or_else(ends)?;
        self.at += to.len() as u64;
        self.file.read_exact(to).map_err(|_| ends())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    /// Bytes of a length that the file gives: none are made room for that it does not have.
    fn bytes(&mut self, what: &str, len: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(len).ok().filter(|len| *len as u64 <= self.left);
        let mut bytes = vec![0; len.ok_or_else(|| broken(format!("{what} is longer than the rest of the file")))?];
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn length(&mut self) -> Result<u64> {
        if self.wide { self.u64() } else { self.u32().map(u64::from) }
    }

    fn count(&mut self, what: &str, most: u64) -> Result<u64> {
        match self.length()? {
            count if count > most => {
                Err(broken(format!("it says that it has {count} {what}; at most {most} are read")))
            }
            count => Ok(count),
        }
    }

    fn text(&mut self, what: &str) -> Result<Vec<u8>> {
        let len = self.length()?;
        self.bytes(what, len)
    }

    fn name(&mut self) -> Result<String> {
        let len = self.length()?;
        if len > MAX_NAME_BYTES {
            return Err(broken(format!("a name has {len} bytes; at most {MAX_NAME_BYTES} are read")));
        }
        let name = self.bytes("a name", len)?;
        String::from_utf8(name).map_err(|_| broken("a name is no UTF-8"))
    }

    fn kind(&mut self, key: &str) -> Result<Kind> {
        let number = self.u32()?;
        Kind::of(number).ok_or_else(|| broken(format!("{key} is of type {number}, which does not exist")))
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        match self.kind(key)? {
            Kind::Text => {
                let mut text = self.text(key)?;
                // Some writers end it with zeros.
                let len = text.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                text.truncate(len);
                Ok(Value::Text(text))
            }
            Kind::List => self.list(key),
            kind => {
                let bytes = self.bytes(key, kind.bytes().unwrap_or_default() as u64)?;
                Ok(kind.value(&bytes))
            }
        }
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let (kind, count) = (self.kind(key)?, self.length()?);
        let beyond =
            || broken(format!("{key} says that it has {count} values, more than the rest of the file can hold"));
        let data = match kind {
            Kind::List => return Err(broken(format!("{key} is a list of lists, which cannot be read"))),
            Kind::Text => self.texts(key, count, beyond)?,
            kind => {
                let len = count.checked_mul(kind.bytes().unwrap_or(1) as u64).filter(|len| *len <= self.left);
                self.bytes(key, len.ok_or_else(beyond)?)?
            }
        };
        Ok(Value::List(kind, usize::try_from(count).map_err(|_| beyond())?, data))
    }

    /// Texts end to end, each after its length in eight bytes.
    fn texts(&mut self, key: &str, count: u64, beyond: impl Fn() -> Error) -> Result<Vec<u8>> {
        let width = if self.wide { 8 } else { 4 };
        if count.checked_mul(width).is_none_or(|least| least > self.left) {
            return Err(beyond());
        }
        let mut data = Vec::new();
        for _ in 0..count {
            let text = self.text(key)?;
            data.extend((text.len() as u64).to_le_bytes());
            data.extend(text);
        }
        Ok(data)
    }

    fn tensor(&mut self) -> Result<(String, TensorInfo)> {
        let name = self.name()?;
        let dimensions = self.u32()?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(broken(format!("the tensor {name} has {dimensions} dimensions")));
        }
        let dims = (0..dimensions).map(|_| self.length()).collect::<Result<Vec<_>>>()?;
        let (number, start) = (self.u32()?, self.u64()?);
        let unknown = || broken(format!("the tensor {name} is of type {number}, which is not known"));
        let storage = Storage::of(number).ok_or_else(unknown)?;
        let values = dims.iter().try_fold(1_u64, |values, dim| values.checked_mul(*dim));
        let rows = dims.first().is_some_and(|row| row.is_multiple_of(storage.values));
        let bytes = values.filter(|values| rows && *values > 0).and_then(|values| storage.bytes_of(values));
        let bytes = bytes
            .ok_or_else(|| broken(format!("the tensor {name} cannot have the shape {dims:?} as {}", storage.name)))?;
        Ok((name, TensorInfo { dims, storage, file: 0, start, bytes }))
    }
}

/// Writes the header of a file of version 3 with these entries and tensors (name, dimensions, format), which follow it in their order, each at
/// the next multiple of [`ALIGNMENT`].
pub(super) fn write_header<'t>(
    metadata: &BTreeMap<String, Value>,
    tensors: impl ExactSizeIterator<Item = (&'t str, Vec<u64>, QType)>,
) -> Vec<u8> {
    let mut header = b"GGUF".to_vec();
    header.extend(3_u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut header, key.as_bytes());
        value.put(&mut header);
    }
    let mut at = 0_u64;
    for (name, dims, qtype) in tensors {
        put_text(&mut header, name.as_bytes());
        header.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| header.extend(dim.to_le_bytes()));
        header.extend(qtype.number().to_le_bytes());
        header.extend(at.to_le_bytes());
        let bytes = Storage::of(qtype.number()).and_then(|storage| storage.bytes_of(dims.iter().product()));
        at += bytes.unwrap_or_default().next_multiple_of(ALIGNMENT);
    }
    header
}

/// Returns the zeros that stand before a tensor that would begin here.
pub(super) fn padding(at: u64) -> &'static [u8] {
    &[0; ALIGNMENT as usize][..(at.next_multiple_of(ALIGNMENT) - at) as usize]
}

fn put_text(to: &mut Vec<u8>, text: &[u8]) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text);
}

impl Value {
    /// Writes its type and itself, so that it is read as the same value: in 32 bits where it fits them, which is what other programs ask for.
    fn put(&self, to: &mut Vec<u8>) {
        let mut number = |kind: Kind, bytes: &[u8]| {
            to.extend(kind.number().to_le_bytes());
            to.extend(bytes);
        };
        match self {
            Self::Integer(value) => match (u32::try_from(*value), i32::try_from(*value)) {
                (Ok(value), _) => number(Kind::Integer { bytes: 4, signed: false }, &value.to_le_bytes()),
                (_, Ok(value)) => number(Kind::Integer { bytes: 4, signed: true }, &value.to_le_bytes()),
                _ => number(Kind::Integer { bytes: 8, signed: true }, &value.to_le_bytes()),
            },
            Self::Large => number(Kind::Integer { bytes: 8, signed: false }, &u64::MAX.to_le_bytes()),
            Self::Float(value) if f64::from(*value as f32) == *value => {
                number(Kind::Float { bytes: 4 }, &(*value as f32).to_le_bytes());
            }
            Self::Float(value) => number(Kind::Float { bytes: 8 }, &value.to_le_bytes()),
            Self::Bool(value) => {
                to.extend(Kind::Bool.number().to_le_bytes());
                to.push(u8::from(*value));
            }
            Self::Text(text) => {
                to.extend(Kind::Text.number().to_le_bytes());
                put_text(to, text);
            }
            Self::List(kind, count, data) => {
                to.extend(Kind::List.number().to_le_bytes());
                to.extend(kind.number().to_le_bytes());
                to.extend((*count as u64).to_le_bytes());
                to.extend(data);
            }
        }
    }
}
