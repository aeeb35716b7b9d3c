//! Draws a curve in a terminal, with Braille characters of two by four dots each.

/// The bit of each dot of a Braille character, by column and row from the top.
const DOTS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// Draws straight lines from point to point, as rows of `columns` characters from the top down. The points' own range fills the
/// picture.
pub(super) fn lines(points: &[(f64, f64)], columns: usize, rows: usize) -> Vec<String> {
    let (width, height) = (columns * 2, rows * 4);
    let (x, y) = (Axis::over(points.iter().map(|p| p.0), width), Axis::over(points.iter().map(|p| p.1), height));
    let mut cells = vec![vec![0u8; columns]; rows];
    let mut mark = |column: usize, from_bottom: usize| {
        let row = height - 1 - from_bottom;
        cells[row / 4][column / 2] |= DOTS[column % 2][row % 4];
    };
    for pair in points.windows(2) {
        let [from, to] = [pair[0], pair[1]].map(|(px, py)| (x.place(px), y.place(py)));
        let steps = (to.0 - from.0).abs().max((to.1 - from.1).abs()).ceil().max(1.0) as usize;
        for step in 0..=steps {
            let part = step as f64 / steps as f64;
            mark(x.dot(from.0 + (to.0 - from.0) * part), y.dot(from.1 + (to.1 - from.1) * part));
        }
    }
    let character = |bits: &u8| char::from_u32(0x2800 + u32::from(*bits)).unwrap_or(' ');
    cells.iter().map(|row| row.iter().map(character).collect()).collect()
}

/// Maps values to dots.
struct Axis {
    low: f64,
    high: f64,
    dots: usize,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, dots: usize) -> Self {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        Self { low, high, dots }
    }

    fn place(&self, value: f64) -> f64 {
        let range = self.high - self.low;
        if range > 0.0 { (value - self.low) / range * (self.dots - 1) as f64 } else { 0.0 }
    }

    fn dot(&self, place: f64) -> usize {
        (place.round() as usize).min(self.dots - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_line_goes_from_corner_to_corner() {
        assert_eq!(lines(&[(1.0, 3.0), (8.0, 1.0)], 4, 2), ["⠑⢄⠀⠀", "⠀⠀⠑⢄"]);
    }

    #[test]
    fn a_step_is_drawn_without_a_gap_and_one_value_lies_at_the_bottom() {
        assert_eq!(lines(&[(0.0, 0.0), (0.0, 1.0)], 1, 2), ["⡇", "⡇"]);
        assert_eq!(lines(&[(0.0, 5.0), (1.0, 5.0)], 1, 1), ["⣀"]);
        assert_eq!(lines(&[(0.0, 5.0)], 1, 1), ["⠀"], "a point is no line");
    }
}
