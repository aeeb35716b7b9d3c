//! F32, float32: the values themselves.

use candle_core::quantized::GgmlDType;

use super::float::Float;
use crate::cpu::lanes::MicroKernel;

/// The format.
pub struct F32;

impl Float for F32 {
    const NAME: &'static str = "F32";
    const NUMBER: u32 = 0;
    const CANDLE: GgmlDType = GgmlDType::F32;
    const SIZE: usize = 4;
    const TAME: [u8; 2] = [0x80, 0x3D];

    fn value(bytes: &[u8]) -> f32 {
        f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    #[inline(always)]
    fn load<L: MicroKernel>(l: L, bytes: &[u8]) -> L::Float {
        l.load_f32(bytes)
    }
}
