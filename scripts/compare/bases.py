"""What is compared on any other base (`--base`): both sides take the same file as it is."""

import contextlib
import functools

import llama
import tenora
from line import ALL_LINEAR, STREAMS, Line, Ratio, gguf_adapters, llama_load, load, warmed

OURS, THEIRS = 'tenora', 'llama-server'
DEPTHS = 128, 2048, 8192
# Tokens behind a long prompt; twice as many have room, or the prompt is shorter.
DECODED = 64


def servers(base, slots, **options):
    """Both, started on a base."""
    return tenora.Server(base.path, base.data, **options), llama.Server(base.path, slots)


@contextlib.contextmanager
def prefill(base):
    def ours(server):
        report = server.bench('--prompt-tokens', 512, '--max-tokens', 1, '--requests', 3)
        return 512 / report['median']['first_token_ms']['p50'] * 1e3

    ours_server, theirs_server = servers(base, 1)
    with ours_server, theirs_server:
        yield {
            OURS: lambda: ours(ours_server),
            'llama-bench': lambda: llama.bench_prefill(base.path, 512),
            THEIRS: lambda: theirs_server.ask(llama.fresh_ids(512), 1)['timings']['prompt_per_second'],
        }


@contextlib.contextmanager
def single(base):
    ours, theirs = servers(base, 1)
    with ours, theirs:
        yield {
            OURS: lambda: ours.generated_per_second('--prompt-tokens', 128, '--max-tokens', 128),
            THEIRS: lambda: theirs.generated_per_second([llama.fresh_ids(128)], 128),
        }


@contextlib.contextmanager
def batch(base):
    ours, theirs = servers(base, STREAMS)
    with ours, theirs:
        yield {OURS: lambda: ours.generated_per_second(*load()), THEIRS: lambda: llama_load(theirs)}


@contextlib.contextmanager
def distinct(base):
    own = list(range(STREAMS))
    with tenora.Server(base.path, base.data) as ours:
        ours.bench('--streams', STREAMS, '--adapters', 'distinct', *ALL_LINEAR, '--max-tokens', 1)
        with llama.Server(base.path, STREAMS, gguf_adapters(ours, base.inspected, 'bench-r16-all')) as theirs:
            yield {
                OURS: warmed(lambda: ours.generated_per_second(*load('--adapters', 'distinct', *ALL_LINEAR))),
                THEIRS: warmed(lambda: llama_load(theirs, own)),
            }


@contextlib.contextmanager
def depth(base):
    """Decoding behind prompts of several lengths. Both keep what a prompt has in common with the one before, which is all but its end."""
    context = max(base.depths) + 2 * DECODED
    prompts = {depth: llama.fresh_ids(depth) for depth in base.depths}

    def ours(server, depth):
        options = '--prompt-tokens', depth, '--shared-prefix', depth - 8, '--max-tokens', DECODED, '--requests', 2
        return 1e3 / server.bench(*options, seed=depth)['median']['between_tokens_ms']['p50']

    def theirs(server, depth):
        prompt = prompts[depth][:-8] + llama.fresh_ids(8)
        return server.ask(prompt, DECODED, cached=True)['timings']['predicted_per_second']

    with tenora.Server(base.path, base.data, limits={}, options=('--context', context)) as mine:
        sides = {f'{OURS}, depth {depth}': functools.partial(ours, mine, depth) for depth in base.depths}
        with llama.Server(base.path, 1, context=context) as other:
            yield sides | {f'{THEIRS}, depth {depth}': functools.partial(theirs, other, depth) for depth in base.depths}


def lines(base):
    """The lines of a base, with what is asked of them."""
    inspected = base.inspected
    # At a constant bandwidth decoding slows as keys and values come to weigh as much as the weights, and more.
    heavy = inspected['kv_bytes_per_token'] * max(base.depths) > inspected['weights_bytes']
    deepest, first = f'{OURS}, depth {max(base.depths)}', f'{OURS}, depth {min(base.depths)}'

    def line(title, unit, sides, ratios):
        return Line(f'{base.name}: {title}', unit, functools.partial(sides, base), ratios)

    generated = 'generated tokens/s'
    return {
        'prefill': line('prefill of 512 tokens', 'prompt tokens/s', prefill, [Ratio(OURS, 'llama-bench', least=1.5)]),
        'single': line('one stream, 128 tokens in, 128 out', generated, single, [Ratio(OURS, THEIRS, least=1.2)]),
        'batch': line('16 streams, no adapter', generated, batch, [Ratio(OURS, THEIRS, least=1.6)]),
        'distinct': line('16 streams on 16 adapters of rank 16 on all layers', generated, distinct, [Ratio(OURS, THEIRS, least=4.0)]),
        'depth': line('decoding behind long prompts', generated, depth, [Ratio(deepest, first, least=0.28 if heavy else 0.65)]),
    }


class Base:
    """A base by its file."""

    def __init__(self, path):
        self.path = path.resolve()
        self.name = self.path.stem
        self.data = f'data-{self.name}'
        self.inspected = tenora.inspect(self.path)
        self.depths = [min(depth, self.inspected['longest_context'] - 2 * DECODED) for depth in DEPTHS]
