"""Kills runs whose workdir is in a bucket, and lets runs race for one workdir, on stores of this machine (`emulators.py`).

    python benchmarks/buckets.py [--store gs|s3] [--kills 10] [--races 20] [--seed 0]

Kills: one run is left alone. Each other one is ended by SIGKILL at a moment anywhere between its start and its end, and started
again, with an empty directory of local copies, as on another machine. It has to go on to the same losses, gradients and counts at
every step, and to the same parameters, bit for bit, read from the bucket. Races: two runs are started at once for one new workdir.
One has to finish it, and the other one has to end with exit status 1 and one sentence that names the first; or, if it came after
the end of the first, with 0 and the sentence that the run is finished. The last line is how many of all went well.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import emulators, runs
from benchmarks.runs import Run

UPDATES, SAVE_EVERY = 60, 5


def reached(url: str) -> str:
    """How far a killed run had come in the bucket, in words."""
    scheme, _, path = url.partition("://")
    names = [name[len(path) + 1:] for name in emulators.files(scheme).find(path)]
    whole = sorted(int(name.split("/")[1]) for name in names if name.startswith("checkpoints/") and name.count("/") == 2
                   and name.endswith("/manifest.json"))
    begun = {int(name.split("/")[1]) for name in names if name.startswith("checkpoints/") and name.split("/")[1].isdigit()} - set(whole)
    words = f"step {whole[-1]} saved" if whole else "no step saved" if names else "nothing written"
    return words + (f", step {max(begun)} half uploaded" if begun else "")


def history(url: str) -> list[dict]:
    scheme, _, path = url.partition("://")
    lines = emulators.files(scheme).cat_file(f"{path}/metrics.jsonl").decode().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in runs.MEASURED} for line in lines]


def difference(url: str, wanted: list[dict], tensors: dict[str, np.ndarray]) -> str | None:
    """How a run differs from another one's `history` and parameters; None where it does not."""
    if history(url) != wanted:
        return "metrics.jsonl differs"
    ours = runs.parameters(url)
    return next((f"{name} differs" for name, tensor in tensors.items() if not np.array_equal(ours[name], tensor)), None)


def kills(scheme: str, start: Path, base: Path, count: int, draw: random.Random) -> int:
    """Kills and resumes; returns how many of the runs came out as the one that was left alone."""
    words = lambda name: runs.train(start, f"{scheme}://{emulators.BUCKET}/{name}", UPDATES, SAVE_EVERY, 0)
    length = Run(words("alone"), base / "log", base / "cache").finish()
    length = min(length, Run(words("timed"), base / "log", base / "cache").finish())
    alone = f"{scheme}://{emulators.BUCKET}/alone"
    wanted, tensors, good = history(alone), runs.parameters(alone), 0
    print(f"{scheme}: {UPDATES} updates, a save every {SAVE_EVERY}; a run takes {length:.1f} s", flush=True)
    for number in range(count):
        url, share = f"{scheme}://{emulators.BUCKET}/{number}", (number + draw.random()) / count
        killed = Run(words(str(number)), base / "log", base / "cache")
        was_running = killed.kill_at(share * length)
        state = reached(url)
        shutil.rmtree(base / "copies", ignore_errors=True)
        Run(words(str(number)), base / "log", base / "cache").finish()
        wrong = difference(url, wanted, tensors)
        good += wrong is None
        print(f"kill {number + 1} at {share * length:.1f} s: {state if was_running else 'it was done already'}; "
              f"{wrong or 'the same run'}", flush=True)
    return good


def race(scheme: str, start: Path, base: Path, number: int) -> str | None:
    """Two runs at once for one workdir; returns what went wrong."""
    words = runs.train(start, f"{scheme}://{emulators.BUCKET}/race{number}", 10, SAVE_EVERY, 0)
    logs = [base / f"race{number}.{k}" for k in range(2)]
    both = [Run(words, log, base / "cache") for log in logs]
    status = [run.process.wait() for run in both]
    said = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    finished = [k for k in range(2) if status[k] == 0 and "finished at step 10 of 10" in said[k]]
    others = [k for k in range(2) if k not in finished]
    if len(finished) != 1:
        return f"{len(finished)} runs trained it: {status}, {said[0][-300:]!r}, {said[1][-300:]!r}"
    error, first = said[others[0]], both[finished[0]].process.pid
    is_refused = status[others[0]] == 1 and f"is in use by another run (process {first} on " in error and error.count("error: ") == 1
    if not is_refused and not (status[others[0]] == 0 and "is finished: it was trained for 10 updates" in error):
        return f"the other one ended with {status[others[0]]}: {error[-300:]!r}"
    return None if [line["step"] for line in history(f"{scheme}://{emulators.BUCKET}/race{number}")] == list(range(1, 11)) else "steps are missing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("gs", "s3"), default="gs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    good, begun, draw = 0, time.monotonic(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, emulators.store(args.store) as variables:
        base = Path(folder)
        with emulators.environment({**variables, "LLAVAMED_BUCKET_CACHE": str(base / "copies")}):
            start = runs.write_start(base / "start")
            good += kills(args.store, start, base, args.kills, draw) if args.kills else 0
            if args.races and not args.kills:
                Run(runs.train(start, base / "warm", 10, SAVE_EVERY, 0), base / "log", base / "cache").finish()
            for number in range(args.races):
                wrong = race(args.store, start, base, number)
                good += wrong is None
                print(f"race {number + 1}: {wrong or 'one run trained, the other one was refused or came after it'}", flush=True)
    print(f"took {(time.monotonic() - begun) / 60:.1f} minutes\n{good}/{args.kills + args.races}")
    return 0 if good == args.kills + args.races else 1


if __name__ == "__main__":
    sys.exit(main())
