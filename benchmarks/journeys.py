"""Counts how far one image and one question travel through the package: files entered, and moves between files and rooms.

    python benchmarks/journeys.py [--pairs N] [--out FILE.json]

The first journey is one update of the demo's warm-up, from the recipe to the end of the run. The second is the demo's
evaluation: 149 questions, each with its image, with another one and with noise. Both commands run in this process, with a hook
that sees every call of a Python function. A *move* is a call whose caller, the nearest one in the package, is in another file;
a move between rooms is one between two of the package's top-level folders or files.

`PYTHONPATH` of another checkout, and this script's path in full, count that checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path


class Journey:
    """A context that counts calls among the files of a package.

    Attributes:
      files: file -> calls into it.
      moves: (file of the caller, file of the callee) -> calls, where they differ.
    """

    def __init__(self, package: Path):
        self._prefix = f"{package}{os.sep}"
        self.files: Counter[str] = Counter()
        self.moves: Counter[tuple[str, str]] = Counter()
        self._names: dict[str, str | None] = {}

    def __enter__(self) -> Journey:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *_) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _name(self, file: str) -> str | None:
        """A file's name within the package; None for files of others."""
        if file not in self._names:
            self._names[file] = file.removeprefix(self._prefix) if file.startswith(self._prefix) else None
        return self._names[file]

    def _on_event(self, frame, event, _) -> None:
        if event != "call":
            return
        here = self._name(frame.f_code.co_filename)
        if here is None:
            return
        caller = frame.f_back
        while caller is not None and self._name(caller.f_code.co_filename) is None:
            caller = caller.f_back
        # An import, with the bodies of classes and the tables of a module, is no step of the journey.
        if "<module>" in (frame.f_code.co_name, caller and caller.f_code.co_name):
            return
        self.files[here] += 1
        there = None if caller is None else self._name(caller.f_code.co_filename)
        if there is not None and there != here:
            self.moves[there, here] += 1

    def counts(self) -> dict[str, int]:
        """Files entered, calls, moves between files, and moves between rooms."""
        room = lambda file: file.split(os.sep)[0]
        return {"files": len(self.files), "calls": self.files.total(), "moves_between_files": self.moves.total(),
                "moves_between_rooms": sum(n for (a, b), n in self.moves.items() if room(a) != room(b))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts files entered and moves between files on two journeys.")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="print the N pairs of files with the most moves")
    parser.add_argument("--out", metavar="FILE", help="write the counts, with the busiest moves, as JSON")
    args = parser.parse_args()
    import llavamed_jax
    from llavamed_jax.cli import eval as eval_cli
    from llavamed_jax.cli import train as train_cli

    package = Path(llavamed_jax.__file__).parent
    os.chdir(package.parent)  # recipes name files of the repository
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "one update": (train_cli.main, ["--config", "configs/demo.py:warmup", "--workdir", f"{folder}/run",
                                            "--config.total_steps=1", "--config.data.workers=0"]),
            "evaluation": (eval_cli.main, ["--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", f"{folder}/run",
                                           "--workdir", f"{folder}/eval", "--control", "image"])}
        for name, (command, words) in commands.items():
            journey, said = Journey(package), io.StringIO()
            with contextlib.redirect_stdout(said), journey:
                status = command(words)
            if status:
                sys.exit(f"{name} ended with status {status}: {said.getvalue()[-2000:]}")
            found[name] = journey.counts()
            busiest = [{"from": a, "to": b, "moves": n} for (a, b), n in journey.moves.most_common(max(20, args.pairs))]
            print(f"{name}: " + ", ".join(f"{n:,} {key.replace('_', ' ')}" for key, n in found[name].items()), flush=True)
            for pair in busiest[: args.pairs]:
                print(f"{pair['moves']:8,}  {pair['from']} -> {pair['to']}", flush=True)
            found[name] |= {"busiest": busiest, "by_file": dict(sorted(journey.files.items()))}
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
