//! From the bytes of an upload to the texts of its records. What a file is, its content says: JSON Lines, one JSON array (on one line or
//! many), or JSON objects one after another on as many lines as they like; with a byte order mark or without; plain or gzip. Anything
//! else is refused by [`foreign`] in a sentence that names it.
//!
//! One scanner does all: it keeps the brackets that are open, outside of strings. A broken record ends where a line begins with a `{` that
//! can't be nested there, so that it does not take the next ones with it.

mod foreign;

use std::io::{self, BufRead as _, BufReader, Write as _};

use flate2::write::MultiGzDecoder;

use crate::error::{Error, Result};

/// Bytes after which a file's kind is known.
const HEAD: usize = 4096;
/// Bytes of gzip unpacked at once: they become at most a thousand times as many.
const PACKED: usize = 4096;
const MARK: &[u8] = b"\xef\xbb\xbf";
/// What a gzip file begins with.
const GZIP: &[u8] = b"\x1f\x8b";

/// How the records lie in the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Format {
    pub gzip: bool,
    pub byte_order_mark: bool,
    pub array: bool,
    /// A record stands on several lines.
    pub pretty: bool,
}

impl Format {
    /// For people: "JSON Lines", "JSON array, gzip".
    pub fn describe(&self) -> String {
        let base = match (self.array, self.pretty) {
            (true, _) => "JSON array",
            (false, true) => "JSON objects",
            (false, false) => "JSON Lines",
        };
        let with = [(self.gzip, ", gzip"), (self.byte_order_mark, ", byte order mark")];
        with.iter().filter(|(has, _)| *has).fold(base.to_owned(), |text, (_, with)| text + with)
    }
}

/// What the scanner finds.
#[derive(Debug, PartialEq)]
pub enum Piece<'a> {
    /// The text of one value, which begins on this line (from 1).
    Value { line: u64, text: &'a [u8] },
    /// What stands between values and may not.
    Stray { line: u64, why: String },
}

/// What is done with each piece.
pub type Sink<'a> = &'a mut dyn FnMut(Piece<'_>) -> Result<()>;

/// How much a container may hold.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Of the file, unpacked.
    pub bytes: u64,
    /// Of one record.
    pub record_bytes: u64,
}

/// Cuts bytes into values as they arrive; the result does not depend on how they are cut.
#[derive(Debug)]
pub struct Container {
    head: Vec<u8>,
    packing: Packing,
    scanner: Scanner,
    bounds: Bounds,
    unpacked: u64,
}

#[derive(Debug)]
enum Packing {
    /// Too few bytes to know.
    Unknown,
    Plain,
    Gzip(Box<MultiGzDecoder<Vec<u8>>>),
}

impl Container {
    pub fn new(bounds: Bounds) -> Self {
        Self {
            head: Vec::new(),
            packing: Packing::Unknown,
            scanner: Scanner::new(bounds.record_bytes),
            bounds,
            unpacked: 0,
        }
    }

    /// Takes the next bytes, as they were sent.
    ///
    /// # Errors
    /// What the file is, where it is none of the formats; a limit that it passes; what `sink` says.
    pub fn push(&mut self, bytes: &[u8], sink: Sink<'_>) -> Result<()> {
        match &mut self.packing {
            Packing::Unknown => {
                self.head.extend_from_slice(bytes);
                if self.head.len() < 2 { Ok(()) } else { self.begin(sink) }
            }
            Packing::Plain => self.unpacked(bytes, sink),
            Packing::Gzip(_) => bytes.chunks(PACKED).try_for_each(|packed| self.unpack(packed, sink)),
        }
    }

    /// Ends the file; gives how the records lay in it.
    ///
    /// # Errors
    /// As [`Container::push`], and where gzip ends early.
    pub fn finish(&mut self, sink: Sink<'_>) -> Result<Format> {
        if matches!(self.packing, Packing::Unknown) {
            self.begin(sink)?;
        }
        if let Packing::Gzip(decoder) = &mut self.packing {
            decoder.try_finish().map_err(|e| damaged(&e))?;
            let rest = std::mem::take(decoder.get_mut());
            self.unpacked(&rest, sink)?;
        }
        self.scanner.finish(sink)?;
        Ok(Format { gzip: matches!(self.packing, Packing::Gzip(_)), ..self.scanner.format })
    }

    /// Returns the bytes so far, unpacked.
    pub fn unpacked_bytes(&self) -> u64 {
        self.unpacked
    }

    fn begin(&mut self, sink: Sink<'_>) -> Result<()> {
        let head = std::mem::take(&mut self.head);
        self.packing = match head.starts_with(GZIP) {
            true => Packing::Gzip(Box::new(MultiGzDecoder::new(Vec::new()))),
            false => Packing::Plain,
        };
        if head.is_empty() { Ok(()) } else { self.push(&head, sink) }
    }

    fn unpack(&mut self, packed: &[u8], sink: Sink<'_>) -> Result<()> {
        let Packing::Gzip(decoder) = &mut self.packing else { return Ok(()) };
        decoder.write_all(packed).map_err(|e| damaged(&e))?;
        let bytes = std::mem::take(decoder.get_mut());
        self.unpacked(&bytes, sink)
    }

    fn unpacked(&mut self, bytes: &[u8], sink: Sink<'_>) -> Result<()> {
        let room = usize::try_from(self.bounds.bytes - self.unpacked).unwrap_or(usize::MAX);
        let fits = &bytes[..bytes.len().min(room)];
        self.unpacked += fits.len() as u64;
        self.scanner.push(fits, sink)?;
        if fits.len() < bytes.len() {
            let message = format!("the dataset is larger than {} bytes", self.bounds.bytes);
            return Err(Error::Exhausted { limit: "max_dataset_bytes", message, retry_after: None });
        }
        Ok(())
    }
}

/// Returns how many bytes a whole file has unpacked, without keeping any.
///
/// # Errors
/// The file's, and those of gzip that is damaged.
pub fn unpacked_bytes(file: impl io::Read) -> io::Result<u64> {
    let mut file = BufReader::new(file);
    match file.fill_buf()?.starts_with(GZIP) {
        true => io::copy(&mut flate2::bufread::MultiGzDecoder::new(file), &mut io::sink()),
        false => io::copy(&mut file, &mut io::sink()),
    }
}

fn damaged(error: &io::Error) -> Error {
    refused(format!("is gzip that is damaged or cut short ({error}); pack it again, or send it unpacked"))
}

/// The file as a whole is not what can be read.
pub fn refused(what: impl Into<String>) -> Error {
    Error::invalid_because("UNSUPPORTED_FORMAT", "data", what)
}

/// Finds the values in text. Brackets count outside of strings only.
#[derive(Debug)]
struct Scanner {
    /// The first bytes, until the kind of the file is known.
    head: Option<Vec<u8>>,
    format: Format,
    max_record_bytes: u64,
    line: u64,
    at_line_start: bool,
    /// The value under way, or what stands between values up to the end of its line.
    text: Vec<u8>,
    text_line: u64,
    state: State,
    /// Open brackets of the value under way; the array's own does not count.
    open: Vec<u8>,
    in_string: bool,
    escaped: bool,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// Before, between or after values.
    Between,
    Value,
    /// Something that is no value, up to the end of the line, or of its place in an array.
    Stray,
}

/// Where in an array the scanner stands.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// Not in an array; nothing but values follow each other.
    Stream,
    ArrayStart,
    AfterValue,
    AfterComma,
    Closed,
}

impl Scanner {
    fn new(max_record_bytes: u64) -> Self {
        Self {
            head: Some(Vec::new()),
            format: Format::default(),
            max_record_bytes,
            line: 1,
            at_line_start: true,
            text: Vec::new(),
            text_line: 1,
            state: State::Between,
            open: Vec::new(),
            in_string: false,
            escaped: false,
            place: Place::Stream,
        }
    }

    fn push(&mut self, bytes: &[u8], sink: Sink<'_>) -> Result<()> {
        let Some(head) = &mut self.head else { return self.scan(bytes, sink) };
        head.extend_from_slice(bytes);
        if head.len() < HEAD { Ok(()) } else { self.begin(sink) }
    }

    /// Decides what the file is, by its first bytes.
    fn begin(&mut self, sink: Sink<'_>) -> Result<()> {
        let Some(head) = self.head.take() else { return Ok(()) };
        let text = head.strip_prefix(MARK).unwrap_or(&head);
        self.format.byte_order_mark = text.len() < head.len();
        // Whatever the bytes after the first ones are: how the upload was cut must not matter.
        if let Some(what) = foreign::named(&text[..text.len().min(HEAD - MARK.len())]) {
            return Err(refused(what));
        }
        if text.trim_ascii_start().starts_with(b"[") {
            self.format.array = true;
        }
        self.scan(text, sink)
    }

    fn scan(&mut self, bytes: &[u8], sink: Sink<'_>) -> Result<()> {
        for byte in bytes {
            self.take(*byte, sink)?;
            self.at_line_start = *byte == b'\n';
            self.line += u64::from(*byte == b'\n');
        }
        Ok(())
    }

    fn take(&mut self, byte: u8, sink: Sink<'_>) -> Result<()> {
        match self.state {
            State::Between => self.between(byte, sink),
            // Where no object can be nested, it begins a record, and the one before was cut.
            State::Value if self.at_line_start && byte == b'{' && !self.may_nest() => {
                self.end_value(sink)?;
                if self.place == Place::AfterValue {
                    // The comma before it went with the broken record, or lacks with its bracket.
                    self.place = Place::AfterComma;
                }
                self.between(byte, sink)
            }
            State::Value => {
                self.keep(byte)?;
                self.inside(byte, sink)
            }
            State::Stray if byte == b'\n' => self.end_stray(sink),
            // A number or a word in an array ends there as any value does.
            State::Stray if b",]".contains(&byte) && self.in_array() => {
                self.end_stray(sink)?;
                self.between(byte, sink)
            }
            State::Stray => self.keep(byte),
        }
    }

    /// Whether an object may follow what there is of the value: in an object after a colon, in a list after its bracket or a comma.
    fn may_nest(&self) -> bool {
        let last = self.text.iter().rev().find(|byte| !byte.is_ascii_whitespace());
        match self.open.last() {
            Some(b'[') => last.is_some_and(|byte| b"[,".contains(byte)),
            _ => last == Some(&b':'),
        }
    }

    /// Whether the array of records is open.
    fn in_array(&self) -> bool {
        matches!(self.place, Place::ArrayStart | Place::AfterValue | Place::AfterComma)
    }

    fn keep(&mut self, byte: u8) -> Result<()> {
        if self.text.len() as u64 >= self.max_record_bytes {
            return Err(self.too_long());
        }
        self.text.push(byte);
        Ok(())
    }

    /// A record that does not end may be long, or lack a bracket: then something stands in it that may not.
    fn too_long(&self) -> Error {
        match super::json::parse(&self.text) {
            Err(error) if !error.is_cut => {
                let line = format!("line {}", self.text_line + error.line);
                Error::invalid_because("INVALID_RECORD", line, error.message)
            }
            _ => {
                let message = format!(
                    "line {}: the record is longer than {} bytes, or a bracket or a quote that ends it is missing",
                    self.text_line, self.max_record_bytes
                );
                Error::Exhausted { limit: "max_record_bytes", message, retry_after: None }
            }
        }
    }

    fn between(&mut self, byte: u8, sink: Sink<'_>) -> Result<()> {
        let stray = |why: &str, line: u64| Piece::Stray { line, why: why.to_owned() };
        match (byte, self.place) {
            (b' ' | b'\t' | b'\r' | b'\n', _) => Ok(()),
            (b'[', Place::Stream) if self.format.array => {
                self.place = Place::ArrayStart;
                Ok(())
            }
            (b']', Place::AfterComma) => {
                self.place = Place::Closed;
                sink(stray("has a comma before the array's closing bracket; remove it", self.line))
            }
            (b']', Place::ArrayStart | Place::AfterValue) => {
                self.place = Place::Closed;
                Ok(())
            }
            (b',', Place::AfterValue) => {
                self.place = Place::AfterComma;
                Ok(())
            }
            (b',', Place::Stream) => sink(stray(
                "has a comma after the object, as in an array without its brackets; remove it, or put brackets around all: (echo '['; sed '$ s/,[[:space:]]*$//' IN; echo ']') > OUT.json",
                self.line,
            )),
            (b',', Place::ArrayStart | Place::AfterComma) => {
                sink(stray("has a comma without a record before it", self.line))
            }
            (b'{' | b'[' | b'"', Place::AfterValue) => {
                sink(stray("has no comma before this record of the array", self.line))?;
                self.start(byte)
            }
            (b'{' | b'[' | b'"', Place::Stream | Place::ArrayStart | Place::AfterComma) => self.start(byte),
            _ => {
                self.state = State::Stray;
                self.text_line = self.line;
                self.keep(byte)
            }
        }
    }

    fn start(&mut self, byte: u8) -> Result<()> {
        self.state = State::Value;
        self.text_line = self.line;
        self.open.clear();
        if byte != b'"' {
            self.open.push(byte);
        }
        (self.in_string, self.escaped) = (byte == b'"', false);
        self.keep(byte)
    }

    fn inside(&mut self, byte: u8, sink: Sink<'_>) -> Result<()> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                // No string of JSON spans lines: the quote that is missing must not take the rest of the file.
                b'"' | b'\n' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.open.push(byte),
                b'}' | b']' => drop(self.open.pop()),
                _ => {}
            }
        }
        if self.open.is_empty() && !self.in_string { self.end_value(sink) } else { Ok(()) }
    }

    fn end_value(&mut self, sink: Sink<'_>) -> Result<()> {
        let text = self.text.trim_ascii_end();
        self.format.pretty |= text.contains(&b'\n') && self.open.is_empty();
        sink(Piece::Value { line: self.text_line, text })?;
        self.text.clear();
        self.state = State::Between;
        if self.place != Place::Stream {
            self.place = Place::AfterValue;
        }
        Ok(())
    }

    fn end_stray(&mut self, sink: Sink<'_>) -> Result<()> {
        let why = match self.place {
            Place::Closed => "stands after the end of the array; a file holds one array".to_owned(),
            _ => match super::json::parse(&self.text) {
                Ok(_) => "must be a JSON object".to_owned(),
                Err(error) => error.message,
            },
        };
        self.text.clear();
        self.state = State::Between;
        if self.in_array() {
            self.place = Place::AfterValue;
        }
        sink(Piece::Stray { line: self.text_line, why })
    }

    fn finish(&mut self, sink: Sink<'_>) -> Result<()> {
        self.begin(sink)?;
        match self.state {
            State::Value => self.end_value(sink)?,
            State::Stray => self.end_stray(sink)?,
            State::Between => {}
        }
        match self.place {
            _ if self.in_array() => {
                let why = "the array is not closed by ]: the file was cut short".to_owned();
                sink(Piece::Stray { line: self.line, why })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { bytes: 2000, record_bytes: 200 };

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Values as `line:text`, strays as `line!why`.
    fn read_cut(chunks: &[&[u8]]) -> Result<(Format, Vec<String>)> {
        let mut container = Container::new(BOUNDS);
        let mut pieces = Vec::new();
        let mut sink = |piece: Piece<'_>| {
            pieces.push(match piece {
                Piece::Value { line, text } => format!("{line}:{}", String::from_utf8_lossy(text)),
                Piece::Stray { line, why } => {
                    format!("{line}!{}", why.split(' ').take(3).collect::<Vec<_>>().join(" "))
                }
            });
            Ok(())
        };
        chunks.iter().try_for_each(|chunk| container.push(chunk, &mut sink))?;
        let format = container.finish(&mut sink)?;
        Ok((format, pieces))
    }

    fn read(text: &str) -> (String, Vec<String>) {
        let (format, pieces) = read_cut(&[text.as_bytes()]).unwrap();
        (format.describe(), pieces)
    }

    #[test]
    fn files_are_told_apart_by_their_content() {
        assert_eq!(
            read("{\"a\":1}\r\n\n  \n{\"b\":2}"),
            ("JSON Lines".into(), vec!["1:{\"a\":1}".into(), "4:{\"b\":2}".into()])
        );
        assert_eq!(
            read("[{\"a\":[1]}, {\"b\":\"]\"}]\n"),
            ("JSON array".into(), vec!["1:{\"a\":[1]}".into(), "1:{\"b\":\"]\"}".into()])
        );
        assert_eq!(
            read("[\n  {\n    \"a\": 1\n  },\n  {\"b\": 2}\n]"),
            ("JSON array".into(), vec!["2:{\n    \"a\": 1\n  }".into(), "5:{\"b\": 2}".into()])
        );
        assert_eq!(read("{\n \"a\": 1\n}\n{\n \"b\": 2\n}").0, "JSON objects");
        assert_eq!(read("\u{feff}{\"a\":1}").0, "JSON Lines, byte order mark");
        let packed = gzip(b"\xef\xbb\xbf[{}]");
        assert_eq!(read_cut(&[&packed]).unwrap().0.describe(), "JSON array, gzip, byte order mark");
        let two = [gzip(b"{\"a\":1}\n"), gzip(b"{\"b\":2}\n")].concat();
        assert_eq!(read_cut(&[&two]).unwrap().1.len(), 2, "gzip files end to end are one");
        assert_eq!(read(""), ("JSON Lines".into(), vec![]));
        assert_eq!(read("[]").1, Vec::<String>::new());
    }

    #[test]
    fn a_broken_record_ends_where_the_next_one_begins() {
        assert_eq!(read("{\"a\": [1\n{\"b\":2}\n").1, ["1:{\"a\": [1", "2:{\"b\":2}"]);
        assert_eq!(read("{\"a\": \"x\n{\"b\":2}\n").1, ["1:{\"a\": \"x", "2:{\"b\":2}"]);
        assert_eq!(read("{\"a\":1}}\n{\"b\":2}").1, ["1:{\"a\":1}", "1!is not JSON", "2:{\"b\":2}"]);
        assert_eq!(read("{\"a\":1},\n{\"b\":2},").1, ["1:{\"a\":1}", "1!has a comma", "2:{\"b\":2}", "2!has a comma"]);
        assert_eq!(read("{}\nhello\n{}").1, ["1:{}", "2!is not JSON", "3:{}"]);
        assert_eq!(read("{}\n7\n{}").1, ["1:{}", "2!must be a", "3:{}"]);
        assert_eq!(read("[{},]").1, ["1:{}", "1!has a comma"]);
        assert_eq!(read("[{} {}]").1, ["1:{}", "1!has no comma", "1:{}"]);
        assert_eq!(read("[{}]\n[{}]").1, ["1:{}", "2!stands after the"]);
        assert_eq!(read("[{},\n{}").1, ["1:{}", "2:{}", "2!the array is"]);
        assert_eq!(read("[{}, nope\n, {}]").1, ["1:{}", "1!is not JSON", "2:{}"]);
        assert_eq!(read("[null, {}, 7, {}]").1, ["1!must be a", "1:{}", "1!must be a", "1:{}"]);
        assert_eq!(read("[\n{\"a\":1,\n{\"b\":2},\n{\"c\":3}\n]").1, ["2:{\"a\":1,", "3:{\"b\":2}", "4:{\"c\":3}"]);
        assert_eq!(read("[\n{\"a\":1\n{\"b\":2}\n]").1, ["2:{\"a\":1", "3:{\"b\":2}"]);
        assert_eq!(read("[\n{\"a\":[{}\n,\n{}\n]}]").1.len(), 1);
    }

    #[test]
    fn limits_hold_for_what_is_unpacked() {
        let limit = |bytes: &[u8]| match read_cut(&[bytes]) {
            Err(Error::Exhausted { limit, .. }) => limit,
            other => panic!("{other:?}"),
        };
        assert_eq!(limit(&gzip(&b"{}\n".repeat(1000))), "max_dataset_bytes");
        assert_eq!(limit(format!("{{\"a\":\"{}", "x".repeat(300)).as_bytes()), "max_record_bytes");
        // Indented, so that the next record is no sign by itself.
        let open = format!("[\n  {{\n    \"a\": 1,\n{}]", "  {\n    \"b\": 2\n  },\n".repeat(20));
        let error = read_cut(&[open.as_bytes()]).unwrap_err().to_string();
        assert!(error.starts_with("line 4: is not JSON at column 3: key must be a string"), "{error}");
        let whole = gzip(b"{}\n");
        for broken in [&whole[..whole.len() - 3], &[&whole[..], b"rest"].concat()[..]] {
            assert!(
                matches!(read_cut(&[broken]), Err(Error::Invalid { reason: "UNSUPPORTED_FORMAT", .. })),
                "{broken:?}"
            );
        }
    }

    fn line() -> impl Strategy<Value = String> {
        prop_oneof![
            8 => Just("{\"p\":\"é {[\"}".to_owned()),
            2 => Just(String::new()),
            1 => Just("{\"prompt\":".to_owned()),
            1 => Just("[".to_owned()),
            1 => Just(",]".to_owned()),
            1 => Just("{\"a\":\"\\\"".to_owned()),
            1 => Just("\u{2028}".to_owned()),
        ]
    }

    proptest! {
        #[test]
        fn cutting_changes_nothing(lines in prop::collection::vec(line(), 0..20), packed: bool, cuts in prop::collection::vec(1_usize..50, 1..60)) {
            let text = lines.join("\n");
            let bytes = if packed { gzip(text.as_bytes()) } else { text.into_bytes() };
            let mut chunks = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (chunk, more) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk);
                rest = more;
            }
            prop_assert_eq!(format!("{:?}", read_cut(&chunks)), format!("{:?}", read_cut(&[&bytes])));
        }
    }
}
