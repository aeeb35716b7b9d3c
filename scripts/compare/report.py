"""benches/RESULTS.md: the part between two marks, made anew from the results kept in the cache."""

import json
import platform
import statistics
import time

from places import CACHE, REPOSITORY, THREADS, run

RESULTS = REPOSITORY / 'benches' / 'RESULTS.md'
KEPT = CACHE / 'results.json'
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


def keep(name, line, values, command):
    """Adds a line's figures to those of earlier runs."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    dirty = ' with changes' if run('git', 'status', '--porcelain', '--', 'src', 'Cargo.toml', cwd=REPOSITORY).strip() else ''
    kept[name] = {
        'title': line.title, 'unit': line.unit, 'values': values, 'machine': machine(), 'date': time.strftime('%Y-%m-%d'),
        'commit': run('git', 'rev-parse', '--short=12', 'HEAD', cwd=REPOSITORY).strip() + dirty, 'command': command,
        'asked': asked(line, {side: statistics.median(of) for side, of in values.items()}),
    }
    KEPT.write_text(json.dumps(kept, indent=1))
    return kept


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


def section(kept):
    text = f'### {kept["title"]}\n\n| {kept["unit"]} | median | least | most | rounds |\n|---|---|---|---|---|\n'
    for side, values in kept['values'].items():
        median, least, most = (f'{of(values):.1f}' for of in (statistics.median, min, max))
        text += f'| {side} | {median} | {least} | {most} | {len(values)} |\n'
    text += '\n' + ''.join(f'- {line}\n' for line in kept['asked'])
    return text + f'\n{kept["machine"]}; {kept["date"]}, commit {kept["commit"]}, `{kept["command"]}`\n'


def write(kept, order):
    """Replaces what lies between the marks."""
    body = '\n'.join(section(kept[name]) for name in order if name in kept)
    text = RESULTS.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    RESULTS.write_text(f'{before}{BEGIN}\n\n{body}\n{END}{after}')
