"""The server under load: `python benchmarks/serving.py --checkpoint PATH [--clients 1,8,64] [--requests 2000] [--hang_ups 200]`.

One process loads the checkpoint in float32 and serves it over HTTP on loopback. First every distinct request is answered alone, by
`generate`. Then the clients send the requests over HTTP, each a mixture: text, an image, the same image, two turns, streams, long
answers, and clients that hang up after their third piece. A row of `benchmarks/results/serving.jsonl` has, for each number of
clients: requests and tokens a second, p50 and p95 of the time to the first token of streams, and how many answers were lost or
differ from the ones given alone (0 of each is what it must be; the exit status is 1 otherwise).

`--hang_ups N` then opens N streams of 1,000 tokens one after the other and leaves each after its third piece: the row of results
has the most tokens that a row still generated, and the most seconds until it was free.

`--baseline` serves the same requests with the same engine and one row, one request at a time: what a page without batching does.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from benchmarks.measure import ROOT, append_row, circumstances

WORDS = "what where which is are left right lung liver heart lesion normal seen abnormal shown image organ side scan bone".split()
OUT = ROOT / "benchmarks" / "results" / "serving.jsonl"


def picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def requests_of(distinct: int, most: int) -> list[dict]:
    """Distinct bodies: kinds in turn, greedy and sampled."""
    rng, out = np.random.default_rng(1), []
    pictures = [picture(i) for i in range(8)]
    for i in range(distinct):
        text = f"{' '.join(rng.choice(WORDS, 5))} {i}?"
        kind = i % 5
        image = {"type": "image_url", "image_url": {"url": pictures[0 if kind == 2 else i % 8]}}
        parts = [{"type": "text", "text": text}] if kind == 0 else [image, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": parts}]
        if kind == 3:
            messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        tokens = most if kind == 4 else int(rng.integers(4, max(5, most // 3)))
        out.append({"model": "served", "messages": messages, "max_tokens": tokens, "temperature": float(i % 2) * 0.7, "seed": i})
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=500)
    parser.add_argument("--most", type=int, default=48, help="new tokens of a long answer")
    parser.add_argument("--hang_ups", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--baseline", action="store_true", help="one row: one request at a time")
    parser.add_argument("--out", default=str(OUT))
    args = parser.parse_args()

    import llavamed_jax as lm
    from llavamed_jax.serving import app, server
    from llavamed_jax.serving.limits import Limits
    from llavamed_jax.serving.log import Log
    from llavamed_jax.serving.service import Service

    model = lm.load(args.checkpoint, dtype="float32")
    model.engine.batch_size = 1 if args.baseline else args.batch_size
    bodies = requests_of(args.distinct, args.most)
    wanted = answers_alone(model, bodies)
    service = Service(["served"], Limits(max_queue=4096, max_requests=4096, timeout=3600), log=Log(file=io.StringIO()))
    service.serve(model)
    listener = server.listen("127.0.0.1", 0)
    url, stop = f"http://127.0.0.1:{listener.getsockname()[1]}/v1", threading.Event()
    thread = threading.Thread(target=server.run, args=(app.create(service), service, listener, stop.is_set), daemon=True)
    thread.start()
    time.sleep(1)
    rows = []
    shared = {"checkpoint": Path(args.checkpoint).name, "batch_size": model.engine.batch_size, **circumstances()}
    numbers = list(map(int, args.clients.split(",")))
    measured(url, bodies, wanted, max(numbers), min(args.requests, 10 * max(numbers)))  # compiles
    for clients in numbers:
        rows.append({**measured(url, bodies, wanted, clients, args.requests), **shared})
        append_row(Path(args.out), rows[-1])
    if args.hang_ups:
        rows.append({**hang_ups(url, service, args.hang_ups), **shared})
        append_row(Path(args.out), rows[-1])
    stop.set()
    thread.join(60)
    return int(any(row.get("lost") or row.get("wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
