"""A day in an hour, for `benchmarks/serving.py --minutes 60`: what mixed load with faults does to the memory of `serve.py`.

The server is a process of its own, started as a user starts it. Clients ask what `requests_of` has, whole and streamed, in the
chat's and the Responses' form, and requests that nobody has sent before; they hang up, and commit the faults of
`serving_faults`. Answers are compared with those that the same server gave to the same requests one at a time.

Memory is what the process itself has allocated (`RssAnon`): pages of files, such as mapped weights, belong to the machine's cache,
which gives and takes them as others need it. The memory at a minute is the median of that minute's samples.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import serving_faults
from benchmarks.measure import ROOT

FLAGS = ["--dtype", "float32", "--header_timeout", "5", "--body_timeout", "5", "--served_model_name", "served"]
WARM_UP = 1500  # requests and faults before the clock starts: a program that is compiled later takes 1 to 12 MB
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_STARTED = re.compile(r"at http://([^:]+):(\d+)")


class Process:
    """`serve.py` in a process of its own, ready for requests.

    Args:
      checkpoint: what it serves.
      flags: more of its flags.
    """

    def __init__(self, checkpoint: str, *flags: str):
        self.process = subprocess.Popen([sys.executable, "serve.py", "--checkpoint", checkpoint, "--port", "0", *FLAGS, *flags], cwd=ROOT,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
        found = next(filter(None, map(_STARTED.search, self.process.stdout)), None)
        if found is None:
            raise SystemExit(f"serve.py did not start: exit status {self.process.wait()}")
        self.address = (found[1], int(found[2]))
        while (status := serving_faults.ask(self.address, HEALTH)[0]) != 200:
            if self.process.poll() is not None:
                raise SystemExit(f"serve.py ended: exit status {self.process.returncode}")
            if status not in (0, 503):  # no answer, or loading
                self.process.kill()
                raise SystemExit(f"serve.py answers /health with status {status}; 503 and then 200 were expected")
            time.sleep(0.2)

    def state(self) -> dict[str, int]:
        """Returns bytes of its own and of files, threads and open files."""
        folder = Path("/proc") / str(self.process.pid)
        found = dict(re.findall(r"(\w+):\s+(\d+)", (folder / "status").read_text(encoding="utf-8")))
        return {"anonymous_bytes": 1024 * int(found["RssAnon"]), "file_bytes": 1024 * int(found["RssFile"]), "threads": int(found["Threads"]),
                "open_files": sum(1 for _ in (folder / "fd").iterdir())}

    def stop(self) -> int:
        """Stops it as an operator does; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


class Day:
    """Clients with a plan: who asks what is drawn from a seed.

    Args:
      address: the server's.
      bodies: the requests whose answers are known.
      wanted: their answers.
      rate: requests and faults a second, of all clients together.
      clients: how many there are.
    """

    def __init__(self, address, bodies: list[dict], wanted: list[str], rate: float, clients: int):
        self.address, self.bodies, self.wanted, self.pause, self.clients = address, bodies, wanted, clients / rate, clients
        self.is_over, self.counts, self.problems = threading.Event(), Counter(), []

    def run(self) -> list[threading.Thread]:
        """Starts the clients."""
        threads = [threading.Thread(target=self._client, args=(seed,), daemon=True) for seed in range(self.clients)]
        for thread in threads:
            thread.start()
        return threads

    def warm_up(self, number: int) -> None:
        """Sends so many requests and faults without a pause, so that programs of all shapes are compiled."""
        with ThreadPoolExecutor(self.clients) as pool:
            list(pool.map(self._act, map(np.random.default_rng, range(1000, 1000 + number))))

    def _client(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self.is_over.wait(rng.exponential(self.pause)):
            self._act(rng)

    def _act(self, rng) -> None:
        kinds = [self._whole, self._streamed, self._responses, self._new, self._gone, self._gone_early, self._fault]
        kind = kinds[rng.choice(len(kinds), p=[0.35, 0.2, 0.05, 0.1, 0.08, 0.07, 0.15])]
        try:
            name = kind(rng)
        except Exception as error:
            name = "failed"
            self.problems.append(f"{type(error).__name__}: {error}")
        self.counts[name] += 1

    def _drawn(self, rng) -> tuple[dict, str]:
        n = int(rng.integers(len(self.bodies)))
        return self.bodies[n], self.wanted[n]

    def _same(self, found: str, wanted: str, name: str) -> str:
        if found != wanted:
            self.problems.append(f"{name}: {found!r}, not {wanted!r}")
            return "wrong"
        return name

    def _whole(self, rng) -> str:
        body, wanted = self._drawn(rng)
        status, reply = serving_faults.ask_json(self.address, body)
        return self._same(reply["choices"][0]["message"]["content"] if status == 200 else str(reply), wanted, "whole")

    def _streamed(self, rng) -> str:
        body, wanted = self._drawn(rng)
        _, out = serving_faults.ask(self.address, serving_faults.post(json.dumps({**body, "stream": True}).encode()))
        events = [json.loads(line) for line in re.findall(r"^data: (\{.*)$", out.decode().replace("\r", ""), re.MULTILINE)]
        return self._same("".join(c["delta"].get("content") or "" for each in events for c in each["choices"]), wanted, "streamed")

    def _responses(self, rng) -> str:
        n = int(rng.integers(0, len(self.bodies), ()) // 5 * 5)  # those without an image
        body, wanted = self.bodies[n], self.wanted[n]
        text = body["messages"][0]["content"][0]["text"]
        status, reply = serving_faults.ask_json(self.address, {"input": text, "max_output_tokens": body["max_tokens"],
                                                               "temperature": body["temperature"], "seed": body["seed"]}, "/v1/responses")
        return self._same(reply["output"][0]["content"][0]["text"] if status == 200 else str(reply), wanted, "responses")

    def _new(self, rng) -> str:
        content = [{"type": "image_url", "image_url": {"url": serving_faults.picture(int(rng.integers(1 << 40)))}}, {"type": "text", "text": f"What is {rng.integers(1 << 40)}?"}]
        status, reply = serving_faults.ask_json(self.address, {"messages": [{"role": "user", "content": content}], "max_tokens": 12})
        return "new" if status == 200 and reply["usage"]["completion_tokens"] else self._same(str(reply), "an answer", "new")

    def _gone(self, rng) -> str:
        return "hung up in a stream" if serving_faults.leave(self.address, self._drawn(rng)[0], 3) == 200 else self._same("a refusal", "a stream", "gone")

    def _gone_early(self, rng) -> str:
        serving_faults.leave(self.address, self._drawn(rng)[0], 0)
        return "hung up before the answer"

    def _fault(self, rng) -> str:
        name = rng.choice(list(serving_faults.FAULTS))
        if serving_faults.commit(self.address, name):
            self.problems.append(f"{name} was not answered as it must be")
            return "wrong"
        return "faults"


def day(checkpoint: str, bodies: list[dict], minutes: float, rate: float, clients: int = 8) -> dict:
    """Serves for so many minutes; returns counts, and the memory of each minute.

    Raises:
      SystemExit: the server does not start.
    """
    server = Process(checkpoint)
    try:
        wanted = []
        for body in bodies:
            status, reply = serving_faults.ask_json(server.address, body)
            if status != 200:
                raise SystemExit(f"{body} got {status}: {reply}")
            wanted.append(reply["choices"][0]["message"]["content"])
        load = Day(server.address, bodies, wanted, rate, clients)
        load.warm_up(WARM_UP)
        threads, begun, samples = load.run(), time.monotonic(), []
        while time.monotonic() - begun < 60 * minutes and server.process.poll() is None:
            samples.append((int((time.monotonic() - begun) / 60) + 1, server.state()))
            if len(samples) % 60 == 0:
                print(f"minute {samples[-1][0]}: {samples[-1][1]}, {dict(load.counts)}, {load.problems[:3]}", file=sys.stderr, flush=True)
            time.sleep(1)
        load.is_over.set()
        for thread in threads:
            thread.join(120)
    finally:
        status = None
        with contextlib.suppress(ProcessLookupError):
            status = server.stop()
    table = {minute: {key: statistics.median(state[key] for m, state in samples if m == minute) for key in samples[0][1]}
             for minute in sorted({minute for minute, _ in samples})}
    early, late = table[min(5, max(table))], table[max(table)]
    return {"minutes": minutes, "requests_a_second": rate, "distinct": len(set(wanted)), **load.counts,
            "problems": len(load.problems), "first_problems": load.problems[:5], "exit_status": status,
            "memory_at_minute_5": early, "memory_at_the_end": late,
            "growth": round(late["anonymous_bytes"] / early["anonymous_bytes"] - 1, 4),
            "anonymous_mib_by_minute": [round(each["anonymous_bytes"] / 2**20, 1) for each in table.values()]}
