"""Training beside transformers and peft: tokens a second, and the most memory that was resident in the process that trains.

What is the same: the base's values, the adapter before its first step, the ids of the records, their order and which of them are in the
loss, AdamW without decay at a constant rate, clipping at norm 1, the threads, no dropout. The losses show it.

What differs: Tenora is a whole server, asked over gRPC, and keeps the base's quantised blocks; it computes logits for the tokens in the loss
alone, in passes of two records; and its peak takes in the gate that the new version goes through. The reference is a loop around the model,
with the base in float32. A second one recomputes each layer in the backward pass (gradient checkpointing), slower in less memory. Of both the
steps count that follow the first two, each as tokens of its records over its time, and loading does not.
"""

import json
import random
import shutil
import statistics

import llama
import reference
import tenora
from llama import MODELS
from places import CACHE, THREADS

BATCH, TOKENS = 4, 256
RANK, ALPHA, LEARNING_RATE = 8, 16, 2e-4
RECORDS = 8 * BATCH
# Steps that warm up: memory is taken, pages are read.
WARMING = 2
# Losses that the results show.
SHOWN = 4

# The start that both sides train from, and the base for the reference.
FOLDER = CACHE / 'training'
DATA = 'data-training'
# Each is one token of the default base, with the space before it.
WORDS = ('river stone house green morning train letter paper quiet market garden window bridge winter water music island doctor camera '
         'silver forest number animal summer school machine village mountain engine color').split()

OURS, THEIRS, CHECKPOINTED = 'tenora', 'transformers + peft', 'transformers + peft, gradient checkpointing'


class Training:
    """`steps`: those that count of each run. `python`: the reference's interpreter, where it is told."""
    title = f'Training LoRA of rank {RANK} on all linear layers, {BATCH} records of {TOKENS} tokens a step'
    # Fetches torch.
    always = False

    def __init__(self, steps, python):
        self.steps, self.given = WARMING + steps, python
        # Megabytes of our servers before their jobs.
        self.idle = []

    def prepare(self):
        llama.fetch_base()
        self.python = reference.interpreter(self.given)
        if not (FOLDER / 'start').exists():
            reference.peft_train(self.python, 'prepare', MODELS['Q4_1'], FOLDER, RANK, ALPHA)
        self.records, self.learnt = put_into_server()

    def measure(self, rounds):
        """Every run is a process of its own, for each side in turn; gives the tables and what is found in them."""
        runs = {
            OURS: self.ours,
            THEIRS: self.theirs,
            CHECKPOINTED: lambda: self.theirs('--gradient-checkpointing'),
        }
        speeds, peaks, losses = ({side: [] for side in runs} for _ in range(3))
        for number in range(1, rounds + 1):
            for side, run in runs.items():
                steps, peak = run()
                speeds[side].append(statistics.median(step['tokens_per_second'] for step in steps[WARMING:]))
                peaks[side].append(peak / 1e6)
                losses[side] = [step['loss'] for step in steps[:SHOWN]]
                print(f'  round {number}  {side}: {speeds[side][-1]:.1f} tokens/s, {peaks[side][-1]:.0f} MB at its peak', flush=True)
        memory = peaks | {f'{OURS}, before the job': self.idle}
        return [('trained tokens/s', speeds), ('MB resident at the peak', memory)], self.found(speeds, peaks, losses)

    def ours(self):
        """A server for one job: the steps, and the most memory until its version had passed the gate."""
        with tenora.Server(MODELS['Q4_1'], DATA, limits={}) as server:
            self.idle.append(server.peak_bytes() / 1e6)
            events = server.client(
                'train', 'records', '--adapter', 'trained', '--from', 'start', '--publish', 'version-only', '--max-steps', self.steps,
                '--batch-size', BATCH, '--sequential', '--max-length', TOKENS, '--too-long', 'truncate',
                '--learning-rate', LEARNING_RATE, '--schedule', 'constant', '--warmup-steps', 0)
            return [event['step'] for event in events if 'step' in event], server.peak_bytes()

    def theirs(self, *options):
        report = reference.peft_train(
            self.python, 'train', FOLDER, self.records, self.steps, BATCH, LEARNING_RATE, THREADS, *options)
        return report['steps'], report['peak_bytes']

    def found(self, speeds, peaks, losses):
        found = []
        for side in THEIRS, CHECKPOINTED:
            faster, larger = (statistics.median(of[OURS]) / statistics.median(of[side]) for of in (speeds, peaks))
            found.append(f'{OURS} / {side}: **{faster:.2f}** of its tokens a second, **{larger:.2f}** of its peak memory')
        for side, of_side in losses.items():
            found.append(f'loss of the first steps, {side}: {", ".join(f"{loss:.4f}" for loss in of_side)}')
        found.append(f'each record: {TOKENS} tokens, {self.learnt} of them in the loss, the same ids on both sides')
        return found


def put_into_server():
    """Uploads the records, and the reference's adapter before its first step, into a fresh data folder. Gives the file of the records as the
    model sees them, which the reference takes, and how many tokens of each are in the loss."""
    shutil.rmtree(CACHE / DATA, ignore_errors=True)
    chats = FOLDER / 'records.jsonl'
    chats.write_text(''.join(f'{json.dumps(chat)}\n' for chat in conversations()))
    with tenora.Server(MODELS['Q4_1'], DATA, limits={}) as server:
        server.client('datasets', 'upload', 'records', chats)
        inspected, = server.client('datasets', 'inspect', 'records', '--show', RECORDS)
        server.client('adapters', 'import', 'start', FOLDER / 'start')
    records = [as_seen(record['spans']) for record in inspected['rendered']]
    path = FOLDER / 'records.json'
    path.write_text(json.dumps(records))
    learnt, = {sum(record['in_loss']) for record in records}
    return path, learnt


def conversations():
    """Answers to nobody, which are cut to their length: all but the template's few tokens are in the loss."""
    words = random.Random(0)
    for _ in range(RECORDS):
        answer = ' '.join(words.choices(WORDS, k=TOKENS))
        yield {'messages': [{'role': 'system', 'content': ''}, {'role': 'assistant', 'content': answer}]}


def as_seen(spans):
    """A record's ids and which of them are in the loss, cut as the job cuts them."""
    ids = [number for span in spans for number in span['token_ids']]
    in_loss = [span['in_loss'] for span in spans for _ in span['token_ids']]
    return {'ids': ids[:TOKENS], 'in_loss': in_loss[:TOKENS]}
