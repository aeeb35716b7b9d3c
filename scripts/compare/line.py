"""What a line of the comparison is, and the loads that lines share."""

import dataclasses
import random
import statistics

import llama
import lora
import report

# The load of most lines: 16 prompts of 118 tokens, 64 new tokens each.
STREAMS = 16
WORDS = ' '.join(f'word{i} river stone' for i in range(25))
NEW_TOKENS = 64

ALL_LINEAR = '--rank', 16
QUERY_VALUE = '--rank', 8, '--targets', 'q_proj,v_proj'


@dataclasses.dataclass
class Ratio:
    """Asked of the medians of two sides: `of` divided by `by` is at least `least`, or at most `most`."""
    of: str
    by: str
    least: float = None
    most: float = None


@dataclasses.dataclass
class Line:
    title: str
    unit: str
    # A function that gives, inside a `with` block, what to call each side and how to measure it once.
    sides: callable
    ratios: list
    # Differences asked of two sides: (of, minus, at most).
    differences: list = dataclasses.field(default_factory=list)
    # Measured without being named.
    always = True

    def prepare(self):
        llama.prepare()

    def measure(self, rounds):
        """Measures every side in turn; gives the tables, each a unit and the values of its sides, and what is found in them."""
        with self.sides() as sides:
            values = {side: [] for side in sides}
            # The first round warms up and does not count.
            for number in range(rounds + 1):
                for side, once in sides.items():
                    value = once()
                    print(f'  round {number}  {side}: {value:.1f} {self.unit}', flush=True)
                    if number > 0:
                        values[side].append(value)
        medians = {side: statistics.median(of) for side, of in values.items()}
        for side, median in medians.items():
            print(f'  median  {side}: {median:.1f} {self.unit}')
        return [(self.unit, values)], report.asked(self, medians)


def load(*options):
    """Options of `tenora bench` for the load of most lines."""
    return '--streams', STREAMS, '--prompt', WORDS, '--max-tokens', NEW_TOKENS, *options


def llama_load(server, adapters=None):
    numbers = random.sample(range(1000, 10000), STREAMS)
    return server.generated_per_second([f'{number} {WORDS}' for number in numbers], NEW_TOKENS, adapters)


def warmed(measure):
    """Where a side waits for minutes until its turn comes again, the system has put its memory aside: a load before the one that counts."""
    def twice():
        measure()
        return measure()
    return twice


def gguf_adapters(server, base, prefix):
    """The same adapters for llama.cpp: exported from our server, converted. `base`: what `tenora.inspect` says of it."""
    paths = []
    for i in range(STREAMS):
        folder = server.data / 'peft' / f'{prefix}-{i}'
        path = folder.with_suffix('.gguf')
        if not path.exists():
            server.export(f'{prefix}-{i}', folder)
            lora.write_gguf(base, folder, path)
        paths.append(path)
    return paths
