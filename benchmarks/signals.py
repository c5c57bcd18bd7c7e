"""Sends signals to `train.py`, `eval.py` and `convert` at moments uniform over each stage of their work, and shows how they end.

    python benchmarks/signals.py [--signals 200] [--seed 0] [--again 10] [--out benchmarks/results/signals.jsonl]

Each run is a process of its own on the sample, with a tiny model. It is sent SIGTERM, SIGINT or SIGHUP, once or twice, at a moment
drawn uniformly from one of its stages (start, load, compile, train or answer, save, report), whose begin is seen by what the run has
written. A run passes where it ends in time (`PROMISE_S`), with an exit status that docs/training.md has for it, without a
traceback or a native crash, without a half-written file, and leaves no process and no segment of shared memory. Every `--again`-th
run that can go on is started again and has to come to the files of an undisturbed one.
Prints a table and appends a row a signal to `--out`; the last line is how many passed, such as 200/200. Exit status 1 if not all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import runs
from benchmarks.runs import ROOT, Run
from llavamed_jax.utils.paths import local

UPDATES, SAVE_EVERY, WORKERS = 40, 5, 2
# Seconds from the last signal to the end, on a machine that does nothing else: two updates and a save; the grace of an evaluation and
# its last answer; a directory that is removed.
PROMISE_S = {"train": 15.0, "eval": 12.0, "export": 3.0, "import": 3.0, "verify": 3.0}
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EARLY_S = 0.4  # in which Python may not have come so far as to hear a signal; nothing is written then


@dataclass
class Command:
    """A command that is ended.

    Attributes:
      words: of the command, for a folder that is its workdir or its result.
      stages: name -> whether the stage has begun, by folder and log.
      lengths: seconds that each stage took in an undisturbed run.
    """

    name: str
    words: Callable[[Path], list[str]]
    stages: dict[str, Callable[[Path, Path], bool]]
    lengths: dict[str, float] = field(default_factory=dict)


def has(pattern: str) -> Callable[[Path, Path], bool]:
    return lambda _, log: log.exists() and re.search(pattern, log.read_text(encoding="utf-8", errors="replace")) is not None


def is_saving(folder: Path, _) -> bool:
    """A step is there that has no manifest yet, after one that has."""
    steps = [path for path in (folder / "checkpoints").glob("[0-9]*") if not (path / "manifest.json").exists()]
    return bool(steps) and (folder / "checkpoints" / ".sealed").exists()


def is_partial(folder: Path, _) -> bool:
    return any(folder.parent.glob(f".{folder.name}.*.partial"))


def commands(start: Path, exported: Path) -> list[Command]:
    begun = lambda *_: True
    file_has = lambda name, lines: lambda folder, _: (folder / name).exists() and (folder / name).read_bytes().count(b"\n") >= lines
    convert = lambda *words: lambda out: ["-m", "convert", *map(str, words), *(["--out", str(out)] if words[0] != "verify" else [])]
    return [
        Command("train", lambda folder: runs.train(start, folder, UPDATES, SAVE_EVERY, WORKERS), {
            "start": begun, "load": lambda folder, _: (folder / ".lock").exists(), "compile": file_has("metrics.jsonl", 0),
            "train": file_has("metrics.jsonl", 1), "save": is_saving}),
        Command("eval", lambda folder: runs.evaluate(start, folder), {
            "start": begun, "load": has("questions about"), "compile": has("vision tower"),
            "answer": file_has("predictions.jsonl.partial", 2), "report": file_has("predictions_control_noise.jsonl", 1)}),
        Command("export", convert("export", "--checkpoint", start, "--layout", "llava"), {
            "start": begun, "load": has("layout"), "save": is_partial}),
        Command("import", convert("import", "--checkpoint", exported), {"start": begun, "load": has("layout"), "save": is_partial}),
        Command("verify", convert("verify", start, exported), {"start": begun, "compile": has("layout")}),
    ]


def measure(command: Command, folder: Path, cache: Path | None) -> None:
    """Runs a command undisturbed and notes how long its stages are."""
    log = folder.with_suffix(".log")
    run, seen = Run(command.words(folder), log, cache), {}
    while run.process.poll() is None:
        for stage, has_begun in command.stages.items():
            if stage not in seen and has_begun(folder, log):
                seen[stage] = time.monotonic()
        time.sleep(0.002)
    run.finish()
    absent = [stage for stage in command.stages if stage not in seen]
    if absent:
        said = log.read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"error: {command.name} never came to its stage {absent[0]}:\n{said[-2000:]}")
    ends = [*list(seen.values())[1:], time.monotonic()]
    command.lengths = {stage: max(end - begin, 0.01) for (stage, begin), end in zip(seen.items(), ends, strict=True)}


def disturbed(command: Command, stage: str, number: int, is_twice: bool, draw: random.Random, folder: Path, cache: Path) -> dict:
    """One run that is sent a signal in a stage; how it ended. What comes after the compilation is come to with its result kept."""
    log = folder.with_suffix(".log")
    run = Run(command.words(folder), log, None if stage in ("start", "load", "compile") else cache)
    while not command.stages[stage](folder, log) and run.process.poll() is None:
        time.sleep(0.002)
    wait = draw.uniform(0, command.lengths[stage])
    run.wait_until(time.monotonic() - run.started + wait)
    sent = 0
    at = time.monotonic() - run.started
    for _ in range(1 + is_twice):
        if sent:
            run.wait_until(time.monotonic() - run.started + draw.uniform(0.3, 2.0))
        if run.process.poll() is not None:
            break
        # A terminal signals the whole group, a scheduler often one process.
        os.killpg(run.process.pid, number) if number != signal.SIGTERM else run.process.send_signal(number)
        sent, last = sent + 1, time.monotonic()
    row = {"command": command.name, "stage": stage, "signal": signal.Signals(number).name, "sent": sent, "at_seconds": round(at, 2)}
    if not sent:
        return row | {"status": run.process.wait(), "seconds": 0.0, "wrong": []}
    is_late = run.wait_until(last - run.started + 60)
    if is_late:
        run.kill_at(0)
    seconds = time.monotonic() - last
    status = run.process.wait()
    said = log.read_text(encoding="utf-8", errors="replace")
    wrong = [f"it did not end within {seconds:.1f} s"] * (is_late or seconds > PROMISE_S[command.name])
    wrong += [f"exit status {status}"] * (not is_right(command, stage, status, sent, at))
    wrong += ["a traceback"] * ("Traceback" in said and status != -number)
    wrong += [f"{name} is left" for name in runs.hidden(folder.parent)]
    wrong += unwhole(command, folder, status)
    return row | {"status": status, "seconds": round(seconds, 2), "wrong": wrong + run.leftovers()}


def is_right(command: Command, stage: str, status: int, sent: int, at: float) -> bool:
    """Whether an exit status is one that the docs have for a signal in this stage."""
    if status == 0 or status == 1 and stage == "start":  # it was done; it had not begun
        return True
    if status < 0:
        return at < _EARLY_S and -status in NUMBERS
    return status in ({1} if command.name not in ("train", "eval") else {75} if sent == 1 else {1, 75})


def unwhole(command: Command, folder: Path, status: int) -> list[str]:
    """What is there in part only."""
    found = []
    if command.name == "train":
        from llavamed_jax.checkpoints.tree.store import newest_intact_step, steps
        step, damaged = newest_intact_step(folder)
        if status == 75 and (damaged or step is None and steps(folder)):
            found += damaged or ["no step is whole"]
        said = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        if status == 75 and (saved := re.findall(r"stopped and saved at step (\d+)", said)):
            found += [f"step {saved[-1]} was said to be saved, {step} is"] * (int(saved[-1]) != step)
    for path in [*folder.glob("*.json"), *folder.glob("*.jsonl")] if folder.is_dir() else []:
        try:
            text = path.read_text(encoding="utf-8")
            [json.loads(line) for line in ([text] if path.suffix == ".json" else text.splitlines())]
        except ValueError:
            found.append(f"{path.name} is not whole")
    if command.name == "export" and folder.exists() and not (folder / "config.json").exists():
        found.append("a result without its config")
    return found


def goes_on(command: Command, folder: Path, whole: dict, cache: Path) -> list[str]:
    """How the files of a run that is started again differ from an undisturbed run's."""
    Run(command.words(folder), folder.with_suffix(".log"), cache).finish()
    if command.name == "train":
        found = runs.difference(folder, *whole["train"])
    elif command.name == "eval":
        found = next((f"{name} differs" for name, data in runs.predictions(folder).items() if data != whole["eval"][name]), None)
    else:
        found = None if folder.is_dir() else "no result"
    return [found] if found else []


def table(rows: list[dict]) -> str:
    groups = defaultdict(list)
    for row in rows:
        groups[row["command"], row["stage"]].append(row)
    lines = [f"{'command':<8} {'stage':<8} {'signals':>7} {'passed':>6} {'slowest s':>9}  exit statuses"]
    for (command, stage), found in groups.items():
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(Counter(row["status"] for row in found).items()))
        passed, slowest = sum(not row["wrong"] for row in found), max(row["seconds"] for row in found)
        lines.append(f"{command:<8} {stage:<8} {len(found):>7} {passed:>6} {slowest:>9.2f}  {statuses}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=int, default=10, help="every so many runs are started again and compared; 0: none")
    parser.add_argument("--commands", default="train,eval,export,import,verify")
    parser.add_argument("--out", type=local, default=ROOT / "benchmarks" / "results" / "signals.jsonl")
    args = parser.parse_args()
    begun, rows = time.monotonic(), []
    for number in NUMBERS:  # what is ignored here, as by a shell that starts this in the background, would be ignored by the runs
        signal.signal(number, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as temporary:
        base, draw = Path(temporary), random.Random(args.seed)
        cache = base / "cache"
        start, exported = runs.write_start(base / "start"), base / "exported" / "out"
        exported.parent.mkdir()
        words = ["-m", "convert", "export", "--checkpoint", str(start), "--layout", "transformers", "--out", str(exported)]
        Run(words, base / "log", None).finish()
        chosen = [command for command in commands(start, exported) if command.name in args.commands.split(",")]
        whole: dict = {}
        for command in chosen:
            folder = base / "whole" / command.name
            folder.parent.mkdir(exist_ok=True)
            measure(command, folder, None)
            if command.name in ("train", "eval"):
                kept = base / "cached" / command.name
                kept.parent.mkdir(exist_ok=True)
                Run(command.words(kept), base / "log", cache).finish()  # fills the cache
            if command.name == "train":
                whole["train"] = runs.history(folder), runs.parameters(folder)
            elif command.name == "eval":
                whole["eval"] = runs.predictions(folder)
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in command.lengths.items())
            print(f"{command.name}, seconds undisturbed: {stages}", flush=True)
        cases = [(command, stage, number, is_twice) for command in chosen for stage in command.stages for number in NUMBERS
                 for is_twice in (False, True)]
        draw.shuffle(cases)
        for i in range(args.signals):
            command, stage, number, is_twice = cases[i % len(cases)]
            folder = base / str(i) / "run"
            folder.parent.mkdir()
            row = disturbed(command, stage, number, is_twice, draw, folder, cache)
            if args.again and i % args.again == 0 and not row["wrong"] and command.name != "verify" and row["status"]:
                row["wrong"] += goes_on(command, folder, whole, cache)
                row["again"] = True
            shutil.rmtree(folder.parent)
            rows.append(row)
            print(f"{i + 1}: {command.name} {stage}, {row['sent']} x {row['signal']} at {row['at_seconds']} s: exit {row['status']} after "
                  f"{row['seconds']} s{', gone on' if row.get('again') else ''}; {'; '.join(row['wrong']) or 'passed'}", flush=True)
            args.out.parent.mkdir(exist_ok=True)
            with open(args.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
    good = sum(not row["wrong"] for row in rows)
    print(f"\n{table(rows)}\ntook {(time.monotonic() - begun) / 60:.1f} minutes\n{good}/{args.signals}")
    return 0 if good == args.signals else 1


if __name__ == "__main__":
    sys.exit(main())
