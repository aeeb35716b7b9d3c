//! F16, half precision: the values themselves.

use candle_core::quantized::GgmlDType;

use super::float::Float;
use crate::cpu::lanes::MicroKernel;

/// The format.
pub struct F16;

impl Float for F16 {
    const NAME: &'static str = "F16";
    const NUMBER: u32 = 1;
    const CANDLE: GgmlDType = GgmlDType::F16;
    const SIZE: usize = 2;
    const TAME: [u8; 2] = [0x83, 0x28];

    fn value(bytes: &[u8]) -> f32 {
        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }

    #[inline(always)]
    fn load<L: MicroKernel>(l: L, bytes: &[u8]) -> L::Float {
        l.load_f16(bytes)
    }
}
