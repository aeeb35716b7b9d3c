//! BF16, bfloat16: the values themselves.

use candle_core::quantized::GgmlDType;

use super::float::Float;
use crate::cpu::lanes::MicroKernel;

/// The format.
pub struct BF16;

impl Float for BF16 {
    const NAME: &'static str = "BF16";
    const NUMBER: u32 = 30;
    const CANDLE: GgmlDType = GgmlDType::BF16;
    const SIZE: usize = 2;
    const TAME: [u8; 2] = [0x80, 0x3D];

    fn value(bytes: &[u8]) -> f32 {
        half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
    }

    #[inline(always)]
    fn load<L: MicroKernel>(l: L, bytes: &[u8]) -> L::Float {
        l.load_bf16(bytes)
    }
}
