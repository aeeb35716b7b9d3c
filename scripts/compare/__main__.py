"""Compares Tenora with llama.cpp on this machine and writes benches/RESULTS.md. See benches/compare.md.

usage: python3 scripts/compare [--only LINE] [--rounds N]
"""

import argparse
import shlex
import statistics
import sys

import llama
import report
import tenora
from lines import LINES


def main():
    parser = argparse.ArgumentParser(prog='scripts/compare', description=__doc__.splitlines()[0])
    parser.add_argument('--only', action='append', choices=LINES, metavar='LINE', help=f'one of {", ".join(LINES)}; may be repeated')
    parser.add_argument('--rounds', type=int, default=5, help='measurements of each side, in turn (default 5)')
    arguments = parser.parse_args()
    if not tenora.BINARY.exists():
        raise SystemExit(f'{tenora.BINARY} is missing: cargo build --release, or say where it is with TENORA')
    llama.prepare()
    for name in arguments.only or LINES:
        measure(name, arguments.rounds)


def measure(name, rounds):
    line = LINES[name]
    print(f'{name}: {line.title}', flush=True)
    with line.sides() as sides:
        values = {side: [] for side in sides}
        # The first round warms up and does not count.
        for number in range(rounds + 1):
            for side, once in sides.items():
                value = once()
                print(f'  round {number}  {side}: {value:.1f} {line.unit}', flush=True)
                if number > 0:
                    values[side].append(value)
    command = f'python3 scripts/compare {shlex.join(sys.argv[1:])}'.strip()
    kept = report.keep(name, line, values, command)
    for side, of in values.items():
        print(f'  median  {side}: {statistics.median(of):.1f} {line.unit}')
    for found in kept[name]['asked']:
        print(f'  {found}')
    report.write(kept, LINES)


main()
