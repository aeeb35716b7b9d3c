//! Datasets: upload ([`ingest`]); from bytes to records ([`reader`], over [`container`] and [`records`]); what is kept ([`stored`]); records
//! as ids ([`mod@encode`]); which records a step sees ([`batching`]); and a quality report ([`report`]).

mod batching;
mod container;
mod encode;
mod ingest;
mod json;
mod problems;
mod reader;
mod records;
mod report;
mod stored;
#[cfg(test)]
mod tests;

pub use batching::{Batches, Split};
pub use encode::{Encoded, Examples, Length, encode};
pub use ingest::Upload;
pub use reader::{Findings, Numbered, Reader, Sink};
pub use records::{Chat, Pair, Preference, Record, Shape};
pub use report::{Question, Report, Shown, inspect};
pub use stored::{delete_dataset, memory_bytes, open};
