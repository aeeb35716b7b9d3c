"""Compares Tenora with llama.cpp and peft on this machine and writes benches/RESULTS.md. See benches/compare.md.

usage: python3 scripts/compare [--base FILE] [--only LINE] [--rounds N] [--steps N] [--python PATH]
"""

import argparse
import pathlib
import shlex
import sys

# What all scripts share.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import bases
import report
import tenora
from lines import LINES
from training import Training
from tuners import Tuners


def main():
    parser = argparse.ArgumentParser(prog='scripts/compare', description=__doc__.splitlines()[0])
    parser.add_argument('--base', type=pathlib.Path, action='append', metavar='FILE',
                        help='compare on this GGUF file in place of the default base; may be repeated')
    parser.add_argument('--only', action='append', metavar='LINE', help='measure this line alone; may be repeated')
    parser.add_argument('--rounds', type=int, default=5, help='measurements of each side, in turn (default 5)')
    parser.add_argument('--steps', type=int, default=6, help='training: optimizer steps that count, behind two that do not (default 6)')
    parser.add_argument('--python', metavar='PATH', help='training: an interpreter that has torch, transformers, peft and gguf '
                        '(default: one with an environment that the script makes)')
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 1:
        parser.error('--rounds and --steps are at least 1')
    if not tenora.BINARY.exists():
        raise SystemExit(f'{tenora.BINARY} is missing: cargo build --release, or say where it is with TENORA')
    if not arguments.base:
        measure_all(LINES | {'training': Training(arguments.steps, arguments.python), 'tuners': Tuners()}, arguments)
    for path in arguments.base or []:
        measure_all(bases.lines(bases.Base(path)), arguments)


def measure_all(lines, arguments):
    """Measures the lines that are asked for, of those that there are."""
    if unknown := set(arguments.only or lines) - set(lines):
        raise SystemExit(f'{", ".join(unknown)}: no line is called so; there are {", ".join(lines)}')
    for name in arguments.only or [name for name, line in lines.items() if line.always]:
        measure(lines[name], arguments.rounds)


def measure(line, rounds):
    line.prepare()
    print(line.title, flush=True)
    tables, found = line.measure(rounds)
    for words in found:
        print(f'  {words}')
    # Without the folders of this machine.
    words = [pathlib.Path(word).name if pathlib.Path(word).is_file() else word for word in sys.argv[1:]]
    command = f'python3 scripts/compare {shlex.join(words)}'.strip()
    report.write(line.title, report.section(line.title, tables, found, command))


main()
