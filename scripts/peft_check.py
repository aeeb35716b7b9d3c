"""Holds Tenora's log-probabilities of adapters against PEFT's own:

    python scripts/peft_check.py TENORA BASE.gguf [CASE...]
    python scripts/peft_check.py TENORA BASE.gguf FOLDER... [--adapter NAME] [--ids ID,ID...]

Needs torch, transformers, peft, gguf and sentencepiece, and a Llama in GGUF; `scripts/peft-check` finds both. Prints the mean and the largest
difference of log-probabilities, and ends with 1 where the mean of an adapter is above the usual error, or a hundredth of its effect.

With FOLDERs each is an adapter that PEFT loads over the base, whatever its kind: one that Tenora has exported, or any other. Tenora imports it into
a server of its own; or scores what a running server has under NAME, which is where an export came from.

A FOLDER with a config.json is a whole model, such as `tenora jobs export` writes: transformers opens it, and Tenora serves it as a base. Where it
has no tokenizer, a copy of it gets the base's.

Without, adapters are saved with PEFT in the forms that people have, and compared with the model that PEFT had in memory when it saved the folder;
this takes a few minutes on 2 cores. A folder that is taken and must be refused ends with 1 too.
"""

import argparse
import contextlib
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
from transformers import AutoModelForCausalLM, AutoTokenizer

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


# name: (config, what is added to B or to what a kind has in its place, what is added to A)
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
    "dora": (lora(8, 16, use_dora=True), 0.02, 0),
    "lora_bias": (lora(8, 16, lora_bias=True), 0.02, 0),
    "token_rows": (lora(8, 16, trainable_token_indices=[28, 30, 260, 17]), 0.02, 0),
    # The default base has no biases to train.
    "no_bias": (lora(8, 16, ["q_proj"], bias="lora_only"), 0.02, 0),
    "ia3": (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), 0.1, 0),
    "prompt_tuning": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20), 0.1, 0),
    "prefix_tuning": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 0.1, 0),
    "prefix_projection": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=64, prefix_projection=True), 0.1, 0),
}

# Parts of the names of what is moved with B.
MOVED = "lora_B", "lora_magnitude_vector", "ia3_l", "prompt_encoder", "trainable_tokens_delta"

# The part that was taken out of the base is not in the files.
ONLY_CONVERTED = ["pissa_niter_16"]

REFUSED = {
    "whole_head": lora(modules=["q_proj"], modules_to_save=["lm_head"]),
    "replicated_layers": lora(modules=["q_proj"], layer_replication=[[0, 4], [2, 6]]),
    "embedding": lora(modules=["q_proj", "embed_tokens"]),
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


class Client:
    """Tenora's command line, for the server that the environment names."""

    def __init__(self, tenora):
        self.tenora, self.environment = tenora, os.environ

    def run(self, *arguments):
        return subprocess.run([self.tenora, *arguments], env=self.environment, capture_output=True, text=True)

    def ask(self, *arguments):
        done = self.run(*arguments)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        return done.stdout

    def encode(self, text):
        return json.loads(self.ask("tokenize", "--json", text))["token_ids"]

    def score(self, adapter, sequences):
        arguments = ["score", "--json", "--omit-token-text"] + (["--adapter", adapter] if adapter else [])
        for ids in sequences:
            arguments += ["--ids", ",".join(map(str, ids))]
        return [[token["logprob"] for token in json.loads(line)["logprobs"]] for line in self.ask(*arguments).splitlines()]


class Server(Client):
    """`tenora serve` over a folder of its own, for as long as the block lasts."""

    def __init__(self, tenora, base, folder):
        super().__init__(tenora)
        arguments = [tenora, "serve", "--insecure-no-auth", "--base", base, "--data-dir", folder, "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.environment = dict(os.environ, TENORA_SERVER=line.split()[-1], TENORA_TENANT="peft")
                break
        self.ask("tenants", "create", "peft")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


@torch.no_grad()
def score(model, sequences):
    scores = []
    for ids in sequences:
        # A prompt that was tuned has logits too, before those of the ids.
        logits = model(torch.tensor([ids])).logits[0, -len(ids):]
        logprobs = torch.log_softmax(logits.float(), -1)
        scores.append([logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1)])
    return scores


@torch.no_grad()
def move(model, by_b, by_a):
    generator = torch.Generator().manual_seed(7)
    for name, values in model.named_parameters():
        by = by_a if "lora_A" in name else by_b if any(part in name for part in MOVED) else 0
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
    took_a_part = str(getattr(config, "init_lora_weights", None)).split("_")[0] in ("pissa", "olora")
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


def compare(name, effect, left, right):
    """Prints a line of the table; gives whether it is usual. A prefix that nobody has trained turns the base upside down: of such an effect, nats
    a token, a hundredth is."""
    mean, largest = distance(left, right)
    print(f"| {name} | {effect:.3f} | {mean:.4f} | {largest:.4f} | |", flush=True)
    return mean <= max(USUAL, 0.01 * effect)


def check_folders(base, tenora, folders, sequences, plain, adapter):
    """Holds saved adapters against what `tenora` scores: `adapter`, where it is told, else each once it is imported."""
    fine = True
    for number, folder in enumerate(folders):
        scores = score(PeftModel.from_pretrained(base.fresh(), folder).eval(), sequences)
        if not adapter:
            tenora.ask("adapters", "import", f"folder-{number}", folder)
        effect, _ = distance(scores, plain)
        fine &= compare(folder.name, effect, tenora.score(adapter or f"folder-{number}", sequences), scores)
    return fine


def with_tokenizer(folder, path, scratch):
    """The folder of a model, or one of links to its files with the tokenizer of the GGUF file beside them."""
    if (folder / "tokenizer.json").exists():
        return folder
    whole = scratch / f"{folder.name}-with-tokenizer"
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(whole)
    for file in folder.resolve().iterdir():
        (whole / file.name).symlink_to(file)
    return whole


def check_models(tenora, path, models, sequences, plain, scratch):
    """Holds the log-probabilities of whole models that transformers opens against those of Tenora, which serves them as bases."""
    fine = True
    for folder in models:
        whole = with_tokenizer(folder, path, scratch)
        scores = score(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval(), sequences)
        with Server(tenora, whole, scratch / f"{folder.name}-data") as server:
            fine &= compare(folder.name, distance(scores, plain)[0], server.score(None, sequences), scores)
    return fine


def check_cases(base, server, folder, cases, sequences, plain):
    """Saves each case with PEFT, and holds what Tenora makes of it against the model in memory."""
    def show(name, scores, refusal_is_right):
        adapter = name.replace("_", "-")
        done = server.run("adapters", "import", "--publish", "live", adapter, folder / name)
        if done.returncode:
            print(f"| {name} | | | | {done.stderr.strip().splitlines()[-1][:160]} |", flush=True)
            return refusal_is_right
        if scores is None:
            print(f"| {name} | | | | taken |", flush=True)
            return False
        return compare(name, distance(scores, plain)[0], server.score(adapter, sequences), scores) and not refusal_is_right

    fine = True
    for name in TAKEN:
        if not cases or name in cases:
            for saved, scores in save(base, name, folder, sequences):
                fine &= show(saved, scores, saved in ONLY_CONVERTED)
    for name, config in REFUSED.items():
        if not cases or name in cases:
            get_peft_model(base.fresh(), config).save_pretrained(folder / name)
            fine &= show(name, None, True)
    return fine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tenora", help="the program")
    parser.add_argument("base", type=pathlib.Path, help="a GGUF file")
    parser.add_argument("what", nargs="*", metavar="CASE|FOLDER", help="cases by name (default: all), or saved adapters and models")
    parser.add_argument("--adapter", metavar="NAME", help="beside one folder: what the server of TENORA_SERVER, TENORA_TENANT and "
                        "TENORA_KEY has under this name")
    parser.add_argument("--ids", action="append", metavar="ID,ID...", help="score these ids (default: a few texts); may be repeated. "
                        "The mean of a few tokens may be above the usual error")
    arguments = parser.parse_args()
    cases = [word for word in arguments.what if word in TAKEN or word in REFUSED]
    folders = [pathlib.Path(word) for word in arguments.what if word not in cases]
    for folder in folders:
        if not any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
            parser.error(f"{folder} is neither a case nor a folder with an adapter_config.json or a config.json")
    models = [folder for folder in folders if not (folder / "adapter_config.json").exists()]
    folders = [folder for folder in folders if folder not in models]
    if cases and (folders or models) or arguments.adapter and (models or len(folders) != 1):
        parser.error("cases or folders, and with --adapter one folder of an adapter")
    path = arguments.base.resolve()
    base = Base(path)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        tenora = Client(arguments.tenora) if arguments.adapter else stack.enter_context(Server(arguments.tenora, path, f"{scratch}/data"))
        sequences = [[int(i) for i in ids.split(",")] for ids in arguments.ids or []] or [tenora.encode(text) for text in TEXTS]
        plain = score(base.fresh(), sequences)
        print("| folder | effect | mean difference | largest | |\n|---|---|---|---|---|")
        compare("the base", 0.0, tenora.score(None, sequences), plain)
        if folders or models:
            fine = check_folders(base, tenora, folders, sequences, plain, arguments.adapter)
            fine &= check_models(arguments.tenora, path, models, sequences, plain, pathlib.Path(scratch))
        else:
            fine = check_cases(base, tenora, pathlib.Path(scratch), cases, sequences, plain)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
