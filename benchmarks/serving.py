"""The server under load: `python benchmarks/serving.py [--checkpoint PATH] [--clients 1,8,64] [--requests 2000] [--hang_ups 200]`.

One process loads the checkpoint in float32 and serves it over HTTP on loopback. First every distinct request is answered alone, by
`generate`. Then the clients send the requests over HTTP, each a mixture: text, an image, the same image, two turns, streams, long
answers, and clients that hang up after their third piece. A row of `benchmarks/results/serving.jsonl` has, for each number of
clients: requests and tokens a second, p50 and p95 of the time to the first token of streams, and how many answers were lost or
differ from the ones given alone (0 of each is what it must be; the exit status is 1 otherwise). Without `--checkpoint` the model is
a tiny one of random weights, whose answers differ from request to request.

`--hang_ups N` then opens N streams of 1,000 tokens one after the other and leaves each after its third piece: the row of results
has the most tokens that a row still generated, and the most seconds until it was free.

`--baseline transformers` serves the same requests, all greedy, by transformers behind the same routes too, one request at a time,
and adds the ratios (`serving_transformers.py`). `--baseline one_row` serves them with our engine and one row.

`--idle N` opens N connections that say nothing, and `--minutes N` is a day in N minutes: a mixture with faults, and the memory of
`serve.py` (`serving_faults.py`, `serving_day.py`). Either alone: with `--requests 0 --hang_ups 0`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import serving_day, serving_faults
from benchmarks.measure import ROOT, append_row, circumstances

WORDS = "what where which is are left right lung liver heart lesion normal seen abnormal shown image organ side scan bone".split()
OUT = ROOT / "benchmarks" / "results" / "serving.jsonl"
MOST_GROWTH = 0.03  # of memory, from minute 5 to the end


def requests_of(distinct: int, most: int, is_greedy: bool = False) -> list[dict]:
    """Distinct bodies: kinds in turn, greedy and sampled, or all greedy."""
    rng, out = np.random.default_rng(1), []
    pictures = [serving_faults.picture(i) for i in range(8)]
    for i in range(distinct):
        text = f"{' '.join(rng.choice(WORDS, 5))} {i}?"
        kind = i % 5
        image = {"type": "image_url", "image_url": {"url": pictures[0 if kind == 2 else i % 8]}}
        parts = [{"type": "text", "text": text}] if kind == 0 else [image, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts}]
        if kind == 3:
            messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        tokens = most if kind == 4 else int(rng.integers(4, max(5, most // 3)))
        out.append({"model": "served", "messages": messages, "max_tokens": tokens, "temperature": 0.0 if is_greedy else float(i % 2) * 0.7, "seed": i})
    return out


def answers_alone(model, bodies: list[dict]) -> list[str]:
    """What each request gives by itself: one request in the engine at a time."""
    def plain(messages):
        part = lambda p: p if p["type"] == "text" else {"type": "image_url", "image_url": p["image_url"]}
        return [{**m, "content": m["content"] if isinstance(m["content"], str) else list(map(part, m["content"]))} for m in messages]
    return [model.generate([plain(body["messages"])], max_new_tokens=body["max_tokens"], temperature=body["temperature"],
                           seed=body["seed"])[0].text for body in bodies]


class Load:
    """Sends requests and keeps what came back."""

    def __init__(self, url: str, bodies: list[dict], wanted: list[str]):
        import openai

        self.client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=3600)
        self.bodies, self.wanted = bodies, wanted
        self.first: list[float] = []
        self.tokens = self.lost = self.wrong = self.left = 0
        self.lock = threading.Lock()

    def ask(self, n: int) -> None:
        body, wanted = self.bodies[n % len(self.bodies)], self.wanted[n % len(self.bodies)]
        try:
            if n % 4 == 1:
                found, tokens = self.stream(body)
            elif n % 10 == 7:
                self.hang_up(body)
                return
            else:
                reply = self.client.chat.completions.create(**body)
                found, tokens = reply.choices[0].message.content, reply.usage.completion_tokens
        except Exception as error:
            print(f"request {n}: {type(error).__name__}: {error}", file=sys.stderr)
            with self.lock:
                self.lost += 1
            return
        with self.lock:
            self.tokens += tokens
            self.wrong += found != wanted

    def stream(self, body: dict) -> tuple[str, int]:
        begun, first, out, tokens = time.monotonic(), None, "", 0
        for chunk in self.client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - begun
                out += chunk.choices[0].delta.content
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        with self.lock:
            self.first += [first] if first is not None else []
        return out, tokens

    def hang_up(self, body: dict) -> None:
        with self.client.chat.completions.create(**{**body, "max_tokens": 1000}, stream=True) as stream:
            for _ in zip(range(3), stream):
                pass
        with self.lock:
            self.left += 1


def measured(url: str, bodies: list[dict], wanted: list[str], clients: int, number: int) -> dict:
    load, begun = Load(url, bodies, wanted), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(load.ask, range(number)))
    seconds = time.monotonic() - begun
    quantiles = statistics.quantiles(load.first, n=20) if len(load.first) > 1 else [0.0] * 19
    return {"clients": clients, "requests": number, "distinct": len(set(wanted)), "seconds": round(seconds, 2),
            "requests_per_second": round(number / seconds, 2), "tokens_per_second": round(load.tokens / seconds, 1),
            "first_token_p50_s": round(quantiles[9], 4), "first_token_p95_s": round(quantiles[18], 4), "hung_up": load.left,
            "lost": load.lost, "wrong": load.wrong}


def hang_ups(url: str, service, number: int) -> dict:
    """Opens long streams and leaves them; returns the most that a row did after its client had gone."""
    import openai

    client, scheduler = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=3600), service.scheduler
    most_tokens = most_seconds = 0
    for n in range(number):
        before = scheduler.tokens
        stream = client.chat.completions.create(model="served", messages=[{"role": "user", "content": f"Tell me {n}"}], max_tokens=1000,
                                                temperature=1.0, seed=n, stream=True)
        for _ in zip(range(3), stream):
            pass
        stream.close()
        begun = time.monotonic()
        while scheduler.rows:
            time.sleep(0.001)
        most_seconds = max(most_seconds, time.monotonic() - begun)
        most_tokens = max(most_tokens, scheduler.tokens - before)
    return {"hang_ups": number, "most_tokens_of_a_row": most_tokens, "steps_a_loop": scheduler.engine.steps,
            "most_seconds_until_free": round(most_seconds, 4)}


class Server:
    """A model of this process behind our routes, on a port of its own."""

    def __init__(self, model):
        from llavamed_jax.serving import app, server
        from llavamed_jax.serving.limits import Limits
        from llavamed_jax.serving.log import Log
        from llavamed_jax.serving.service import Service

        self.service = Service(["served"], Limits(max_queue=4096, max_requests=4096, timeout=3600), log=Log(file=io.StringIO()))
        self.service.serve(model)
        listener = server.listen("127.0.0.1", 0)
        self.url, self._stop = f"http://127.0.0.1:{listener.getsockname()[1]}/v1", threading.Event()
        self._thread = threading.Thread(target=server.run, args=(app.create(self.service), self.service, listener, self._stop.is_set), daemon=True)
        self._thread.start()
        time.sleep(1)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)


def tiny(out: Path) -> str:
    """Writes a model of random weights in transformers' layout, whose answers may be long; returns its path."""
    from benchmarks.exports import export_tiny

    export_tiny(out, "llava_mistral", "mistral", "v1.5:mistral_instruct", "pad", positions=2048)
    return str(out)


def under_load(args, checkpoint: str, add) -> None:
    """Measures the clients, and those of the baseline, and then those that hang up."""
    import llavamed_jax as lm
    from benchmarks import serving_transformers

    model = lm.load(checkpoint, dtype="float32")
    model.engine.batch_size = 1 if args.baseline == "one_row" else args.batch_size
    bodies = requests_of(args.distinct, args.most, is_greedy=args.baseline == "transformers")
    wanted = answers_alone(model, bodies)
    servers = {"ours": Server(model)}
    if args.baseline == "transformers":
        servers["transformers"] = Server(serving_transformers.served_by_transformers(checkpoint))
    numbers = list(map(int, args.clients.split(",")))
    for server in servers.values():  # compiles
        measured(server.url, bodies, wanted, max(numbers), min(args.requests, 10 * max(numbers)))
    for clients in numbers if args.requests else []:
        rows = {}
        for name, server in servers.items():
            rows[name] = {"server": name, **measured(server.url, bodies, wanted, clients, args.requests), "batch_size": model.engine.batch_size}
            add(rows[name])
        if len(rows) > 1:
            add({"server": "ours against transformers", "clients": clients} | {f"{key}_ratio": round(rows["ours"][key] / rows["transformers"][key], 3)
                 for key in ("requests_per_second", "tokens_per_second", "first_token_p50_s", "first_token_p95_s")})
    if args.hang_ups:
        add(hang_ups(servers["ours"].url, servers["ours"].service, args.hang_ups))
    for server in servers.values():
        server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="default: a tiny model of random weights")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=600)  # at least 500 answers differ
    parser.add_argument("--most", type=int, default=48, help="new tokens of a long answer")
    parser.add_argument("--hang_ups", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--baseline", choices=("transformers", "one_row"), help="transformers one by one as well, or our engine with one row")
    parser.add_argument("--idle", type=int, default=0, metavar="N", help="open N connections that say nothing")
    parser.add_argument("--minutes", type=float, default=0, metavar="N", help="mixed load with faults, and memory, for so long")
    parser.add_argument("--rate", type=float, default=2.0, help="with --minutes: requests and faults a second")
    parser.add_argument("--note", help="words about the machine for the rows, such as what else runs on it")
    parser.add_argument("--out", default=str(OUT))
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = args.checkpoint or tiny(Path(directory) / "tiny")
        shared = {"checkpoint": Path(checkpoint).name, **circumstances(), **({"note": args.note} if args.note else {})}

        def add(row: dict) -> None:
            rows.append({**row, **shared})
            append_row(Path(args.out), rows[-1])

        if args.requests or args.hang_ups:
            under_load(args, checkpoint, add)
        if args.idle:
            server = serving_day.Process(checkpoint)
            body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 4}
            found = serving_faults.idle(server.address, args.idle, body)
            add({**found, "exit_status": server.stop()})
        if args.minutes:
            add(serving_day.day(checkpoint, requests_of(200, args.most), args.minutes, args.rate))
    bad = [row.get("lost") or row.get("wrong") or row.get("problems") or row.get("left_open") or row.get("exit_status")
           or row.get("questions", 0) - row.get("answered", 0) or abs(row.get("growth", 0)) > MOST_GROWTH for row in rows]
    return int(any(bad))


if __name__ == "__main__":
    sys.exit(main())
