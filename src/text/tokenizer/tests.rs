//! Vocabularies beside llama.cpp's own ids.

use super::*;
