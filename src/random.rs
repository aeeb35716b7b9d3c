//! Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC'11). A value is a function of its key and counter,
//! of nothing else.

/// Ten rounds on `counter` under `key`.
pub fn philox4x32(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

/// What a stream of numbers is for; streams of one seed are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Drawing the next token.
    Sampling = 1,
    /// An adapter's first values.
    Initialisation = 2,
    /// Which inputs are dropped.
    Dropout = 3,
    /// The order of the records of an epoch.
    Order = 4,
    /// Which records are held out.
    Split = 5,
}

/// The numbers of one seed and purpose.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
    purpose: Purpose,
}

impl Stream {
    /// Returns the stream of a seed and a purpose.
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        Self { seed, purpose }
    }

    /// 32 random bits at a place.
    pub fn bits(&self, major: u64, minor: u32) -> u32 {
        self.block(major, minor)[0]
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform(&self, major: u64, minor: u32) -> f32 {
        (self.bits(major, minor) >> 8) as f32 / 16_777_216.0
    }

    /// Standard normal (Box & Muller 1958), of two of the place's four numbers.
    pub fn normal(&self, major: u64, minor: u32) -> f32 {
        let [u, v, ..] = self.block(major, minor).map(|bits| f64::from(bits >> 8) / 16_777_216.0);
        ((-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    fn block(&self, major: u64, minor: u32) -> [u32; 4] {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        philox4x32(key, [minor, major as u32, (major >> 32) as u32, self.purpose as u32])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers of the paper's own library.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0; 2], [!0; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_by_seed_purpose_and_place() {
        let at = |seed, purpose, major, minor| Stream::new(seed, purpose).bits(major, minor);
        let one = at(1, Purpose::Sampling, 2, 3);
        for other in [
            at(2, Purpose::Sampling, 2, 3),
            at(1, Purpose::Dropout, 2, 3),
            at(1, Purpose::Sampling, 3, 3),
            at(1, Purpose::Sampling, 2, 4),
        ] {
            assert_ne!(one, other);
        }
        assert!((0..1000).all(|i| (0.0..1.0).contains(&Stream::new(7, Purpose::Order).uniform(i, 0))));
    }

    #[test]
    fn normals_have_their_moments() {
        let x: Vec<f64> = (0..40_000).map(|i| Stream::new(3, Purpose::Initialisation).normal(1, i).into()).collect();
        let moment = |power: i32| x.iter().map(|x| x.powi(power)).sum::<f64>() / x.len() as f64;
        for (power, want, most) in [(1, 0.0, 0.02), (2, 1.0, 0.03), (3, 0.0, 0.06), (4, 3.0, 0.2)] {
            assert!((moment(power) - want).abs() < most, "{power}: {}", moment(power));
        }
    }
}
