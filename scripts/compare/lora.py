"""PEFT folders as float32 GGUF adapters for llama.cpp, without torch: the values stay as they are, rows of two matrices move.

Float32 is what llama.cpp's own converter writes unless told otherwise, and its CPU code is faster with it than with half precision.

GGUF files of llama and its like hold the output rows of attn_q and attn_k in another order than PEFT (rotary pairs next to each other, where PEFT
has them half a head apart), so lora_B's rows move with them.
"""

import json
import struct

NAMES = {
    'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down',
    'self_attn.qkv_proj': 'attn_qkv', 'mlp.gate_up_proj': 'ffn_up',
}
# How struct reads safetensors' dtypes.
DTYPES = {'F32': 'f', 'F16': 'e'}
# GGUF's numbers of types.
F32 = 0
STRING, FLOAT32 = 8, 6
ALIGNMENT = 32

# Architectures whose rows of attn_q and attn_k GGUF has in another order.
INTERLEAVED = 'llama', 'granite', 'mistral3'


def read_safetensors(path):
    """(name, shape, bytes in float32) of every tensor."""
    content = path.read_bytes()
    length, = struct.unpack_from('<Q', content)
    data = memoryview(content)[8 + length:]
    for name, tensor in json.loads(content[8:8 + length]).items():
        if name != '__metadata__':
            start, end = tensor['data_offsets']
            yield name, tensor['shape'], float32(data[start:end], DTYPES[tensor['dtype']])


def float32(data, kind):
    if kind == 'f':
        return data
    count = len(data) // struct.calcsize(kind)
    return struct.pack(f'<{count}f', *struct.unpack(f'<{count}{kind}', data))


def interleave(rows, width):
    """Rows of every head, each of so many, from [first half, second half] to alternating."""
    half = width // 2
    return [rows[head + (i % 2) * half + i // 2] for head in range(0, len(rows), width) for i in range(width)]


def convert(base, name, shape, data):
    """A tensor's name and bytes in GGUF."""
    _, _, _, _, layer, *module, factor, _ = name.split('.')
    module = NAMES['.'.join(module)]
    if base['architecture'] in INTERLEAVED and factor == 'lora_B' and module in ('attn_q', 'attn_k'):
        row = len(data) // shape[0]
        data = b''.join(interleave([data[i * row:(i + 1) * row] for i in range(shape[0])], base['head_dim']))
    return f'blk.{layer}.{module}.weight.{factor.lower()}', data


def write_gguf(base, folder, path):
    """Writes the adapter of a PEFT folder as a GGUF file. `base`: what `tenora models inspect --json` says of its base."""
    config = json.loads((folder / 'adapter_config.json').read_text())
    tensors = []
    for name, shape, data in read_safetensors(folder / 'adapter_model.safetensors'):
        tensors.append((*convert(base, name, shape, data), shape))
    fields = [
        ('general.architecture', STRING, string(base['architecture'])),
        ('general.type', STRING, string('adapter')),
        ('adapter.type', STRING, string('lora')),
        ('adapter.lora.alpha', FLOAT32, struct.pack('<f', config['lora_alpha'])),
    ]
    header = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(fields))
    for key, kind, value in fields:
        header += string(key) + struct.pack('<I', kind) + value
    offset = 0
    for name, data, shape in tensors:
        header += string(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *reversed(shape), F32, offset)
        offset += padded(len(data))
    with open(path, 'wb') as file:
        file.write(header.ljust(padded(len(header)), b'\0'))
        for _, data, _ in tensors:
            file.write(bytes(data).ljust(padded(len(data)), b'\0'))


def padded(length):
    return -(-length // ALIGNMENT) * ALIGNMENT


def string(text):
    encoded = text.encode()
    return struct.pack('<Q', len(encoded)) + encoded
