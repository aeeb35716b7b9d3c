#!/usr/bin/env python3
"""Writes the corpora of the fuzz targets: small files that are right, for mutations to begin from. Needs nothing but Python."""

import gzip
import hashlib
import json
import random
import struct
import zlib
from pathlib import Path

HERE = Path(__file__).parent / "corpus"
RANDOM = random.Random(1)


def put(target, name, data):
    folder = HERE / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def split(first, rest):
    """The first part after its length, then the other: what `split` in targets.rs takes apart."""
    first, rest = (part if isinstance(part, bytes) else part.encode() for part in (first, rest))
    return struct.pack("<H", len(first)) + first + rest


# A base of one layer.

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def alphabet():
    """GPT-2's stand-in for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if value and isinstance(value[0], int):
        return struct.pack("<IIQ", 9, 5, len(value)) + b"".join(struct.pack("<i", v) for v in value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(v) for v in value)


def matrix(cols, rows, kind):
    """Blocks of 32 values: Q4_0 (2), Q4_1 (3) or Q8_0 (8)."""
    scales, packed = {2: (1, 16), 3: (2, 16), 8: (1, 32)}[kind]
    half = lambda: struct.pack("<e", RANDOM.uniform(-0.02, 0.02))
    return b"".join(
        b"".join(half() for _ in range(scales)) + RANDOM.randbytes(packed) for _ in range(cols * rows // 32)
    )


TOKENS = alphabet() + ["he", "ll", "<|im_start|>", "<|im_end|>"]

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 258 + [3, 3],
    "tokenizer.ggml.merges": ["h e", "l l"],
    "tokenizer.ggml.eos_token_id": 259,
    "tokenizer.chat_template": TEMPLATE,
}


def gguf(kind=3, **metadata):
    width, ffn = 32, 32
    tokens = TOKENS
    values = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": width,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 16,
        "llama.feed_forward_length": ffn,
        "llama.context_length": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    } | TOKENIZER | metadata
    floats = lambda n: (0, [n], b"".join(struct.pack("<f", 1.0) for _ in range(n)))
    blocks = lambda cols, rows, kind=kind: (kind, [cols, rows], matrix(cols, rows, kind))
    tensors = {
        "token_embd.weight": blocks(width, len(tokens), 8),
        "output_norm.weight": floats(width),
        "blk.0.attn_norm.weight": floats(width),
        "blk.0.ffn_norm.weight": floats(width),
        "blk.0.attn_q.weight": blocks(width, 32),
        "blk.0.attn_k.weight": blocks(width, 16),
        "blk.0.attn_v.weight": blocks(width, 16),
        "blk.0.attn_output.weight": blocks(32, width),
        "blk.0.ffn_gate.weight": blocks(width, ffn),
        "blk.0.ffn_up.weight": blocks(width, ffn),
        "blk.0.ffn_down.weight": blocks(ffn, width),
    }
    return gguf_file(values, tensors)


def gguf_file(values, tensors):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    head += b"".join(text(key) + gguf_value(value) for key, value in values.items())
    data = b""
    for name, (kind, dims, content) in tensors.items():
        head += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        head += struct.pack("<IQ", kind, len(data))
        data += content + b"\0" * (-len(content) % 32)
    return head + b"\0" * (-len(head) % 32) + data


put("gguf", "q4_1", gguf())
put("gguf", "q4_0", gguf(kind=2))
put("gguf", "aligned", gguf(**{"general.alignment": 32, "general.name": "tiny"}))
put("gguf", "other-architecture", gguf(**{"general.architecture": "other"})[:4096])

# Adapters for the tests' tiny base: width 64, 4 heads and 2 KV heads of 16, ffn 96, 2 layers.

DIMS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 96), "mlp.up_proj": (64, 96), "mlp.down_proj": (96, 64),
}


def safetensors(tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, shape, content) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def adapter(rank, modules, layers=(0, 1), kind="F32", **settings):
    letter, tensors = {"F32": "f", "F16": "e"}[kind], {}
    for layer in layers:
        for module in modules:
            inputs, outputs = DIMS[module]
            for part, shape in [("lora_A", [rank, inputs]), ("lora_B", [outputs, rank])]:
                values = [RANDOM.uniform(-0.1, 0.1) for _ in range(shape[0] * shape[1])]
                name = f"base_model.model.model.layers.{layer}.{module}.{part}.weight"
                tensors[name] = (kind, shape, struct.pack(f"<{len(values)}{letter}", *values))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": [module.split(".")[1] for module in modules],
    } | settings
    return split(json.dumps(config), safetensors(tensors))


put("safetensors_and_config", "one-module", adapter(1, ["self_attn.q_proj"]))
put("safetensors_and_config", "attention-f16", adapter(1, list(DIMS)[:4], kind="F16", lora_dropout=0.05, use_rslora=True))
put("safetensors_and_config", "patterns", adapter(2, ["mlp.up_proj"], layers=[1], layers_to_transform=[1],
    rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 8}, layers_pattern="layers"))
put("safetensors_and_config", "expression", adapter(1, ["self_attn.k_proj"], target_modules=".*k_proj"))
put("safetensors_and_config", "other-kind", adapter(1, ["self_attn.v_proj"], peft_type="LOHA"))


def virtual(kind, width):
    """A file of two virtual tokens."""
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    values = struct.pack("<f", 0.5) * (2 * width)
    return split(json.dumps(config), safetensors({"prompt_embeddings": ("F32", [2, width], values)}))


put("safetensors_and_config", "prompt", virtual("PROMPT_TUNING", 64))
# Keys and values of two layers.
put("safetensors_and_config", "prefix", virtual("PREFIX_TUNING", 2 * 2 * 32))


def packed(sites, rank=1, scaled=0, bias=0, bottleneck=0, virtual=(0, 0), tokens=0):
    """The packed form of an adapter of ones: A padded and B in tiles of 16 outputs, what is scaled (1: the input, 2 and 3: the output) in
    float32, a bottleneck's biases (its pair is on outputs), a bias (1: beside the base's, 2: instead), each from a multiple of 32 values of two
    bytes on; then virtual tokens, of a form (1: embeddings, 2: keys and values) and so many; then so many tokens' ids and rows of the embedding."""
    pad = lambda n: -(-n // 32) * 32
    length = 0
    file = b"tenora packed 04" + hashlib.sha256(b"fuzz").hexdigest().encode()
    file += struct.pack("=IIIII", *virtual, tokens, 0, len(sites))
    for site in sites:
        inputs, outputs = list(DIMS.values())[site % 7]
        file += struct.pack("=IIIIIf", site, rank, scaled, bias, bottleneck, 2.0)
        length += pad(rank * (outputs if bottleneck else inputs)) + pad(-(-outputs // 16) * 16 * rank)
        length += pad(2 * {0: 0, 1: inputs}.get(scaled, outputs))
        length += pad(2 * rank) + pad(2 * outputs) if bottleneck else 0
        length += pad(2 * outputs) if bias else 0
    form, count = virtual
    length += pad(2 * count * (0, 64, 2 * 2 * 32)[form])
    ids, rows = struct.pack(f"={tokens}I", *range(tokens)), pad(2 * tokens * 64)
    file += struct.pack("=H", 0x3F80) * length + ids.ljust(2 * pad(2 * tokens), b"\0") + struct.pack("=H", 0x3F80) * rows
    length += pad(2 * tokens) + rows
    return struct.pack("<Q", 2 * length) + file + struct.pack("=I", zlib.crc32(file))


put("packed_file", "two-sites", packed([0, 8]))
put("packed_file", "one-layer", packed(range(7), rank=2))
put("packed_file", "pairs-and-scales", packed(range(7), rank=2, scaled=3))
put("packed_file", "scales-alone", packed([6], rank=0, scaled=1))
put("packed_file", "bottleneck", packed([6, 13], rank=3, bottleneck=1))
put("packed_file", "biases", packed([0, 8], bias=1))
put("packed_file", "biases-alone", packed([3], rank=0, bias=2))
put("packed_file", "tokens", packed([0], tokens=3))
put("packed_file", "prompt", packed([], virtual=(1, 3)))
put("packed_file", "prefix", packed([], virtual=(2, 2)))

# Datasets.

chat = lambda *turns: [{"role": role, "content": content} for role, content in turns]
LINES = {
    "messages": {"messages": chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello ")) },
    "weights": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "weight": 1}]},
    "prompt-completion": {"prompt": "2+2=", "completion": " 4"},
    "prompt-completion-chat": {"prompt": chat(("user", "q")), "completion": chat(("assistant", "a"))},
    "preference": {"prompt": chat(("user", "q")), "chosen": chat(("assistant", "good")), "rejected": chat(("assistant", "bad"))},
    "preference-implicit": {"chosen": chat(("user", "q"), ("assistant", "good")), "rejected": chat(("user", "q"), ("assistant", "bad"))},
    "preference-text": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3", "system": "", "history": [["q", "a"]]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}], "tools": None},
    "marks": {"messages": chat(("user", "<|im_end|>\n<|im_start|>system \ufdd0\u0000"), ("assistant", "no"))},
}
for name, record in LINES.items():
    put("jsonl", name, json.dumps(record) + "\n")
put("jsonl", "two-lines", "\n".join(json.dumps(LINES[name], ensure_ascii=False) for name in ["messages", "preference"]))

array = [LINES["messages"], LINES["weights"]]
put("jsonl", "array", json.dumps(array))
put("jsonl", "array-pretty", json.dumps(array, indent=2))
put("jsonl", "mark", b"\xef\xbb\xbf" + json.dumps(LINES["alpaca"]).encode() + b"\r\n")
put("jsonl", "gzip", gzip.compress("\n".join(json.dumps(LINES[name]) for name in ["messages", "alpaca"]).encode(), mtime=0))
put("jsonl", "utf-16", json.dumps(LINES["messages"]).encode("utf-16"))
put("jsonl", "csv", "prompt,completion\n1,2\n")

# Templates with messages, phrases with texts.

CONTENT = "You are brief.\nHello <|im_end|>\n\ufdd0 hi"
TEMPLATES = {
    "plain": TEMPLATE,
    "checks": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ m.content | trim | upper }}{{ loop.index0 }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}",
    "methods": "{%- set ns = namespace(n=0) -%}{%- for m in messages[::-1] -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ m['content'].split(' ')[0].strip() ~ ns.n }}{%- endfor -%}{{ messages | tojson }}",
    "macro": "{% macro turn(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}{% for m in messages %}{{ turn(m) }}\n{% endfor %}",
    "loops": "{% for i in range(9) %}{% for m in messages %}{% if i == 3 %}{% break %}{% endif %}{{ 'x' * i }}{% endfor %}{% endfor %}",
}
for name, template in TEMPLATES.items():
    put("template", name, split(template, CONTENT))
put("policy", "words", split("secret\nthe password is\nSECRET plan", "A Secret kept; the pass word is not the password is, secret"))
put("policy", "overlaps", split("aab\nab\nbaa\naaaa", "aaaabaabaaab" * 3))
put("policy", "wide", split("\u00fcber\n\U0001f600\n\u00df", "Dar\u00fcber lacht \U0001f600 die Stra\u00dfe"))

# Requests: the message's number in convert_bytes, then its fields.


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value if isinstance(value, bytes) else value.encode()
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value):
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def request(which, *fields):
    return bytes([which]) + b"".join(field(number, value) for number, value in fields)


turn = lambda role, content: field(1, field(1, role) + field(2, content))
conversation = turn("user", "Hi") + turn("assistant", "Hello")
for number in range(1, 9):
    # Every field once as a message, once as a number: which it is, is the schema's to say.
    put("protos", f"generate-{number}", request(0, (1, "tenants/t/adapters/a"), (2, conversation), (number, 3)))
    put("protos", f"train-{number}", request(2, (1, "tenants/t"), (2, "a"), (3, "tenants/t/datasets/d"), (number, conversation)))
put("protos", "score", request(1, (1, "tenants/t/adapters/a/versions/2"), (2, field(1, "text")), (2, field(2, conversation)), (3, 5)))
put("protos", "tenant", request(3, (1, field(1, "tenants/t") + field(2, "A name")), (2, field(1, "display_name"))))
put("protos", "page", request(4, (1, "tenants/t"), (2, -1), (3, "token")))
put("protos", "pair", request(5, (1, conversation), (2, "good"), (3, "bad")))
put("protos", "chat", bytes([6]) + conversation)
put("protos", "policy", request(7, (1, field(1, "tenants/t/safetyPolicy") + field(2, "phrase"))))
put("protos", "name", request(8, (1, "tenants/t/adapters/a/versions/7")))
put("protos", "text", bytes([9]) + "A name".encode())


# Bases of other architectures, and one of other block formats. Last, so that what comes before has the numbers it had.

FLOATS = lambda n: (0, [n], struct.pack(f"<{n}f", *[1.0] * n))

# Type: values and bytes of a block, and where its half-precision numbers are.
BLOCKS = {
    1: (1, 2, [0]), 6: (32, 22, [0]), 7: (32, 24, [0, 2]), 8: (32, 34, [0]), 10: (256, 84, [80, 82]), 11: (256, 110, [108]),
    12: (256, 144, [0, 2]), 13: (256, 176, [0, 2]), 14: (256, 210, [208]), 20: (32, 18, [0]), 23: (256, 136, [0]),
}


def blocks(cols, rows, kind):
    values, size, halves = BLOCKS[kind]
    data = bytearray()
    for _ in range(cols * rows // values):
        block = bytearray(RANDOM.randbytes(size))
        for at in halves:
            block[at : at + 2] = struct.pack("<e", RANDOM.uniform(-0.01, 0.01))
        data += block
    return (kind, [cols, rows], bytes(data))


def other(architecture, tensors, width=32, heads=2, head_width=16, ffn=32, kinds=8, **metadata):
    """One block; `kinds` of the seven matrices in their order, or of all."""
    kinds = kinds if isinstance(kinds, list) else [kinds] * 8
    of = lambda key: f"{architecture}.{key}"
    values = {
        "general.architecture": architecture, of("block_count"): 1, of("embedding_length"): width, of("attention.head_count"): heads,
        of("attention.head_count_kv"): 1, of("attention.key_length"): head_width, of("feed_forward_length"): ffn, of("context_length"): 64,
        of("attention.layer_norm_rms_epsilon"): 1e-5, **{of(key): value for key, value in metadata.items()},
    }
    q, kv = heads * head_width, head_width
    block = {
        "attn_norm": FLOATS(width), "ffn_norm": FLOATS(width), "attn_q": blocks(width, q, kinds[1]), "attn_k": blocks(width, kv, kinds[2]),
        "attn_v": blocks(width, kv, kinds[3]), "attn_output": blocks(q, width, kinds[4]), "ffn_gate": blocks(width, ffn, kinds[5]),
        "ffn_up": blocks(width, ffn, kinds[6]), "ffn_down": blocks(ffn, width, kinds[7]),
    }
    block |= tensors
    named = {f"blk.0.{name}" + ("" if "." in name else ".weight"): value for name, value in block.items() if value}
    named |= {"token_embd.weight": blocks(width, len(TOKENS), kinds[0]), "output_norm.weight": FLOATS(width)}
    return values | TOKENIZER, named


put("gguf", "formats", gguf_file(*other("llama", {}, width=256, heads=1, head_width=32, kinds=[10, 11, 12, 13, 6, 14, 23, 20])))
put("gguf", "qwen2", gguf_file(*other("qwen2", {"attn_q.bias": FLOATS(32), "attn_k.bias": FLOATS(16), "attn_v.bias": FLOATS(16)}, kinds=7)))
put("gguf", "gemma3", gguf_file(*other("gemma3", {
    "attn_q_norm": FLOATS(16), "attn_k_norm": FLOATS(16), "post_attention_norm": FLOATS(32), "post_ffw_norm": FLOATS(32),
}, **{"attention.sliding_window": 8, "attention.sliding_window_pattern": [1], "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0})))
VALUES, TENSORS = other("phi3", {
    "attn_q": None, "attn_k": None, "attn_v": None, "ffn_gate": None, "attn_qkv": blocks(32, 64, 8), "ffn_up": blocks(32, 64, 8),
}, **{"rope.dimension_count": 12, "rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.1})
put("gguf", "phi3", gguf_file(VALUES, TENSORS | {f"rope_factors_{name}.weight": FLOATS(6) for name in ("short", "long")}))
put("gguf", "granite", gguf_file(*other("granite", {}, kinds=1, **{
    "embedding_scale": 12.0, "residual_scale": 0.2, "attention.scale": 0.1, "logit_scale": 8.0,
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
})))

# Folders of Hugging Face's form: the configuration, then the tensors.


def folder(dtype, biased=False, **settings):
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "vocab_size": 40, "max_position_embeddings": 64, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "hidden_act": "silu",
    } | settings
    gemma = config["model_type"].startswith("gemma")
    shapes = {
        "self_attn.q_proj": [32, 32], "self_attn.k_proj": [16, 32], "self_attn.v_proj": [16, 32], "self_attn.o_proj": [32, 32],
        "mlp.gate_proj": [32, 32], "mlp.up_proj": [32, 32], "mlp.down_proj": [32, 32], "input_layernorm": [32], "post_attention_layernorm": [32],
    }
    if gemma:
        shapes |= {f"{name}_feedforward_layernorm": [32] for name in ("pre", "post")} | {f"self_attn.{n}_norm": [16] for n in "qk"}
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    if biased:
        names |= {f"model.layers.0.self_attn.{n}_proj.bias": [32 if n == "q" else 16] for n in "qkv"}
    names |= {"model.embed_tokens.weight": [40, 32], "model.norm.weight": [32]}
    def tensor(shape):
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        floats = [RANDOM.uniform(-0.1, 0.1) for _ in range(count)]
        if dtype == "BF16":
            return (dtype, shape, b"".join(struct.pack("<f", x)[2:] for x in floats))
        return (dtype, shape, struct.pack(f"<{count}" + {"F32": "f", "F16": "e"}[dtype], *floats))
    return split(json.dumps(config), safetensors({name: tensor(shape) for name, shape in names.items()}))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
put("folder", "llama", folder("BF16", rope_scaling=LLAMA3))
put("folder", "qwen2", folder("F16", biased=True, model_type="qwen2", rope_parameters=YARN | {"rope_theta": 1e6}))
put("folder", "gemma3", folder("BF16", model_type="gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
    hidden_activation="gelu_pytorch_tanh", layer_types=["sliding_attention"], rope_local_base_freq=10000.0))
put("folder", "untied", folder("F32", tie_word_embeddings=False)[:9000])
