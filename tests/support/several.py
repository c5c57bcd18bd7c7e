"""Several processes for tests: two real ones, and a store that threads share in place of jax's."""

import json
import os
import socket
import subprocess
import sys
import threading

from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed
from tests.support.training_runs import ROOT


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two(module, *arguments, only_first=(), only_second=(), folders=(ROOT, ROOT), **environment):
    """Both processes of a run, started.

    Args:
      only_first, only_second: flags of one of them.
      folders: the working directory of each.
    """
    address = f"127.0.0.1:{free_port()}"
    several = lambda k: ["--coordinator", address, "--num_processes", "2", "--process_id", str(k)]
    here = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}  # of which jax would warn on stderr
    return [subprocess.Popen([sys.executable, "-m", module, *arguments, *(only_second if k else only_first), *several(k)],
                             cwd=folders[k], env={**here, "PYTHONPATH": str(ROOT), **environment},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in range(2)]


def ends(running, timeout=600):
    """(exit status, stdout, stderr) of each. What has not ended by then is killed: nobody else would."""
    try:
        said = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *each) for process, each in zip(running, said, strict=True)]


class Store:
    """As jax's client of the coordination service, for threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set_bytes(self, key, value):
        assert len(value) <= 2**20
        with self.changed:
            if key in self.values:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_set(self, key, value):
        self.key_value_set_bytes(key, value.encode())

    def blocking_key_value_get_bytes(self, key, timeout_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_dir_get(self, prefix):
        with self.changed:
            return [(key, value.decode()) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_delete(self, prefix):
        with self.changed:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(prefix)}


class Threads:
    """In place of the module `distributed`: each thread is a process."""

    def __init__(self, count):
        store = Store()
        self.groups = [distributed.Group(store, k, count) for k in range(count)]
        self.here = threading.local()

    def process_index(self):
        return self.here.index

    def process_count(self):
        return len(self.groups)

    def gather(self, value):
        return self.groups[self.here.index].gather(value)

    def from_first(self, make):
        group = self.groups[self.here.index]
        return json.loads(group.broadcast(None if group.index else json.dumps(make()).encode()))

    def end_alike(self):
        self.groups[self.here.index].ends_alike = True

    def run(self, work):
        """What `work(index)` returns in each, or raises."""
        results = [None] * len(self.groups)

        def call(index):
            self.here.index = index
            try:
                results[index] = work(index)
            except UserError as error:
                results[index] = error

        threads = [threading.Thread(target=call, args=(k,)) for k in range(len(self.groups))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results
