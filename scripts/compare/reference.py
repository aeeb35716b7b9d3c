"""The reference, transformers and peft over torch on the CPU: an interpreter that has them, and peft_train.py run by it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

from places import CACHE, THREADS, run

ENVIRONMENT = CACHE / 'reference'
TOOL = CACHE / 'uv'
PACKAGES = 'torch==2.15.0', 'transformers==5.23.0', 'peft==0.21.2', 'gguf==0.19.0', 'sentencepiece==0.2.2'
IMPORTED = 'import torch, transformers, peft, gguf'

# What torch's package for Linux with CUDA asks for, gigabytes that a CPU never calls, and the small one that is called without a GPU too.
CUDA = 'cuda-bindings', 'cuda-toolkit', 'nvidia-cudnn-cu13', 'nvidia-cusparselt-cu13', 'nvidia-nccl-cu13', 'nvidia-nvshmem-cu13', 'triton'
CUDA_RUNTIME = 'nvidia-cuda-runtime==13.2.86'


def interpreter(given=None):
    """The interpreter that is told, or the one of an environment in the cache, made the first time (1.5 GB)."""
    if given:
        if not imports(given):
            raise SystemExit(f'{given} has not all of torch, transformers, peft and gguf')
        return given
    python = ENVIRONMENT / 'bin' / 'python'
    if not imports(python):
        make(python)
    return python


def imports(python):
    return bool(shutil.which(python)) and subprocess.run([python, '-c', IMPORTED], capture_output=True).returncode == 0


def make(python):
    """With torch's own build for the CPU; where its index cannot be reached, with the build for CUDA, which computes the same on the CPU."""
    print(f'making an environment with {", ".join(PACKAGES)} in {ENVIRONMENT}', flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    run(sys.executable, '-m', 'pip', 'install', '--quiet', '--upgrade', '--target', TOOL, 'uv')
    uv = TOOL / 'bin' / 'uv'
    run(uv, 'venv', '--python', sys.executable, ENVIRONMENT)
    install = [uv, 'pip', 'install', '--python', python, *PACKAGES]
    if subprocess.run([*install, '--torch-backend', 'cpu'], capture_output=True).returncode != 0:
        left_out = CACHE / 'without-cuda.txt'
        left_out.write_text(''.join(f"{package}; sys_platform == 'never'\n" for package in CUDA))
        run(*install, CUDA_RUNTIME, '--override', left_out)
        stand_in_for_cuda(next(ENVIRONMENT.glob('lib/python*/site-packages/torch/lib')))
    if not imports(python):
        raise SystemExit(f'torch cannot be imported in {ENVIRONMENT}; name an interpreter that has it with --python')


def stand_in_for_cuda(libraries):
    """Puts a library that only ends the process in the place of each of CUDA's that torch is linked to and that is not there."""
    asked = run('ldd', '-r', libraries / 'libtorch_python.so')
    names = set(re.findall(r'(\S+) => not found', asked))
    # Python's own symbols are in the interpreter.
    symbols = {symbol for symbol in re.findall(r'undefined symbol: (\w+)', asked) if not symbol.startswith(('Py', '_Py'))}
    source = libraries / 'stand_in.c'
    source.write_text('#include <stdlib.h>\n' + ''.join(f'void {symbol}(void) {{ abort(); }}\n' for symbol in sorted(symbols)))
    # Not warned of: some are also functions that the compiler knows.
    run('cc', '-shared', '-fPIC', '-w', '-o', libraries / 'libstand_in.so', source)
    for name in names:
        (libraries / name).symlink_to('libstand_in.so')


def peft_train(python, *words):
    """What peft_train.py prints: an object."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS))
    return json.loads(run(python, pathlib.Path(__file__).with_name('peft_train.py'), *words, env=environment))
