//! A base's numbers in words.

use crate::arch::config::ModelConfig;
use crate::arch::rope::{RopeConfig, RopeScaling};

impl ModelConfig {
    /// Returns what people ask of a base, by name: sizes, attention, windows, the rotation.
    pub fn describe(&self) -> Vec<(&'static str, String)> {
        let attention = &self.attention;
        let layers = self.layers.len();
        let mut lines = vec![
            ("blocks", format!("{layers} of width {}, feed-forward {}", self.hidden_size, self.intermediate_size)),
            (
                "attention",
                format!(
                    "{} heads of {}, {} of keys and values",
                    attention.heads, attention.head_dim, attention.kv_heads
                ),
            ),
            ("vocabulary", format!("{} tokens", self.vocab_size)),
            ("context", format!("{} tokens", self.context_length)),
        ];
        if let Some(window) = self.layers.iter().find_map(|layer| layer.window) {
            let windowed = self.layers.iter().filter(|layer| layer.window.is_some()).count();
            lines.push(("windows", format!("{windowed} of {layers} blocks see {window} positions")));
        }
        for (i, rope) in self.ropes.iter().enumerate() {
            let turned = self.layers.iter().filter(|layer| layer.rope == Some(i)).count();
            lines.push(("RoPE", format!("{}, in {turned} of {layers} blocks", rope.describe(attention.head_dim))));
        }
        lines
    }
}

impl RopeConfig {
    fn describe(&self, head_dim: usize) -> String {
        let scaling = match &self.scaling {
            RopeScaling::None => "not scaled".to_owned(),
            RopeScaling::Linear { factor } => format!("scaled by {factor}"),
            RopeScaling::Yarn { factor, original_context, .. } => {
                format!("scaled by {factor} from {original_context} tokens on (YaRN)")
            }
            RopeScaling::Factors(_) => "scaled by a factor for each frequency (Llama 3)".to_owned(),
            RopeScaling::LongRope { original_context, .. } => {
                format!("other frequencies beyond a context of {original_context} tokens (LongRoPE)")
            }
        };
        format!("base {}, {} of {head_dim} values turn, {scaling}", self.base, self.dims)
    }
}
