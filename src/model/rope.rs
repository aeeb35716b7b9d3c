//! The angles by which queries and keys turn, computed as positions come.

use std::sync::OnceLock;

use crate::arch::rope::RopeConfig;

/// Positions that are computed together.
const PIECE: usize = 512;

/// Cosines and sines of positions' angles, as Hugging Face computes them in float32.
#[derive(Debug)]
pub(super) struct RopeTable {
    /// `[dims / 2]`.
    frequencies: Vec<f32>,
    attention_factor: f32,
    /// Of [`PIECE`] positions each, as soon as one of them is asked for.
    pieces: Vec<OnceLock<Angles>>,
}

/// `[positions, dims / 2]` each.
#[derive(Debug, Default)]
pub(super) struct Angles {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
}

impl RopeTable {
    /// A table for contexts of up to `context` tokens.
    pub fn new(config: &RopeConfig, context: usize) -> Self {
        let pieces = (0..context.div_ceil(PIECE)).map(|_| OnceLock::new()).collect();
        Self { frequencies: config.frequencies(context), attention_factor: config.attention_factor, pieces }
    }

    /// The cosines and sines of a position, which must lie in the context.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let first = position / PIECE * PIECE;
        let angles = self.pieces[position / PIECE].get_or_init(|| self.angles(first..first + PIECE));
        let half = self.frequencies.len();
        let range = (position - first) * half..(position - first + 1) * half;
        (&angles.cos[range.clone()], &angles.sin[range])
    }

    /// The angles of positions in a row.
    pub fn angles(&self, positions: std::ops::Range<usize>) -> Angles {
        let turned = positions.flat_map(|position| self.frequencies.iter().map(move |f| position as f32 * f));
        let (cos, sin) =
            turned.map(|angle| (angle.cos() * self.attention_factor, angle.sin() * self.attention_factor)).unzip();
        Angles { cos, sin }
    }

    /// Half of the values of a head that turn.
    pub fn half(&self) -> usize {
        self.frequencies.len()
    }
}
