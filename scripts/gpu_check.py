"""Measures on a GPU, for scripts/gpu-check: `gpu_check.py TENORA OUT` appends to OUT/results.md.

tenora over gRPC by its own load generator, with both ways to multiply frozen matrices; how often an answer differs in a batch from alone;
and, where they are installed, transformers and peft in bf16 on random weights of the base's shapes.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

BATCHES = [1, 16, 64, 256]
PROMPT, ANSWER, ROUNDS = 128, 128, 5
PREFILL = 2048

# SmolLM2-135M in Q4_1: what a decoding step reads. Bytes.
WEIGHT_BYTES = 98_362_432
KV_BYTES_PER_TOKEN = 2 * 30 * 3 * 64 * 2

TOPICS = ["the sea", "plants", "rivers", "trains", "bread", "the moon", "glass", "bees", "clocks", "paper", "salt", "wind", "iron", "maps",
          "snow", "ink"]


class Server:
    """`tenora serve` on a free port, for as long as the block lasts."""

    def __init__(self, tenora, out, matmul):
        self.tenora, self.matmul = tenora, matmul
        self.log = open(out / f"serve-{matmul}.log", "w")

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        limits = {"max_running": 256, "max_queued_per_tenant": 1024, "max_step_rows": 2048, "kv_cache_bytes": 8 << 30,
                  "adapter_cache_bytes": 4 << 30, "max_rank": 64}
        arguments = [self.tenora, "serve", "--listen", "127.0.0.1:0", "--device", "cuda:0", "--insecure-no-auth", "--data-dir",
                     self.folder.name]
        arguments += [part for limit in limits.items() for part in ("--limit", "%s=%d" % limit)]
        environment = os.environ | {"TENORA_CUDA_MATMUL": self.matmul}
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.address = line.split()[-1]
                return self
        raise RuntimeError(f"the server did not start; see {self.log.name}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def client(self, *arguments):
        command = [self.tenora, *map(str, arguments), "--server", self.address, "--json"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def bench(self, streams, prompt, answer, adapters=0):
        extra = ["--adapters", "distinct", "--adapter-count", adapters, "--rank", 16, "--tenant", "operator"] if adapters else []
        load = ["--streams", streams, "--prompt-tokens", prompt, "-n", answer, "--rounds", ROUNDS, "--warm-up"]
        return json.loads(self.client("bench", *load, *extra))["median"]

    def answers(self, prompts):
        lines = self.client("generate", "-n", 64, "--ignore-eos", *prompts).splitlines()
        return [json.loads(line)["token_ids"] for line in lines]


def copy_bandwidth():
    """Bytes a second that a large copy on the device reads and writes; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(10):
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / sorted(times)[len(times) // 2]


def measure_tenora(tenora, out, report):
    bandwidth = copy_bandwidth()
    report("\nDevice copy: " + (f"{bandwidth / 1e12:.2f} TB/s read and written\n" if bandwidth else "not measured, no torch\n"))
    for matmul in ["exact", "int8"]:
        report(f"\n## tenora, {matmul} matmul\n\n| load | tokens/s | between tokens p50 ms | first token p50 ms | bandwidth |\n|---|---|---|---|---|")
        with Server(tenora, out, matmul) as server:
            for batch in BATCHES:
                figures = server.bench(batch, PROMPT, ANSWER)
                gap = figures["between_tokens_ms"]["p50"] / 1e3
                moved = WEIGHT_BYTES + batch * (PROMPT + ANSWER / 2) * KV_BYTES_PER_TOKEN
                share = f"{moved / gap / bandwidth:.0%}" if bandwidth and gap else "-"
                row(report, f"decode, batch {batch}", figures["generated_per_second"], figures, share)
            for adapters in [0, 1, 64]:
                figures = server.bench(max(adapters, 1), PREFILL, 1, adapters)
                row(report, f"prefill {PREFILL}, {adapters} adapters", figures["tokens_per_second"], figures, "-")
            figures = server.bench(64, PROMPT, ANSWER, 64)
            row(report, "decode, batch 64, 64 adapters", figures["generated_per_second"], figures, "-")
            prompts = [f"Tell me about {topic}." for topic in TOPICS]
            together = server.answers(prompts)
            alone = [server.answers([prompt])[0] for prompt in prompts]
            differ = sum(a != b for a, b in zip(together, alone))
            report(f"\nAnswers of 64 tokens that differ in a batch of {len(prompts)} from alone: {differ} of {len(prompts)}")


def row(report, name, tokens, figures, share):
    gap, first = figures["between_tokens_ms"]["p50"], figures["first_token_ms"]["p50"]
    report(f"| {name} | {tokens:.0f} | {gap:.2f} | {first:.1f} | {share} |")


def measure_transformers(report):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    report("\n## transformers, bf16, random weights\n\n| load | tokens/s |\n|---|---|")
    for batch in BATCHES:
        report(f"| decode, batch {batch} | {generate_speed(model, batch):.0f} |")
    report(f"| prefill {PREFILL} | {prefill_speed(model, 1):.0f} |")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora, adapter_name="a0")
    for i in range(1, 64):
        model.add_adapter(f"a{i}", lora)
    model = model.to("cuda", torch.bfloat16).eval()
    names = [f"a{i}" for i in range(64)]
    report(f"| peft, decode, batch 64, 64 adapters | {generate_speed(model, 64, adapter_names=names):.0f} |")
    report(f"| peft, prefill {PREFILL}, 1 adapter | {prefill_speed(model, 1, adapter_names=names[:1]):.0f} |")


def timed(run):
    """The median time of a run in seconds, after one that is not counted."""
    import torch

    times = []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        with torch.no_grad():
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[1:])[1]


def generate_speed(model, batch, **extra):
    import torch

    ids = torch.randint(1000, 49000, (batch, PROMPT), device="cuda")
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 2, **extra}
    return batch * ANSWER / timed(lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options))


def prefill_speed(model, batch, **extra):
    import torch

    ids = torch.randint(1000, 49000, (batch, PREFILL), device="cuda")
    return batch * PREFILL / timed(lambda: model(input_ids=ids, logits_to_keep=1, **extra))


def main():
    tenora, out = sys.argv[1], pathlib.Path(sys.argv[2])

    def report(line):
        print(line, flush=True)
        with open(out / "results.md", "a") as results:
            results.write(line + "\n")

    measure_tenora(tenora, out, report)
    try:
        measure_transformers(report)
    except ImportError as error:
        report(f"\ntransformers not measured: {error}")


if __name__ == "__main__":
    main()
