//! PEFT's `PromptTuningConfig` and `PrefixTuningConfig`: one tensor, `prompt_embeddings`, for all virtual tokens. A prefix that was trained
//! reparametrised is saved without what made it.

use serde_json::{Map, Value, json};

use crate::adapter::peft::config::{Known, setting};
use crate::adapter::peft::tensors::{Named, alone};
use crate::adapter::peft::{SizeLimits, check_shape, refuse};
use crate::adapter::{BaseShape, VirtualForm};
use crate::error::Result;
use crate::request::{PrefixSpec, PromptSpec, TunerSpec, VirtualInit};

/// The tensor's name.
pub(super) const TENSOR: &str = "prompt_embeddings";

/// The settings of both kinds.
const KNOWN: Known = Known {
    read: &["num_virtual_tokens", "num_attention_heads", "num_transformer_submodules", "token_dim", "num_layers"],
    // How the tokens began, and how they were trained.
    without_meaning: &[
        "encoder_hidden_size",
        "init_weights",
        "prefix_projection",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    ],
    refused: &[(
        "modules_to_save",
        "whole layers are served as the base has them: train again with modules_to_save empty",
    )],
};

/// A config that is read.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) form: VirtualForm,
    pub(super) count: usize,
    /// Heads of the keys, where the config says.
    heads: Option<u64>,
}

impl Settings {
    pub(super) fn read(form: VirtualForm, config: &Map<String, Value>) -> Result<Self> {
        KNOWN.check(config)?;
        let whole =
            |key| setting(config, key, "a whole number of at least 1", |value| value.as_u64().filter(|n| *n > 0));
        let Some(count) = whole("num_virtual_tokens")? else {
            return Err(refuse(
                "INVALID_SETTING",
                "num_virtual_tokens",
                "is missing; it is in every config that PEFT writes",
            ));
        };
        if let Some(parts @ 2..) = whole("num_transformer_submodules")? {
            let message = format!("is {parts}; adapters of models that only decode are served, where it is 1");
            return Err(refuse("UNSUPPORTED_SETTING", "num_transformer_submodules", message));
        }
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        Ok(Self { form, count, heads: whole("num_attention_heads")? })
    }

    /// Refuses more tokens than the limit of the name.
    pub(super) fn check_size(&self, limits: SizeLimits) -> Result<()> {
        if self.count as u64 <= limits.virtual_tokens {
            return Ok(());
        }
        let message = format!(
            "is {}, over the limit max_virtual_tokens of {}; train with fewer, or ask the operator for a higher limit",
            self.count, limits.virtual_tokens
        );
        Err(refuse("TOO_MANY_VIRTUAL_TOKENS", "num_virtual_tokens", message))
    }

    /// Finds the tensor, the only one of the file.
    pub(super) fn find<'a>(&self, file: &'a [u8], shape: &BaseShape) -> Result<Named<'a>> {
        if let (VirtualForm::KeysAndValues, Some(heads)) = (self.form, self.heads)
            && heads != shape.kv_heads as u64
        {
            let message = format!(
                "is {heads}; the keys of this base have {}: import it on a server that runs the base it was trained on",
                shape.kv_heads
            );
            return Err(refuse("SHAPE_MISMATCH", "num_attention_heads", message));
        }
        let found = alone(file, TENSOR, shape)?;
        check_shape(&found, &[self.count, self.form.width(shape)])?;
        Ok(found)
    }

    /// How a fresh adapter would be shaped to have these tokens.
    pub(super) fn spec(&self) -> TunerSpec {
        let (virtual_tokens, init) = (u32::try_from(self.count).unwrap_or(u32::MAX), VirtualInit::Random);
        match self.form {
            VirtualForm::Embeddings => PromptSpec { virtual_tokens, init }.into(),
            VirtualForm::KeysAndValues => PrefixSpec { virtual_tokens, init, projection: None }.into(),
        }
    }

    /// Gives a text that is equal for equal settings.
    pub(super) fn canonical(&self) -> String {
        json!([self.count]).to_string()
    }
}

/// The config of virtual tokens trained here, in PEFT's words.
pub(super) fn config_json(form: VirtualForm, count: usize, shape: &BaseShape) -> Value {
    let mut config = json!({
        "auto_mapping": null,
        "base_model_name_or_path": shape.name,
        "inference_mode": true,
        "modules_to_save": null,
        "num_attention_heads": shape.heads,
        "num_layers": shape.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": count,
        "peft_type": "PROMPT_TUNING",
        "revision": null,
        "task_type": "CAUSAL_LM",
        "token_dim": shape.hidden_size,
    });
    let own = match form {
        VirtualForm::Embeddings => json!({
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": null,
            "tokenizer_kwargs": null,
            "tokenizer_name_or_path": null,
        }),
        VirtualForm::KeysAndValues => json!({
            "encoder_hidden_size": shape.kv_width(),
            "num_attention_heads": shape.kv_heads,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": false,
            "token_dim": shape.kv_width(),
        }),
    };
    for (key, value) in own.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}
