"""Where things lie, and how commands are run."""

import os
import pathlib
import socket
import subprocess

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CACHE = pathlib.Path(os.environ.get('TENORA_COMPARE_DIR', pathlib.Path.home() / '.cache' / 'tenora-compare'))
THREADS = 2


def run(*command, **options):
    """Runs a command and gives what it prints; one that fails ends the comparison with its last words."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        last = '\n'.join((done.stdout + done.stderr).splitlines()[-20:])
        raise SystemExit(f'{" ".join(command)} failed:\n{last}')
    return done.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class Process:
    """A server for as long as a `with` block lasts. Its output goes to a log in the cache."""

    def __init__(self, name, command):
        self.log = CACHE / f'{name}.log'
        self.command = [str(word) for word in command]

    def __enter__(self):
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def check_alive(self):
        if self.process.poll() is not None:
            last = '\n'.join(self.log.read_text().splitlines()[-20:])
            raise SystemExit(f'{self.command[0]} ended:\n{last}')
