"""benches/RESULTS.md: a section for each line between two marks; a line that is measured again replaces its own."""

import platform
import statistics
import time

from places import REPOSITORY, THREADS, run

RESULTS = REPOSITORY / 'benches' / 'RESULTS.md'
BEGIN, END = '<!-- compare: begin -->', '<!-- compare: end -->'


def machine():
    """What the figures depend on."""
    info = {}
    for line in open('/proc/cpuinfo'):
        key, _, value = line.partition(':')
        info.setdefault(key.strip(), value.strip())
    flags = info.get('flags', '').split()
    vector = [flag for flag in ('avx2', 'avx512f', 'avx512_vnni', 'avx_vnni', 'amx_int8') if flag in flags]
    cores = run('nproc').strip()
    return f'{info.get("model name", platform.machine())}, {cores} cores, {" ".join(vector) or "no AVX2"}, {THREADS} threads each side'


def asked(line, medians):
    """Each thing that is asked, and what came out."""
    found = []
    for ratio in line.ratios:
        value = medians[ratio.of] / medians[ratio.by]
        if ratio.least is not None:
            bound, met = f'at least {ratio.least:g}', value >= ratio.least
        else:
            bound, met = f'at most {ratio.most:g}', value <= ratio.most
        found.append(f'{ratio.of} / {ratio.by}: **{value:.2f}** ({bound} asked: {"met" if met else "NOT met"})')
    for of, minus, most in line.differences:
        value = medians[of] - medians[minus]
        found.append(f'{of} less {minus}: **{value:.1f}** (at most {most:g} asked: {"met" if value <= most else "NOT met"})')
    return found


def table(unit, values):
    """What was measured of each side, in one unit."""
    text = f'| {unit} | median | least | most | rounds |\n|---|---|---|---|---|\n'
    for side, of_side in values.items():
        median, least, most = (f'{of(of_side):.1f}' for of in (statistics.median, min, max))
        text += f'| {side} | {median} | {least} | {most} | {len(of_side)} |\n'
    return text


def grid(columns):
    """The medians of what was measured of each side, a column for each unit."""
    sides = list(next(iter(columns.values())))
    text = f'| | {" | ".join(columns)} |\n|---|{"---|" * len(columns)}\n'
    for side in sides:
        # Four digits say enough, whatever the unit.
        words = (f'{statistics.median(of[side]):.4g}' if side in of else '' for of in columns.values())
        text += f'| {side} | {" | ".join(words)} |\n'
    return text


def section(title, tables, found, command):
    """The tables of a line, each written already or a unit with its values, and where, when and how it was measured."""
    written = (of if isinstance(of, str) else table(*of) for of in tables)
    text = f'### {title}\n\n' + '\n'.join(written)
    text += '\n' + ''.join(f'- {words}\n' for words in found)
    dirty = ' with changes' if run('git', 'status', '--porcelain', '--', 'src', 'crates', 'Cargo.toml', cwd=REPOSITORY).strip() else ''
    commit = run('git', 'rev-parse', '--short=12', 'HEAD', cwd=REPOSITORY).strip() + dirty
    return text + f'\n{machine()}; {time.strftime("%Y-%m-%d")}, commit {commit}, `{command}`\n'


def write(title, section):
    """Puts a section in the place of the one with its title, or behind all others."""
    text = RESULTS.read_text()
    before, _, rest = text.partition(BEGIN)
    body, _, after = rest.partition(END)
    sections = {part.partition('\n')[0]: f'### {part.rstrip()}\n' for part in body.split('### ')[1:]}
    sections[title] = section
    RESULTS.write_text(f'{before}{BEGIN}\n\n{chr(10).join(sections.values())}\n{END}{after}')
