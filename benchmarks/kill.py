"""Kills a run at moments uniform in time, and shows that nothing was lost and nothing is left.

    python benchmarks/kill.py [--command train|eval] [--kills 20] [--seed 0] [--workers stopped,killed,starved,untouched]

`train` trains a tiny model on the sample in packed rows, with two worker processes and a save every five steps; `eval` asks the
sample's questions, with both controls. One run is left alone. Each other one is ended by SIGKILL, at a moment anywhere between
its start and its end (imports, data, compilation, the first step, saves and report included), and started again. A training run
has to go on to the same losses, gradients and counts at every step, and to the same parameters, bit for bit; an evaluation to
the same answers and metrics. No process and no segment of shared memory of the killed run may be left.

In the seconds before (`BEFORE_S`) its worker processes are stopped, one of them is killed, or they are starved (stopped and let go
on many times a second), in turn, a fourth of the runs each; an evaluation has no workers, and is stopped and starved itself. A run
of which a worker was killed may come to its own end before its kill: with exit status 1, and with what it had trained saved.
The last line is how many did so, such as 20/20; exit status 1 if not all.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import runs
from benchmarks.runs import GRACE_S, Run

WAYS = ("stopped", "killed", "starved", "untouched")
BEFORE_S = 2.0
UPDATES, SAVE_EVERY, WORKERS = 200, 5, 2


def reached(workdir: Path) -> str:
    """How far a killed run had come, in words."""
    if list(workdir.glob("*.partial")) or list(workdir.glob("predictions*.jsonl")):
        lines = sum(path.read_bytes().count(b"\n") for path in [*workdir.glob("*.partial"), *workdir.glob("predictions*.jsonl")])
        return f"{lines} answers kept"
    log, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    if not log.exists():
        return "before the first step" if (workdir / "recipe.json").exists() else "before anything was written"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    saving = [name for name in names if name[0] != "." and not (checkpoints / name / "manifest.json").exists()]
    lines = log.read_text(encoding="utf-8", errors="replace").count("\n")
    return f"{lines} steps logged" + (f", saving {saving[0].split('.')[0]}" if saving else "") if lines else "compiling the first step"


def treated(way: str, workers: int, status: int) -> str:
    """What became of the workers of a killed run, in words."""
    if way == "untouched":
        return way
    if way == "killed":
        return (f"1 of {workers} workers killed" if workers else "no worker yet") + (", it ended by itself" if status == 1 else "")
    return f"{f'{workers} workers' if workers else 'itself'} {way}"


def comparison(command: str, alone: Path) -> Callable[[Path], str | None]:
    """What says how a run differs from the one that was left alone; None where it does not."""
    if command == "train":
        wanted, tensors = runs.history(alone), runs.parameters(alone)
        return lambda workdir: runs.difference(workdir, wanted, tensors)
    answers = runs.predictions(alone)

    def compare(workdir: Path) -> str | None:
        found = runs.predictions(workdir)
        return next((f"{name} differs" for name in answers if found[name] != answers[name]), None)
    return compare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=("train", "eval"), default="train")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", default=",".join(WAYS), help="what happens to the workers before a kill, in turn")
    args = parser.parse_args()
    ways = args.workers.split(",")
    if set(ways) - set(WAYS):
        parser.error(f"--workers is {args.workers!r}; some of {','.join(WAYS)} were expected")
    good, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base, draw = Path(folder), random.Random(args.seed)
        cache, start = base / "cache", runs.write_start(base / "start")

        def words(workdir: Path) -> list[str]:
            return runs.train(start, workdir, UPDATES, SAVE_EVERY, WORKERS) if args.command == "train" else runs.evaluate(start, workdir)

        Run(words(base / "alone"), base / "log", cache).finish()  # fills the cache of those that go on
        compare = comparison(args.command, base / "alone")
        length = Run(words(base / "timed"), base / "log", None).finish()
        kind = {"train": f"{UPDATES} updates, a save every {SAVE_EVERY}, {WORKERS} workers, packed rows", "eval": "an evaluation"}
        print(f"{kind[args.command]}; a run takes {length:.1f} s; what is left of a killed one is looked for until {GRACE_S:.0f} s after",
              flush=True)
        for number in range(args.kills):
            workdir, share = base / str(number), (number + draw.random()) / args.kills  # one kill in each stretch of the time
            way = ways[number % len(ways)]
            while True:
                killed, moment = Run(words(workdir), base / "log", None), share * length
                workers = killed.treat(way, max(0.0, moment - BEFORE_S * draw.random()), moment, draw)
                if killed.kill_at(moment) or way == "killed" and workers and killed.process.returncode == 1:
                    break
                length *= 0.9  # the machine is faster now: this run was done before its moment came
                shutil.rmtree(workdir)
            state = f"{reached(workdir)}, {treated(way, workers, killed.process.returncode)}"
            wrong = killed.leftovers()
            again = Run(words(workdir), base / "log", cache)
            again.finish()
            wrong += again.leftovers()
            wrong += [found] if (found := compare(workdir)) else []
            good += not wrong
            print(f"kill {number + 1} at {share * length:.1f} s: {state}; {'; '.join(wrong) or 'the same run, no process left'}", flush=True)
    print(f"took {(time.monotonic() - begun) / 60:.1f} minutes\n{good}/{args.kills}")
    return 0 if good == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
