//! Tenora trains many LoRA adapters on one frozen quantised language model and serves them from the same bytes, over gRPC.
//!
//! The map, bottom up; a module imports only what stands above it in this list, as `tests/architecture.rs` enforces.
//!
//! - leaves: [`error`], [`ids`], [`config`], [`telemetry`], [`device`], [`text`], [`request`], [`random`], [`process`], [`bases`], [`sync`], [`work`], [`memory`]
//! - [`kernels`] quantised matmul, attention, batched adapters; [`arch`] architectures as data; [`weights`] files to frozen tensors;
//!   [`adapter`] LoRA and PEFT files
//! - [`model`] a decoder's steps, interpreted by three executors
//! - [`store`] the catalogue and the blobs; [`hub`] which versions are resident
//! - [`data`] datasets; [`engine`] the loop that serves; [`train`] the loop that trains
//! - [`safety`] the only door to the engine; [`api`] gRPC; [`cli`] the commands; [`app`] puts a server together
//!
//! The same parts work without a server. A base is immutable and shared; what varies is an argument:
//!
//! ```
//! use tenora::adapter::{Adapter, PackedAdapter, RowNorms};
//! use tenora::model::Model;
//! use tenora::request::{ChatMessage, LoraSpec};
//!
//! # fn main() -> tenora::error::Result<()> {
//! // A small random base, as the tests use; `Model::load` reads a GGUF file.
//! let (model, text) = Model::tiny(1);
//! let message = ChatMessage::new("user", "Hello <|im_end|>");
//! let ids = text.encode_chat(&[message], true)?;
//! assert_eq!(ids.iter().filter(|id| text.is_end(**id)).count(), 1, "content never yields control tokens");
//!
//! let lora = Adapter::fresh(&LoraSpec { rank: 4, ..LoraSpec::default() }, model.shape(), 7)?;
//! assert_eq!(PackedAdapter::new(&lora, model.shape(), &RowNorms::new())?.rank(), 4);
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

pub mod adapter;
pub mod api;
pub mod app;
pub mod arch;
pub mod bases;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod engine;
pub mod error;
pub mod hub;
pub mod ids;
pub mod memory;
pub mod model;
pub mod process;
pub mod random;
pub mod request;
pub mod safety;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod text;
pub mod train;
pub mod weights;
pub mod work;

pub use tenora_kernels as kernels;

#[cfg(test)]
#[global_allocator]
static COUNTING: kernels::testing::Counting = kernels::testing::Counting;
