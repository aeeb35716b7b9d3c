//! How far a base is that is being read: a bar on the terminal where it takes a while, lines of the log otherwise.

use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

/// A base below this is there before a bar is read.
const LARGE: u64 = 256 << 20;

/// Shows how far a base is.
#[derive(Debug, Default)]
pub struct Loading {
    bar: Option<ProgressBar>,
    begun: Option<Instant>,
}

impl Loading {
    /// Shows that so many of all bytes have been read.
    pub fn show(&mut self, done: u64, total: u64) {
        if self.begun.is_none() {
            self.begun = Some(Instant::now());
            tracing::info!(megabytes = total / 1_000_000, "reading the base");
            self.bar = (total >= LARGE).then(|| bar(total));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
        if done >= total {
            self.end();
        }
    }

    fn end(&mut self) {
        let Some(begun) = self.begun.filter(|_| self.bar.as_ref().is_none_or(|bar| !bar.is_finished())) else { return };
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        tracing::info!(seconds = begun.elapsed().as_secs_f64(), "the base has been read");
    }
}

/// On standard error; hidden where that is no terminal.
fn bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let template = "reading the base  [{bar:30}] {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
