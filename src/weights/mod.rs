//! Frozen tensors of the base, from GGUF.
