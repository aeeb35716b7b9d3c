//! Adapters: their tensors as they are trained ([`Adapter`]), as they are served ([`packed`], also as a file), and as PEFT files ([`mod@peft`]).

mod base_name;
pub mod packed;
mod packed_file;
pub mod peft;
mod shape;
mod value;
mod virtual_tokens;

pub use crate::arch::decoder::Site;
pub use base_name::BaseNames;
pub use packed::PackedAdapter;
pub use peft::lora::{CONVERSION, Initialisation};
pub use shape::{BaseShape, LinearShape};
pub use value::{Adapter, Bottleneck, LowRank, RowNorms, ScaledSide, SiteDelta, TokenRows};
pub use virtual_tokens::{VirtualForm, VirtualTokens};
