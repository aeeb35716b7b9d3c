"""Supervised fine-tuning with transformers and peft in float32 on the CPU. Run by an interpreter that has them:

    peft_train.py prepare BASE.gguf FOLDER RANK ALPHA
    peft_train.py train FOLDER RECORDS STEPS BATCH LEARNING_RATE THREADS [--gradient-checkpointing]

`prepare` writes the base in peft's form to FOLDER/base, and an adapter on all linear layers before its first step to FOLDER/start. `train`
takes that adapter through the steps and prints what it saw of each, with the most memory that was resident: {"steps": [{"loss", "tokens_per_second"}],
"peak_bytes"}. RECORDS is a JSON list of {"ids", "in_loss"}, all of one length; step s takes BATCH of them from number s * BATCH on, and after the last the first again.
"""

import argparse
import json
import pathlib
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

# Means "not in the loss" to transformers.
IGNORED = -100


def prepare(arguments):
    path, folder = arguments.base, arguments.folder
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # transformers does not save a model that came from a GGUF file.
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder / 'base')
    torch.manual_seed(0)
    config = LoraConfig(task_type='CAUSAL_LM', r=arguments.rank, lora_alpha=arguments.alpha, lora_dropout=0.0, target_modules='all-linear')
    get_peft_model(model, config).save_pretrained(folder / 'start')
    return {}


def train(arguments):
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / 'base', dtype=torch.float32)
    # Keys and values are for generating.
    model.config.use_cache = False
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    model = PeftModel.from_pretrained(model, arguments.folder / 'start', is_trainable=True).train()
    trained = [values for values in model.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    records = json.loads(arguments.records.read_text())
    steps = []
    for number in range(arguments.steps):
        began = time.perf_counter()
        batch = [records[(number * arguments.batch + i) % len(records)] for i in range(arguments.batch)]
        ids = torch.tensor([record['ids'] for record in batch])
        labels = ids.masked_fill(~torch.tensor([record['in_loss'] for record in batch]), IGNORED)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({'loss': loss.item(), 'tokens_per_second': ids.numel() / (time.perf_counter() - began)})
    return {'steps': steps, 'peak_bytes': peak_bytes()}


def peak_bytes():
    status = pathlib.Path('/proc/self/status').read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith('VmHWM'))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('prepare')
    command.set_defaults(run=prepare)
    command.add_argument('base', type=pathlib.Path)
    command.add_argument('folder', type=pathlib.Path)
    command.add_argument('rank', type=int)
    command.add_argument('alpha', type=float)
    command = commands.add_parser('train')
    command.set_defaults(run=train)
    command.add_argument('folder', type=pathlib.Path)
    command.add_argument('records', type=pathlib.Path)
    command.add_argument('steps', type=int)
    command.add_argument('batch', type=int)
    command.add_argument('learning_rate', type=float)
    command.add_argument('threads', type=int)
    command.add_argument('--gradient-checkpointing', action='store_true')
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments)))


main()
