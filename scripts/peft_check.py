"""Saves adapters with PEFT in the forms that people have, and holds Tenora's scores of them against PEFT's own:

    python scripts/peft_check.py TENORA BASE.gguf [CASE...]

Needs torch, transformers, peft, gguf and sentencepiece, and a Llama in GGUF; takes a few minutes on 2 cores. Starts TENORA on a port of its own,
imports every folder, and prints the mean and the largest difference of log-probabilities from the model that PEFT had in memory when it saved
the folder. Ends with 1 where a mean is above the usual error, or where a folder is taken that must be refused.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import (AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, VeraConfig,
                  get_peft_model)
from transformers import AutoModelForCausalLM

TEXTS = [
    "The sea is salty because rivers carry minerals from the rocks, and the water leaves as vapour.",
    "Plants make food from light, water and air. The leaves are green since they hold chlorophyll.",
    "fn main() { println!(\"{}\", 6 * 7); }",
    "Le train de nuit pour Berlin part à 20 h 15 du quai numéro 4.",
]

# Nats a token that Tenora may be off in the mean: the rounding of activations gives 0.001 to 0.002 on the default base.
USUAL = 0.003

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(r=4, alpha=8, modules=ALL, **settings):
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=modules, **settings)


# name: (config, what is added to B, what is added to A)
TAKEN = {
    "plain": (lora(8, 16), 0.02, 0),
    "all_linear": (lora(modules="all-linear"), 0.02, 0),
    "rslora": (lora(16, 16, ["q_proj", "v_proj"], use_rslora=True), 0.02, 0),
    "regular_expression": (lora(modules=r".*\.(1|2|1\d)\.self_attn\.(q|o)_proj"), 0.1, 0),
    "full_names": (lora(modules=["model.layers.3.mlp.up_proj", "model.layers.9.self_attn.k_proj"]), 0.2, 0),
    "exclude_expression": (lora(modules="all-linear", exclude_modules=r".*mlp.*"), 0.05, 0),
    "exclude_list": (lora(exclude_modules=["down_proj", "layers.0.self_attn.q_proj"]), 0.05, 0),
    "layers": (lora(modules=["q_proj", "down_proj"], layers_to_transform=[0, 5, 9], layers_pattern="layers"), 0.1, 0),
    "one_layer": (lora(modules=["q_proj", "down_proj"], layers_to_transform=7), 0.2, 0),
    "patterns": (lora(8, 16, rank_pattern={"down_proj": 2, r"layers\.\d\.self_attn\.q_proj": 16, "^model.layers.2.mlp.up_proj": 3},
                      alpha_pattern={"q_proj": 32, r".*\.1\d\.mlp\.gate_proj": 4}), 0.02, 0),
    "patterns_rslora": (lora(8, 16, ["q_proj", "v_proj", "down_proj"], use_rslora=True, rank_pattern={"v_proj": 2},
                             alpha_pattern={"down_proj": 1}), 0.02, 0),
    "gaussian": (lora(8, 8, ["v_proj"], init_lora_weights="gaussian"), 0.1, 0),
    "pissa": (lora(16, 16, init_lora_weights="pissa"), 0.016, 0.016),
    "pissa_two_modules": (lora(32, 32, ["q_proj", "v_proj"], init_lora_weights="pissa"), 0.03, 0.03),
    "pissa_rslora": (lora(8, 8, ["q_proj", "o_proj", "down_proj"], use_rslora=True, init_lora_weights="pissa"), 0.012, 0.012),
    "pissa_niter_16": (lora(8, 8, ["q_proj", "v_proj"], init_lora_weights="pissa_niter_16"), 0.02, 0.02),
    "olora": (lora(16, 16, init_lora_weights="olora"), 0.01, 0.01),
}

# The part that was taken out of the base is not in the files.
ONLY_CONVERTED = ["pissa_niter_16"]

REFUSED = {
    "dora": lora(modules=["q_proj"], use_dora=True),
    "bias": lora(modules=["q_proj"], bias="lora_only"),
    "lora_bias": lora(modules=["q_proj"], lora_bias=True),
    "whole_head": lora(modules=["q_proj"], modules_to_save=["lm_head"]),
    "token_rows": lora(modules=["q_proj"], trainable_token_indices=[1, 2]),
    "replicated_layers": lora(modules=["q_proj"], layer_replication=[[0, 4], [2, 6]]),
    "embedding": lora(modules=["q_proj", "embed_tokens"]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix_tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "vera": VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10),
}


class Base:
    """The base in float32, each weight as the file has it."""

    def __init__(self, path):
        self.loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def fresh(self):
        # PEFT may change the configuration, and the weights.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(self.loaded.config), dtype=torch.float32)
        model.load_state_dict(self.loaded.state_dict())
        return model.eval().requires_grad_(False)


class Server:
    """`tenora serve` over a folder of its own, for as long as the block lasts."""

    def __init__(self, tenora, base, folder):
        self.tenora = tenora
        arguments = [tenora, "serve", "--insecure-no-auth", "--base", base, "--data-dir", folder, "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.environment = dict(os.environ, TENORA_SERVER=line.split()[-1], TENORA_TENANT="peft")
                break
        self.run("tenants", "create", "peft").check_returncode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()

    def run(self, *arguments):
        return subprocess.run([self.tenora, *arguments], env=self.environment, capture_output=True, text=True)

    def encode(self, text):
        return json.loads(self.run("tokenize", "--json", text).stdout)["token_ids"]

    def score(self, adapter, sequences):
        arguments = ["score", "--json", "--omit-token-text"] + (["--adapter", adapter] if adapter else [])
        for ids in sequences:
            arguments += ["--ids", ",".join(map(str, ids))]
        done = self.run(*arguments)
        done.check_returncode()
        return [[token["logprob"] for token in json.loads(line)["logprobs"]] for line in done.stdout.splitlines()]


@torch.no_grad()
def score(model, sequences):
    scores = []
    for ids in sequences:
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        scores.append([logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)])
    return scores


@torch.no_grad()
def move(model, by_b, by_a):
    generator = torch.Generator().manual_seed(7)
    for name, values in model.named_parameters():
        by = by_b if "lora_B" in name else by_a if "lora_A" in name else 0
        if by:
            values.add_(torch.randn(values.shape, generator=generator) * by)


def distance(left, right):
    differences = [abs(x - y) for a, b in zip(left, right, strict=True) for x, y in zip(a, b, strict=True)]
    return sum(differences) / len(differences), max(differences)


def save(base, name, folder, sequences):
    """Saves a case, and where its initialisation changed the base its converted form too; gives each folder with PEFT's scores."""
    config, by_b, by_a = TAKEN[name]
    torch.manual_seed(1)
    model = get_peft_model(base.fresh(), copy.deepcopy(config)).eval()
    took_a_part = str(config.init_lora_weights).split("_")[0] in ("pissa", "olora")
    start = folder / f"{name}-start"
    if took_a_part:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = config.init_lora_weights
    move(model, by_b, by_a)
    scores = score(model, sequences)
    model.save_pretrained(folder / name)
    yield name, scores
    if took_a_part:
        converted = f"{name}-converted"
        model.save_pretrained(folder / converted, path_initial_model_for_weight_conversion=str(start))
        yield converted, score(PeftModel.from_pretrained(base.fresh(), folder / converted).eval(), sequences)


def main(tenora, path, wanted):
    base, failed = Base(path), False
    with tempfile.TemporaryDirectory() as scratch, Server(tenora, path, f"{scratch}/data") as server:
        folder = pathlib.Path(scratch)
        sequences = [server.encode(text) for text in TEXTS]
        plain = score(base.fresh(), sequences)
        print("| folder | effect | mean difference | largest | |\n|---|---|---|---|---|")
        mean, largest = distance(server.score(None, sequences), plain)
        print(f"| the base | | {mean:.4f} | {largest:.4f} | |")

        def show(name, scores, refusal_is_right):
            adapter = name.replace("_", "-")
            done = server.run("adapters", "import", "--publish", "live", adapter, folder / name)
            if done.returncode:
                print(f"| {name} | | | | {done.stderr.strip().splitlines()[-1][:160]} |", flush=True)
                return refusal_is_right
            if scores is None:
                print(f"| {name} | | | | taken |", flush=True)
                return False
            mean, largest = distance(server.score(adapter, sequences), scores)
            print(f"| {name} | {distance(scores, plain)[0]:.3f} | {mean:.4f} | {largest:.4f} | |", flush=True)
            return mean <= USUAL and not refusal_is_right

        for name in TAKEN:
            if not wanted or name in wanted:
                for saved, scores in save(base, name, folder, sequences):
                    failed |= not show(saved, scores, saved in ONLY_CONVERTED)
        for name, config in REFUSED.items():
            if not wanted or name in wanted:
                get_peft_model(base.fresh(), config).save_pretrained(folder / name)
                failed |= not show(name, None, True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], pathlib.Path(sys.argv[2]).resolve(), sys.argv[3:]))
