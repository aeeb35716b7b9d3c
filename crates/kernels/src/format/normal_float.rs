//! NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): a value is the largest magnitude of its
//! block times one of 16 numbers, which are about equally likely where values are normal. As bitsandbytes quantises a
//! matrix flattened row by row: blocks go on over the ends of rows, and the last one may be short.

/// What the codes stand for, in parts of a block's largest magnitude, ascending.
pub const NF4_CODE: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// The code of zero, which all values of a block of zeros have.
const ZERO: u8 = 7;

/// The middle between each code's number and the next one's: what is above it belongs to the next.
const MIDDLES: [f32; 15] = {
    let mut middles = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        middles[i] = (NF4_CODE[i] + NF4_CODE[i + 1]) / 2.0;
        i += 1;
    }
    middles
};

/// Values whose codes are looked for side by side.
const LANES: usize = 16;

/// Quantises the values of a block, all finite, to codes from 0 to 15, one a byte; returns their largest magnitude.
pub fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let largest = values.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let inverse = 1.0 / largest;
    if !inverse.is_finite() {
        codes.fill(ZERO);
        return largest;
    }
    for (values, codes) in values.chunks(LANES).zip(codes.chunks_mut(LANES)) {
        let (mut parts, mut found) = ([0.0; LANES], [0u32; LANES]);
        parts.iter_mut().zip(values).for_each(|(part, x)| *part = x * inverse);
        for middle in MIDDLES {
            found.iter_mut().zip(&parts).for_each(|(code, part)| *code += u32::from(*part > middle));
        }
        codes.iter_mut().zip(found).for_each(|(code, found)| *code = found as u8);
    }
    largest
}

/// Some values as NF4.
#[derive(Debug, Clone, PartialEq)]
pub struct NormalFloats {
    /// The values' codes, two a byte, the first one in the high nibble.
    pub codes: Vec<u8>,
    /// The largest magnitude of each block, float32.
    pub absmax: Vec<f32>,
}

/// Quantises finite float32 values in blocks of `block`, an even number; the last block may be short.
pub fn quantize_nf4(values: &[f32], block: usize) -> NormalFloats {
    assert!(block > 0 && block.is_multiple_of(2), "two codes share a byte");
    let mut each = vec![0; values.len().next_multiple_of(2)];
    let blocks = values.chunks(block).zip(each.chunks_mut(block));
    let absmax = blocks.map(|(values, codes)| quantize_block(values, &mut codes[..values.len()])).collect();
    NormalFloats { codes: each.as_chunks().0.iter().map(|[first, second]| first << 4 | second).collect(), absmax }
}

/// Dequantises `out.len()` values from codes, two a byte, in blocks of `block` with the scales `absmax`, float32.
pub fn dequantize_nf4(codes: &[u8], absmax: &[f32], block: usize, out: &mut [f32]) {
    assert!(codes.len() == out.len().div_ceil(2) && absmax.len() == out.len().div_ceil(block), "a code for each value");
    for (at, x) in out.iter_mut().enumerate() {
        let code = if at % 2 == 0 { codes[at / 2] >> 4 } else { codes[at / 2] & 15 };
        *x = NF4_CODE[usize::from(code)] * absmax[at / block];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_its_code() {
        for scale in [1.0, 0.03, 1e30, 1e-30] {
            let values = NF4_CODE.map(|x| x * scale);
            let mut codes = [0; 16];
            assert_eq!(quantize_block(&values, &mut codes), scale);
            assert_eq!(codes, std::array::from_fn(|i| i as u8));
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for tiny in [0.0, 1e-42] {
            let mut codes = [1; 64];
            assert_eq!(quantize_block(&[tiny; 64], &mut codes), tiny);
            assert_eq!(codes, [ZERO; 64]);
        }
    }

    #[test]
    fn the_last_block_may_be_short() {
        let values: Vec<f32> = (0..131).map(|i| (i as f32 * 0.7).sin() * (1 + i / 64) as f32).collect();
        let nf4 = quantize_nf4(&values, 64);
        assert_eq!((nf4.codes.len(), nf4.absmax.len()), (66, 3));
        let mut back = vec![0.0; values.len()];
        dequantize_nf4(&nf4.codes, &nf4.absmax, 64, &mut back);
        let within = |(i, (x, y)): (usize, (&f32, &f32))| (x - y).abs() <= 0.16 * nf4.absmax[i / 64];
        assert!(values.iter().zip(&back).enumerate().all(within));
    }
}
