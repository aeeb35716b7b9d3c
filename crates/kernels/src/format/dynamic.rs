//! The 8-bit dynamic data type (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861): a
//! sign, a decimal exponent as zeros before the first bit that is set, and a fraction in the bits behind it.

/// The numbers over zero, ascending, as float32 has them where bitsandbytes makes them.
#[rustfmt::skip]
const POSITIVE: [f32; 128] = [
    5.5000004e-7, 3.2500002e-6, 7.75e-6, 2.1249998e-5, 4.375e-5, 6.625e-5, 8.875e-5, 0.00015625001, 0.00026875004,
    0.00038125002, 0.00049375003, 0.0006062501, 0.00071875006, 0.00083125, 0.0009437501, 0.0012812499, 0.00184375,
    0.00240625, 0.00296875, 0.0035312497, 0.00409375, 0.0046562497, 0.0052187503, 0.00578125, 0.00634375,
    0.00690625, 0.00746875, 0.00803125, 0.00859375, 0.009156249, 0.00971875, 0.01140625, 0.01421875, 0.01703125,
    0.019843752, 0.02265625, 0.02546875, 0.028281251, 0.03109375, 0.03390625, 0.036718752, 0.03953125, 0.042343747,
    0.04515625, 0.04796875, 0.05078125, 0.05359375, 0.05640625, 0.059218753, 0.06203125, 0.06484375, 0.067656256,
    0.070468746, 0.07328125, 0.07609375, 0.07890625, 0.08171876, 0.08453125, 0.08734375, 0.09015625, 0.092968754,
    0.09578126, 0.09859375, 0.107031256, 0.12109375, 0.13515624, 0.14921875, 0.16328125, 0.17734376, 0.19140625,
    0.20546874, 0.21953125, 0.23359375, 0.24765624, 0.26171875, 0.27578127, 0.28984374, 0.30390626, 0.31796873,
    0.33203125, 0.34609374, 0.36015624, 0.37421876, 0.38828123, 0.40234375, 0.41640624, 0.43046874, 0.44453126,
    0.45859373, 0.47265625, 0.4867187, 0.50078124, 0.5148437, 0.5289062, 0.54296875, 0.5570313, 0.5710938,
    0.58515626, 0.5992187, 0.61328125, 0.6273438, 0.6414063, 0.65546876, 0.6695312, 0.68359375, 0.6976563,
    0.7117188, 0.72578126, 0.7398437, 0.75390625, 0.7679688, 0.78203124, 0.79609376, 0.8101562, 0.82421875,
    0.8382813, 0.85234374, 0.86640626, 0.8804687, 0.89453125, 0.9085938, 0.92265624, 0.93671876, 0.9507812,
    0.96484375, 0.9789063, 0.99296874, 1.0,
];

/// What the codes stand for, ascending, from -0.993 to 1. Code 127 is zero; 1 has no counterpart below zero.
pub const DYNAMIC_CODE: [f32; 256] = {
    let mut code = [0.0; 256];
    let mut i = 0;
    while i < 128 {
        code[128 + i] = POSITIVE[i];
        if i < 127 {
            code[126 - i] = -POSITIVE[i];
        }
        i += 1;
    }
    code
};

/// The middle between each code's number and the next one's.
const MIDDLES: [f32; 255] = {
    let mut middles = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        middles[i] = (DYNAMIC_CODE[i] + DYNAMIC_CODE[i + 1]) / 2.0;
        i += 1;
    }
    middles
};

/// Steps from -1 to 1 that values are rounded to before their codes are looked for: bitsandbytes has a table of the
/// nearest codes of these, so that near the middle between two numbers it may give the farther one.
const STEPS: f32 = 65_535.0;

/// The code of a value from -1 to 1.
pub fn dynamic_code_of(x: f32) -> u8 {
    let step = ((x + 1.0) * 0.5 * STEPS + 0.5) as u32;
    let x = (f64::from(step) * (2.0 / f64::from(STEPS)) - 1.0) as f32;
    MIDDLES.partition_point(|middle| x > *middle) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_ascend_and_have_their_codes() {
        assert!(DYNAMIC_CODE.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!((DYNAMIC_CODE[127], DYNAMIC_CODE[255]), (0.0, 1.0));
        for (code, x) in DYNAMIC_CODE.iter().enumerate() {
            // Those next to zero are nearer to each other than the steps.
            let near = code.abs_diff(127) < 8;
            let found = usize::from(dynamic_code_of(*x));
            assert!(found == code || near && found.abs_diff(code) <= 4, "{code}: {found}");
        }
        assert_eq!((dynamic_code_of(-1.0), dynamic_code_of(1.0)), (0, 255));
    }
}
