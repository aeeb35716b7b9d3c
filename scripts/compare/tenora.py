"""Tenora: the server, and `tenora bench` against it."""

import json
import os
import pathlib
import random
import subprocess
import time

from places import CACHE, REPOSITORY, Process, THREADS, run

BINARY = pathlib.Path(os.environ.get('TENORA', REPOSITORY / 'target' / 'release' / 'tenora'))
TENANT = 'bench'

# What switches our prefix cache off; a server that does not know a limit is started without it.
NO_PREFIX_CACHE = {'prefix_cache_percent': 0}


def known_limits(limits):
    listed = {line.split()[0] for line in run(BINARY, 'serve', '--list-limits').splitlines() if line.strip()}
    return {name: value for name, value in limits.items() if name in listed}


def inspect(base):
    """What a base is."""
    return json.loads(run(BINARY, 'models', 'inspect', '--json', base))


class Server(Process):
    """`data`: a folder below the cache, kept between runs with the adapters in it."""

    def __init__(self, base, data='data', limits=NO_PREFIX_CACHE, options=()):
        self.data = CACHE / data
        limits = [f'--limit={name}={value}' for name, value in known_limits(limits).items()]
        super().__init__(f'tenora-{data}', [
            BINARY, 'serve', '--listen', '127.0.0.1:0', '--insecure-no-auth', '--data-dir', self.data,
            '--base', base, '--threads', THREADS, *limits, *options])

    def wait_until_ready(self):
        while not (lines := [line for line in self.log.read_text().splitlines() if line.startswith('listening on ')]):
            self.check_alive()
            time.sleep(0.05)
        self.url = lines[0].removeprefix('listening on ')
        tenants = run(BINARY, 'tenants', '--server', self.url, 'list', '--json')
        if f'"tenants/{TENANT}"' not in tenants:
            run(BINARY, 'tenants', '--server', self.url, 'create', TENANT)

    def bench_command(self, *options, seed=None):
        seed = random.randrange(1 << 31) if seed is None else seed
        return [str(word) for word in (
            BINARY, 'bench', '--json', '--server', self.url, '--tenant', TENANT, '--seed', seed, *options)]

    def bench(self, *options, seed=None):
        """What `tenora bench` reports: all of it, as it prints it with --json. Without a seed every call sends prompts of its own."""
        report = json.loads(run(*self.bench_command(*options, seed=seed)))
        if report['errors']:
            raise SystemExit(f'requests have failed: {report["errors"]}')
        return report

    def start_bench(self, *options):
        """The same in the background; `result` waits for it."""
        return subprocess.Popen(self.bench_command(*options), stdout=subprocess.PIPE, text=True)

    def generated_per_second(self, *options):
        return self.bench(*options)['median']['generated_per_second']

    def client(self, *words):
        """What a client command prints with --json: an object a line."""
        return [json.loads(line) for line in run(BINARY, *words, '--json', '--server', self.url, '--tenant', TENANT).splitlines()]

    def export(self, adapter, folder):
        """An adapter as a PEFT folder."""
        if not folder.exists():
            self.client('adapters', 'export', adapter, folder)

    def resident_bytes(self):
        return self.memory('VmRSS')

    def peak_bytes(self):
        """The most that was resident since the server started."""
        return self.memory('VmHWM')

    def memory(self, field):
        status = pathlib.Path(f'/proc/{self.process.pid}/status').read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(field))

    def drop_from_page_cache(self):
        """So that the next read of an adapter comes from the disk."""
        for path in (self.data / 'blobs').rglob('*'):
            if path.is_file():
                with open(path, 'rb') as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def result(background):
    printed, _ = background.communicate()
    if background.returncode != 0:
        raise SystemExit('a load in the background has failed')
    return json.loads(printed)
