//! [`PackedAdapter`] as a file, so that a version is brought into memory by one read and no arithmetic. It is derived from a version's
//! PEFT files, which stay what counts: one that is missing, damaged, of another format or of another machine's byte order is made again.
//!
//! The file: [`MAGIC`], the version's digest, the form and the number of virtual tokens, the numbers of tokens with rows of the embedding and of the head, the number of layers, (index, rank, what else is scaled, which bias there is, the non-linearity of a bottleneck, scale) of each, the tensors as they lie in memory, and a
//! CRC-32 of all that. A checksum and not SHA-256: it is there to find damage, and SHA-256 takes six times as long as all the rest of a
//! load. What the digest promises was checked when the file was made.

use std::io::{self, Read};

use crc32fast::Hasher;

use crate::adapter::packed::{Beside, BiasPart, Layout, ScaledPart, Values, place};
use crate::adapter::{BaseShape, PackedAdapter, Site, VirtualForm};
use crate::ids::Digest;
use crate::request::NonLinearity;

/// Ends in the number of the format.
const MAGIC: &[u8; 16] = b"tenora packed 04";

/// Bytes read and hashed at a time: they are still in the cache when they are hashed.
const PIECE: usize = 256 << 10;

/// A file that does not hold what it should.
fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl PackedAdapter {
    /// The file of the version of this digest.
    pub fn to_file(&self, digest: Digest) -> Vec<u8> {
        let layers = self.places().iter().enumerate().filter_map(|(at, place)| Some((at, place.as_ref()?)));
        let mut file = MAGIC.to_vec();
        file.extend(digest.hex().bytes());
        // 0 where there are none.
        let form = |form| 1 + VirtualForm::ALL.iter().position(|of| *of == form).unwrap_or_default();
        let beside = self.beside();
        let (form, count) = beside.virtual_tokens.as_ref().map_or((0, 0), |place| (form(place.form), place.count));
        let [embedding, head] = beside.tokens.each_ref().map(|place| place.as_ref().map_or(0, |place| place.count));
        file.extend([form, count, embedding, head].iter().flat_map(|x| (*x as u32).to_ne_bytes()));
        file.extend((layers.clone().count() as u32).to_ne_bytes());
        for (at, place) in layers {
            // 0 where nothing is.
            let part = |part| 1 + ScaledPart::ALL.iter().position(|of| *of == part).unwrap_or_default();
            let scaled = place.scaled.as_ref().map_or(0, |of| part(of.0));
            let non_linearity = |which| 1 + NonLinearity::ALL.iter().position(|of| *of == which).unwrap_or_default();
            let bottleneck = place.bottleneck.as_ref().map_or(0, |of| non_linearity(of.0));
            let bias = |part| 1 + BiasPart::ALL.iter().position(|of| *of == part).unwrap_or_default();
            let bias = place.bias.as_ref().map_or(0, |of| bias(of.0));
            let numbers = [at, place.rank, scaled, bias, bottleneck].map(|x| x as u32);
            file.extend(numbers.iter().chain([&place.scale.to_bits()]).flat_map(|x| x.to_ne_bytes()));
        }
        file.extend(bytemuck::cast_slice::<u16, u8>(self.values()));
        let checksum = crc32fast::hash(&file);
        file.extend(checksum.to_ne_bytes());
        file
    }

    /// Reads the file of the version of this digest, whose tensors take `bytes` in memory.
    pub fn from_file(file: impl Read, digest: Digest, bytes: u64, shape: &BaseShape) -> io::Result<Self> {
        let mut file = Checked { file, checksum: Hasher::new() };
        let (mut magic, mut of) = ([0; MAGIC.len()], [0; 64]);
        file.read(&mut magic)?;
        file.read(&mut of)?;
        if magic != *MAGIC || of != digest.hex().as_bytes() {
            return Err(damaged("is of another format or another version"));
        }
        let (form, count) = (file.number()? as usize, file.number()? as usize);
        let virtual_tokens = match form.checked_sub(1) {
            None => None,
            Some(form) => {
                let form =
                    VirtualForm::ALL.get(form).ok_or_else(|| damaged("has virtual tokens of an unknown form"))?;
                Some((*form, count))
            }
        };
        let tokens = [file.number()? as usize, file.number()? as usize];
        // Before anything is computed with it.
        let counts = virtual_tokens.iter().map(|(_, count)| count).chain(&tokens);
        if counts.into_iter().any(|count| *count as u64 > bytes) {
            return Err(damaged("does not fit the base"));
        }
        let sites = shape.layers as usize * shape.linears.len();
        let count = (file.number()? as usize).min(sites);
        let mut layer = || {
            let site = site(file.number()?, shape)?;
            let rank = file.number()? as usize;
            let scaled = match (file.number()? as usize).checked_sub(1) {
                None => None,
                Some(part) => Some(*ScaledPart::ALL.get(part).ok_or_else(|| damaged("scales what it cannot"))?),
            };
            let bias = match (file.number()? as usize).checked_sub(1) {
                None => None,
                Some(part) => Some(*BiasPart::ALL.get(part).ok_or_else(|| damaged("has a bias of an unknown kind"))?),
            };
            let bottleneck = match (file.number()? as usize).checked_sub(1) {
                None => None,
                Some(which) => {
                    Some(*NonLinearity::ALL.get(which).ok_or_else(|| damaged("has an unknown non-linearity"))?)
                }
            };
            let scale = f32::from_bits(file.number()?);
            Ok((site, Layout { rank, scale, scaled, bias, bottleneck }))
        };
        let layers = (0..count).map(|_| layer()).collect::<io::Result<Vec<_>>>()?;
        let beside = Beside { virtual_tokens, tokens };
        let (places, beside, len) = place(layers.into_iter(), beside, shape).map_err(|_| lacks())?;
        // Before anything is allocated for it.
        if 2 * len as u64 != bytes {
            return Err(damaged("does not fit the base"));
        }
        let mut values = Values::zeros(len);
        for piece in bytemuck::cast_slice_mut::<u16, u8>(values.get_mut()).chunks_mut(PIECE) {
            file.read(piece)?;
        }
        let checksum = file.checksum.clone().finalize();
        if file.number()? != checksum {
            return Err(damaged("has another checksum than it says"));
        }
        let packed = Self::of(places, beside, values);
        if !packed
            .token_ids()
            .all(|ids| ids.is_sorted() && ids.last().is_none_or(|id| (*id as usize) < shape.vocab_size))
        {
            return Err(damaged("has rows of tokens that the base lacks"));
        }
        Ok(packed)
    }
}

/// The site of a number of a file.
fn site(at: u32, shape: &BaseShape) -> io::Result<Site> {
    shape.sites().nth(at as usize).ok_or_else(lacks)
}

fn lacks() -> io::Error {
    damaged("names a layer that the base lacks")
}

/// A file and the checksum of what has been read of it.
struct Checked<R> {
    file: R,
    checksum: Hasher,
}

impl<R: Read> Checked<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact(to)?;
        self.checksum.update(to);
        Ok(())
    }

    fn number(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.read(&mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Adapter, RowNorms};
    use crate::arch::decoder::Slot;
    use crate::request::{BottleneckSpec, Ia3Spec, LoraSpec, PrefixSpec, Target};

    fn adapter() -> (PackedAdapter, BaseShape) {
        let dims = [(8, 8), (8, 20), (24, 4), (9, 17), (8, 16), (31, 33), (16, 8)];
        let shape = BaseShape::llama("base", Digest::of(b""), 2, dims);
        let spec = LoraSpec { rank: 3, targets: vec![Target::QProj, Target::DownProj], ..LoraSpec::default() };
        (PackedAdapter::new(&Adapter::fresh(&spec, &shape, 1).unwrap(), &shape, &RowNorms::new()).unwrap(), shape)
    }

    /// Pairs and what is scaled beside them, and scales alone.
    fn adapters() -> Vec<(PackedAdapter, BaseShape)> {
        let (plain, shape) = adapter();
        let dora = LoraSpec { rank: 2, use_dora: true, ..LoraSpec::default() };
        let mut dora = Adapter::fresh(&dora, &shape, 1).unwrap();
        let norms: RowNorms = dora.pairs().map(|(site, pair)| (site, vec![2.0; pair.b.len() / 2])).collect();
        dora.pairs_mut().for_each(|(_, pair)| pair.magnitude.iter_mut().flatten().for_each(|x| *x = 3.0));
        let biased = LoraSpec { rank: 2, lora_bias: true, ..LoraSpec::default() };
        let mut biased = Adapter::fresh(&biased, &shape, 1).unwrap();
        biased.pairs_mut().for_each(|(_, pair)| pair.bias.iter_mut().flatten().for_each(|x| *x = 3.0));
        biased.copies.insert(Slot::Bias(1), vec![4.0; 20]);
        let ia3 = Adapter::fresh(&Ia3Spec::default(), &shape, 1).unwrap();
        let placement = crate::request::Placement::Both;
        let bottleneck = BottleneckSpec { size: 3, placement, ..BottleneckSpec::default() };
        let bottleneck = Adapter::fresh(&bottleneck, &shape, 1).unwrap();
        let prefix = PrefixSpec { virtual_tokens: 3, ..PrefixSpec::default() };
        let mut prefix = Adapter::fresh(&prefix, &shape, 1).unwrap();
        prefix.tensors_mut().flatten().enumerate().for_each(|(i, x)| *x = i as f32);
        let packed = |adapter| PackedAdapter::new(&adapter, &shape, &norms).unwrap();
        let tokens = LoraSpec { rank: 2, trainable_token_indices: vec![3, 60], ..LoraSpec::default() };
        let mut tokens = Adapter::fresh(&tokens, &shape, 1).unwrap();
        tokens.tensors_mut().flatten().enumerate().for_each(|(i, x)| *x = i as f32);
        let others = [dora, biased, ia3, bottleneck, prefix, tokens].map(packed);
        std::iter::once(plain).chain(others).map(|packed| (packed, shape.clone())).collect()
    }

    #[test]
    fn a_file_gives_back_what_it_was_made_from() {
        for (packed, shape) in adapters() {
            let file = packed.to_file(Digest::of(b"x"));
            let read = PackedAdapter::from_file(&file[..], Digest::of(b"x"), packed.byte_size(), &shape).unwrap();
            assert_eq!((read.rank(), read.byte_size()), (packed.rank(), packed.byte_size()));
            assert_eq!(read.virtual_count(), packed.virtual_count());
            assert!(read.head_rows().eq(packed.head_rows()) && read.embedding(60) == packed.embedding(60));
            assert_eq!(read.virtual_kv(2, 1, 20), packed.virtual_kv(2, 1, 20));
            for site in 0..shape.sites().count() {
                assert_eq!((read.pair(site), read.scales(site)), (packed.pair(site), packed.scales(site)));
                assert_eq!((read.bottleneck(site), read.bias(site)), (packed.bottleneck(site), packed.bias(site)));
            }
        }
    }

    #[test]
    fn no_damage_passes() {
        let (packed, shape) = adapter();
        let file = packed.to_file(Digest::of(b"x"));
        let read = |file: &[u8], of: &[u8], bytes| PackedAdapter::from_file(file, Digest::of(of), bytes, &shape);
        assert!(read(&file, b"y", packed.byte_size()).is_err(), "another version's");
        assert!(read(&file, b"x", packed.byte_size() + 64).is_err());
        for len in [0, 10, 90, file.len() / 2, file.len() - 1] {
            assert!(read(&file[..len], b"x", packed.byte_size()).is_err(), "cut to {len}");
        }
        for at in (0..file.len()).step_by(3) {
            let mut file = file.clone();
            file[at] ^= 1 << (at % 8);
            assert!(read(&file, b"x", packed.byte_size()).is_err(), "damaged at {at}");
        }
    }
}
