use std::fs::File;

use super::moments::{SIGNED, Table, UNSIGNED};
use super::*;
use crate::random::{Purpose, Stream};

fn plain() -> AdamWConfig {
    AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, optimizer: Optimizer::AdamW }
}

/// One tensor and its gradient.
fn one<'t>(tensor: &'t mut [f32], gradient: &'t [f32]) -> std::iter::Once<(&'t mut [f32], &'t [f32])> {
    std::iter::once((tensor, gradient))
}

/// The update written out in float64, as torch documents it.
fn by_hand(config: AdamWConfig, learning_rate: f64, start: f64, gradients: &[f64]) -> f64 {
    let (mut p, mut m, mut v) = (start, 0.0, 0.0);
    for (i, g) in gradients.iter().enumerate() {
        let t = i as i32 + 1;
        p *= 1.0 - learning_rate * config.weight_decay;
        m = config.beta1 * m + (1.0 - config.beta1) * g;
        v = config.beta2 * v + (1.0 - config.beta2) * g * g;
        let (m_hat, v_hat) = (m / (1.0 - config.beta1.powi(t)), v / (1.0 - config.beta2.powi(t)));
        p -= learning_rate * m_hat / (v_hat.sqrt() + config.epsilon);
    }
    p
}

#[test]
fn steps_agree_with_the_formula() {
    let config = AdamWConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-3, weight_decay: 0.1, ..plain() };
    let (mut values, mut optimizer) = ([1.0, -2.0], AdamW::new(config, [2], None));
    for gradient in [[0.5, -0.1], [0.25, 0.3], [-1.0, 0.0]] {
        optimizer.step(one(&mut values, &gradient), 0.05, &|| {}).unwrap();
    }
    let expected = [by_hand(config, 0.05, 1.0, &[0.5, 0.25, -1.0]), by_hand(config, 0.05, -2.0, &[-0.1, 0.3, 0.0])];
    for (value, expected) in values.iter().zip(expected) {
        assert!((f64::from(*value) - expected).abs() < 1e-6, "{value} {expected}");
    }
    assert_eq!(optimizer.steps, 3);
}

#[test]
fn the_first_step_moves_by_the_learning_rate() {
    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 0.0, weight_decay: 0.0, ..plain() };
    let mut moved = [0.0, 0.0];
    AdamW::new(config, [2], None).step(one(&mut moved, &[3.0, -7.0]), 0.01, &|| {}).unwrap();
    assert!((moved[0] + 0.01).abs() < 1e-7 && (moved[1] - 0.01).abs() < 1e-7, "{moved:?}");
}

#[test]
fn clipping_scales_only_what_is_too_long() {
    let mut gradients = [vec![3.0], vec![0.0, 4.0]];
    let norm = |gradients: &[Vec<f32>]| global_norm(gradients.iter().map(Vec::as_slice));
    let before = norm(&gradients);
    assert!((before - 5.0).abs() < 1e-9);
    let mut clipped = |max_norm| {
        clip(gradients.iter_mut().map(Vec::as_mut_slice), before, max_norm);
        norm(&gradients)
    };
    assert_eq!([clipped(10.0), clipped(0.0)], [before, before]);
    assert!((clipped(1.0) - 1.0).abs() < 1e-5);
}

/// Values of every size of piece: small ones, one that fills blocks, one that does not, and two pieces.
const LENGTHS: [usize; 5] = [10, 4096, 5000, (1 << 20) + 300, 1];

/// Tensors after some steps with gradients of very different sizes, some of them zero, and the optimizer.
fn run(optimizer: Optimizer, lengths: &[usize], file: Option<File>, steps: u32) -> (Vec<Vec<f32>>, AdamW) {
    let config = AdamWConfig { optimizer, ..plain() };
    let mut tensors: Vec<Vec<f32>> = lengths.iter().map(|len| vec![0.5; *len]).collect();
    let mut adamw = AdamW::new(config, lengths.iter().copied(), file);
    for step in 0..steps {
        let stream = Stream::new(3, Purpose::Initialisation);
        let gradient = |tensor: usize, i: usize| {
            let bits = stream.bits((tensor * 100) as u64 + u64::from(step), i as u32);
            let size = [0.0, 1e-6, 1e-4, 1e-2][i % 4];
            size * (f64::from(bits) / f64::from(u32::MAX) - 0.4) as f32
        };
        let gradients: Vec<Vec<f32>> =
            lengths.iter().enumerate().map(|(t, len)| (0..*len).map(|i| gradient(t, i)).collect()).collect();
        let both = tensors.iter_mut().map(Vec::as_mut_slice).zip(gradients.iter().map(Vec::as_slice));
        adamw.step(both, 1e-3, &|| {}).unwrap();
    }
    (tensors, adamw)
}

#[test]
fn a_state_in_a_file_gives_the_same_bits() {
    for optimizer in [Optimizer::AdamW, Optimizer::AdamW8Bit] {
        let StateBytes { all, paged } = state_bytes(optimizer, LENGTHS);
        let file = tempfile::tempfile().unwrap();
        file.set_len(all).unwrap();
        let (in_memory, memory) = run(optimizer, &LENGTHS, None, 4);
        let (in_file, filed) = run(optimizer, &LENGTHS, Some(file.try_clone().unwrap()), 4);
        assert!(in_file == in_memory, "{optimizer:?}");
        assert_eq!([memory.bytes(), filed.bytes()], [all, paged]);
        assert_eq!(file.metadata().unwrap().len(), all, "a step writes within the file");
    }
}

#[test]
fn a_file_that_cannot_be_written_ends_the_step() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut adamw = AdamW::new(plain(), [2], Some(full));
    let error = adamw.step(one(&mut [1.0, 2.0], &[0.1, 0.2]), 0.01, &|| {}).unwrap_err();
    assert!(matches!(error, crate::error::Error::DiskFull { .. }), "{error}");
    let short = tempfile::tempfile().unwrap();
    let error = AdamW::new(plain(), [2], Some(short)).step(one(&mut [1.0, 2.0], &[0.1, 0.2]), 0.01, &|| {});
    assert!(error.unwrap_err().to_string().contains("optimizer"));
}

/// What the paper of the format and bitsandbytes' `create_dynamic_map` give.
#[test]
fn the_tables_of_eight_bits_are_those_of_bitsandbytes() {
    for table in [&SIGNED, &UNSIGNED] {
        assert!(table.values().windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(table.values()[255], 1.0);
    }
    let signed = SIGNED.values();
    assert_eq!([signed[0], signed[127], signed[254]], [-0.992_968_75, 0.0, 0.992_968_75]);
    assert!((signed[128] - 5.5e-7).abs() < 1e-12, "one part of 1e-7 to 1e-6: {}", signed[128]);
    let unsigned = UNSIGNED.values();
    assert_eq!([unsigned[0], unsigned[254]], [0.0, 0.996_484_4]);
    assert!((unsigned[1] - 3.25e-7).abs() < 1e-12 && (unsigned[2] - 7.75e-7).abs() < 1e-12);
}

#[test]
fn eight_bits_round_to_the_nearest_and_never_to_zero() {
    let check = |table: &Table, value: f32| {
        let rounded = table.values()[usize::from(table.nearest(value))];
        let distance = |code: &f32| (code - value).abs();
        let nearest = table.values().iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap();
        if nearest == 0.0 && value != 0.0 {
            assert!(rounded != 0.0 && rounded.signum() == value.signum() && rounded.abs() < 1e-6, "{value}: {rounded}");
        } else {
            assert_eq!(distance(&rounded), distance(&nearest), "{value}: {rounded}");
        }
    };
    for i in 0..4000_i32 {
        let value = 10_f32.powf(-9.0 * i as f32 / 4000.0);
        check(&SIGNED, value);
        check(&SIGNED, -value.min(0.99));
        check(&UNSIGNED, value);
    }
    for value in [0.0, -0.0, 1.0, 1e-30, f32::MIN_POSITIVE] {
        check(&SIGNED, value);
        check(&UNSIGNED, value.abs());
    }
}

/// Each value moves as far as with float32 moments, within some percent of the way in the mean; a fourth of the bytes.
#[test]
fn eight_bits_take_nearly_the_same_steps() {
    let lengths = [8192];
    let (exact, float) = run(Optimizer::AdamW, &lengths, None, 30);
    let (near, eight_bit) = run(Optimizer::AdamW8Bit, &lengths, None, 30);
    assert!(near != exact);
    let share = eight_bit.bytes() as f64 / float.bytes() as f64;
    assert!((share - 0.254).abs() < 1e-3, "{share}");
    // Those whose gradient is of the size of the block's largest.
    let pairs = exact[0].iter().zip(&near[0]).skip(3).step_by(4);
    let (way, off) = pairs.fold((0.0, 0.0), |(way, off), (exact, near)| {
        (way + f64::from((exact - 0.5).abs()), off + f64::from((exact - near).abs()))
    });
    assert!(off / way < 0.05, "{}", off / way);
    let most = exact[0].iter().chain(&near[0]).map(|value| (value - 0.5).abs()).fold(0.0, f32::max);
    assert!(most < 30.0 * 1e-3 * 1.5, "no value has leapt: {most}");
}
