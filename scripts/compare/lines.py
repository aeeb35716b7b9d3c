"""What is compared on the default base: each line measures several sides in turn, round by round, and says which ratios are asked of them."""

import contextlib

import llama
import tenora
from line import ALL_LINEAR, NEW_TOKENS, QUERY_VALUE, STREAMS, WORDS, Line, Ratio, gguf_adapters, llama_load, load, warmed
from llama import MODELS

MANY = 1000

# Zipf's traffic finds about 32 of its adapters resident.
FEW_RESIDENT = {'adapter_cache_bytes': 64 << 20}


@contextlib.contextmanager
def prefill():
    def ours(server):
        report = server.bench('--prompt-tokens', 512, '--max-tokens', 1, '--requests', 3)
        return 512 / report['median']['first_token_ms']['p50'] * 1e3

    def theirs(server):
        return server.ask(llama.fresh_ids(512), 1)['timings']['prompt_per_second']

    with tenora.Server(MODELS['Q4_1']) as server, llama.Server(MODELS['Q4_1'], 1) as q4_1, llama.Server(MODELS['Q4_0'], 1) as q4_0:
        yield {
            'tenora': lambda: ours(server),
            'llama-bench Q4_1': lambda: llama.bench_prefill(MODELS['Q4_1'], 512),
            'llama-bench Q4_0': lambda: llama.bench_prefill(MODELS['Q4_0'], 512),
            'llama-server Q4_1': lambda: theirs(q4_1),
            'llama-server Q4_0': lambda: theirs(q4_0),
        }


@contextlib.contextmanager
def single():
    def theirs(server):
        return server.generated_per_second([llama.fresh_ids(128)], 128)

    with tenora.Server(MODELS['Q4_1']) as server, llama.Server(MODELS['Q4_1'], 1) as q4_1, llama.Server(MODELS['Q4_0'], 1) as q4_0:
        yield {
            'tenora': lambda: server.generated_per_second('--prompt-tokens', 128, '--max-tokens', 128),
            'llama-server Q4_1': lambda: theirs(q4_1),
            'llama-server Q4_0': lambda: theirs(q4_0),
        }


@contextlib.contextmanager
def batch():
    with tenora.Server(MODELS['Q4_1']) as server, llama.Server(MODELS['Q4_1'], STREAMS) as q4_1, llama.Server(MODELS['Q4_0'], STREAMS) as q4_0:
        yield {
            'tenora': lambda: server.generated_per_second(*load()),
            'llama-server Q4_1': lambda: llama_load(q4_1),
            'llama-server Q4_0': lambda: llama_load(q4_0),
        }


@contextlib.contextmanager
def distinct():
    own, base = list(range(STREAMS)), tenora.inspect(MODELS['Q4_1'])
    with tenora.Server(MODELS['Q4_1']) as server:
        for kind in ALL_LINEAR, QUERY_VALUE:
            server.bench('--streams', STREAMS, '--adapters', 'distinct', *kind, '--max-tokens', 1)
        wide = gguf_adapters(server, base, 'bench-r16-all')
        narrow = gguf_adapters(server, base, 'bench-r8-q-v')
        with llama.Server(MODELS['Q4_1'], STREAMS, wide) as r16, llama.Server(MODELS['Q4_1'], STREAMS, narrow) as r8:
            yield {
                'tenora, no adapter': warmed(lambda: server.generated_per_second(*load())),
                'tenora, 16 of rank 16 on all layers': warmed(lambda: server.generated_per_second(*load('--adapters', 'distinct', *ALL_LINEAR))),
                'tenora, 16 of rank 8 on q and v': warmed(lambda: server.generated_per_second(*load('--adapters', 'distinct', *QUERY_VALUE))),
                'llama-server Q4_1, 16 of rank 16 on all layers': warmed(lambda: llama_load(r16, own)),
                'llama-server Q4_1, 16 of rank 8 on q and v': warmed(lambda: llama_load(r8, own)),
                'llama-server Q4_1, base alone beside 16 loaded': warmed(lambda: llama_load(r16)),
            }


def register_many(server):
    """The first time takes long: every adapter passes the gate."""
    server.bench('--adapters', 'distinct', '--adapter-count', MANY, *QUERY_VALUE, '--max-tokens', 1)


@contextlib.contextmanager
def registered():
    with tenora.Server(MODELS['Q4_1']) as many, tenora.Server(MODELS['Q4_1'], 'data-empty') as none:
        register_many(many)
        yield {
            'no adapter registered': lambda: none.generated_per_second(*load()),
            f'{MANY} registered': lambda: many.generated_per_second(*load()),
        }


@contextlib.contextmanager
def zipf():
    with tenora.Server(MODELS['Q4_1'], limits=tenora.NO_PREFIX_CACHE | FEW_RESIDENT) as server:
        register_many(server)

        def of(count):
            spread = '--adapters', 'zipf', '--adapter-count', count, *QUERY_VALUE
            return server.generated_per_second(*load('--requests', 4 * STREAMS, *spread))

        yield {'5 adapters': lambda: of(5), f'{MANY} adapters': lambda: of(MANY)}


@contextlib.contextmanager
def attach():
    """Each round on a fresh server: 16 adapters one after the other that are on the disk only, then the same again, beside 4 busy streams."""
    measured = {}

    def round_of_both():
        with tenora.Server(MODELS['Q4_1']) as server:
            server.bench('--streams', STREAMS, '--adapters', 'distinct', *ALL_LINEAR, '--max-tokens', 1)
            prepared = server
        prepared.drop_from_page_cache()
        with tenora.Server(MODELS['Q4_1']) as server:
            for name in 'cold', 'warm':
                busy = server.start_bench('--streams', 4, '--duration', 20, '--prompt-tokens', 64, '--max-tokens', 256)
                one_by_one = '--adapters', 'distinct', '--adapter-count', STREAMS, '--requests', STREAMS, '--prompt-tokens', 16
                report = server.bench(*one_by_one, *ALL_LINEAR, '--max-tokens', 8)
                measured[name] = report['median']['first_token_ms']['p50']
                measured[f'{name}, others'] = tenora.result(busy)['median']['between_tokens_ms']['p99']

    def cold():
        round_of_both()
        return measured['cold']

    yield {
        'first token, cold (p50)': cold,
        'first token, warm (p50)': lambda: measured['warm'],
        'others between tokens, cold (p99)': lambda: measured['cold, others'],
        'others between tokens, warm (p99)': lambda: measured['warm, others'],
    }


@contextlib.contextmanager
def prefix():
    measured = []

    with tenora.Server(MODELS['Q4_1'], limits={}) as server:
        def first():
            options = '--rounds', 2, '--prompt-tokens', 420, '--shared-prefix', 400, '--max-tokens', 1
            measured[:] = [figures['first_token_ms']['p50'] for figures in server.bench(*options)['rounds']]
            return measured[0]

        yield {'first request': first, 'second request': lambda: measured[1]}


@contextlib.contextmanager
def memory():
    limits = 'kv_cache_bytes', 768 << 20
    with tenora.Server(MODELS['Q4_1'], 'data-empty', limits=dict([limits])) as server:
        server.bench(*load())
        yield {
            'resident, idle after a load': lambda: server.resident_bytes() / 1e6,
            '1.5 x the GGUF file and the KV pool': lambda: (1.5 * llama.MODELS['Q4_1'].stat().st_size + limits[1]) / 1e6,
        }


LINES = {
    'prefill': Line('Prefill of 512 tokens', 'prompt tokens/s', prefill, [
        Ratio('tenora', 'llama-bench Q4_1', least=3.5), Ratio('tenora', 'llama-bench Q4_0', least=1.5)]),
    'single': Line('One stream, 128 tokens in, 128 out', 'generated tokens/s', single, [
        Ratio('tenora', 'llama-server Q4_1', least=1.5), Ratio('tenora', 'llama-server Q4_0', least=1.2)]),
    'batch': Line('16 streams, no adapter', 'generated tokens/s', batch, [
        Ratio('tenora', 'llama-server Q4_1', least=3.0), Ratio('tenora', 'llama-server Q4_0', least=1.6)]),
    'distinct': Line('16 streams on 16 different adapters', 'generated tokens/s', distinct, [
        Ratio('tenora, 16 of rank 16 on all layers', 'llama-server Q4_1, 16 of rank 16 on all layers', least=4.5),
        Ratio('tenora, 16 of rank 16 on all layers', 'tenora, no adapter', least=0.75),
        Ratio('tenora, 16 of rank 8 on q and v', 'tenora, no adapter', least=0.92)]),
    'registered': Line(f'Base alone, {MANY} adapters registered', 'generated tokens/s', registered, [
        Ratio(f'{MANY} registered', 'no adapter registered', least=0.97)]),
    'zipf': Line(f'{MANY} adapters of rank 8 on q and v, Zipf', 'generated tokens/s', zipf, [
        Ratio(f'{MANY} adapters', '5 adapters', least=0.93)]),
    'attach': Line('Attaching cold adapters of rank 16 from the disk, beside 4 busy streams', 'ms', attach, [], [
        ('first token, cold (p50)', 'first token, warm (p50)', 30.0),
        ('others between tokens, cold (p99)', 'others between tokens, warm (p99)', 5.0)]),
    'prefix': Line('Second request with the same 400 first tokens of 420, time to first token', 'ms', prefix, [
        Ratio('second request', 'first request', most=0.2)]),
    'memory': Line('Resident memory of the server', 'MB', memory, [
        Ratio('resident, idle after a load', '1.5 x the GGUF file and the KV pool', most=1.0)]),
}
