//! The records of a file that can't be used, or are too long: the first ones with their reasons, and how many there are.

use crate::error::Error;

/// Bad records that are listed.
pub const LISTED: usize = 20;
/// Bytes of the list: an error travels in the trailers of a call, of which clients take 8 KiB, and which hold it three times.
const LIST_BYTES: usize = 1500;
/// Least bytes of a reason.
const REASON_BYTES: usize = 70;

/// The first of many lines, with what is said of each, and how many there are.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Noted<T> {
    /// Line, and what is said of it.
    pub first: Vec<(u64, T)>,
    /// How many there are.
    pub count: u64,
}

impl<T> Noted<T> {
    /// Notes one more.
    pub fn add(&mut self, line: u64, what: T) {
        self.count += 1;
        if self.first.len() < LISTED {
            self.first.push((line, what));
        }
    }
}

/// Bad records, by line, with their reasons; and what stands between records and may not.
#[derive(Debug, Default)]
pub struct Problems {
    noted: Noted<String>,
    /// How many of them are no records.
    strays: u64,
}

impl Problems {
    /// Notes that the record at this line can't be used.
    pub fn add(&mut self, line: u64, reason: String) {
        self.noted.add(line, reason);
    }

    /// Notes what stands in this line and is no record.
    pub fn add_stray(&mut self, line: u64, reason: String) {
        self.strays += 1;
        self.noted.add(line, reason);
    }

    /// Rewrites the reasons.
    pub fn rewrite(&mut self, rewritten: impl Fn(&str) -> String) {
        self.noted.first.iter_mut().for_each(|(_, reason)| *reason = rewritten(reason));
    }

    /// The error that lists them; `None` where there are none. `records`: all of the file's, good and bad.
    pub fn into_error(self, records: u64) -> Option<Error> {
        let Self { noted: Noted { mut first, count }, strays } = self;
        let invalid = |field: String, message| Error::invalid_because("INVALID_RECORD", field, message);
        if first.len() == 1 && count == 1 {
            return first.pop().map(|(line, reason)| invalid(format!("line {line}"), reason));
        }
        let what = match strays {
            0 => format!("{count} of {records} records can't be used"),
            // One record may be at fault twice, and what is between two is no record.
            _ => format!("{count} faults in a file of {records} records"),
        };
        (count > 0).then(|| invalid("data".into(), listing(&grouped(first), count, &what)))
    }
}

/// Reasons in the order of their first lines, each with its lines. Reasons that differ in the column alone are one, with the first one's.
fn grouped(first: Vec<(u64, String)>) -> Vec<(Vec<u64>, String)> {
    let mut groups: Vec<(Vec<u64>, String)> = Vec::new();
    for (line, reason) in first {
        match groups.iter_mut().find(|(_, known)| is_same(known, &reason)) {
            Some((lines, _)) => lines.push(line),
            None => groups.push((vec![line], reason)),
        }
    }
    groups
}

fn is_same(left: &str, right: &str) -> bool {
    let rest = |text: &'_ str| -> Option<(usize, usize)> {
        let at = text.find("at column ")? + "at column ".len();
        Some((at, at + text[at..].bytes().take_while(u8::is_ascii_digit).count()))
    };
    match (rest(left), rest(right)) {
        (Some((start, end)), Some((other_start, other_end))) => {
            left[..start] == right[..other_start] && left[end..] == right[other_end..]
        }
        _ => left == right,
    }
}

fn listing(groups: &[(Vec<u64>, String)], count: u64, what: &str) -> String {
    let listed: usize = groups.iter().map(|(lines, _)| lines.len()).sum();
    let mut text = match count > listed as u64 {
        true => format!("{what}; the first {listed}:"),
        false => format!("{what}:"),
    };
    let room = (LIST_BYTES / groups.len().max(1)).max(REASON_BYTES);
    for (lines, reason) in groups {
        // Several records may begin on one line.
        let mut lines = lines.clone();
        lines.dedup();
        let lines: Vec<String> = lines.iter().map(u64::to_string).collect();
        let word = if lines.len() == 1 { "line" } else { "lines" };
        text += &format!("\n{word} {}: {}", lines.join(", "), cut(reason, room));
    }
    text
}

/// At most so many bytes of a text.
fn cut(text: &str, bytes: usize) -> String {
    if text.len() <= bytes {
        return text.to_owned();
    }
    let end = (0..=bytes).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    format!("{}...", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(reasons: impl IntoIterator<Item = String>) -> String {
        let mut problems = Problems::default();
        for (i, reason) in reasons.into_iter().enumerate() {
            problems.add(i as u64 + 1, reason);
        }
        problems.into_error(100).map_or_else(String::new, |error| error.to_string())
    }

    #[test]
    fn the_first_twenty_are_listed_by_reason_with_a_count_of_all() {
        assert_eq!(problems([]), "");
        assert_eq!(problems(["is bad".to_owned()]), "line 1: is bad");
        let two = problems(["is bad", "is worse", "is bad"].map(str::to_owned));
        assert_eq!(two, "data: 3 of 100 records can't be used:\nlines 1, 3: is bad\nline 2: is worse");
        let columns = problems((1..4).map(|i| format!("has NaN at column {}; write null", 10 * i)));
        assert_eq!(columns, "data: 3 of 100 records can't be used:\nlines 1, 2, 3: has NaN at column 10; write null");
        let many = problems((0..30).map(|i| format!("{i} {}", "é".repeat(400))));
        assert!(many.starts_with("data: 30 of 100 records can't be used; the first 20:\nline 1: 0 "), "{many}");
        assert_eq!(many.lines().count(), 21);
        assert!(many.len() < 2400, "{}", many.len());
    }
}
