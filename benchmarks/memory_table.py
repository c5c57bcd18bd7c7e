"""The README's memory table, from what `--preflight` found: `python benchmarks/memory_table.py [--cases A,B] [--topologies X,Y]`.

Compiles what OUT does not hold yet, a file of rows a case (minutes each on two cores; extra `[preflight]`), and prints the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llavamed_jax.utils.paths import local  # noqa: E402

TOPOLOGIES = "a100-40g-8,a100-80g-8,h100-8,h200-1,v5e-64,v5p-8,v6e-8"
EVAL = ["eval.py", "--config", "configs/eval/vqa_rad.py", "--checkpoint"]
# name: title, command
CASES = {
    "finetune_v15_7b": ("full fine-tuning, 7B (v1.5)", ["train.py", "--config", "configs/finetune.py:v15,7b"]),
    "finetune_v1_13b": ("full fine-tuning, 13B (v1.0)", ["train.py", "--config", "configs/finetune.py:v1,13b"]),
    "pretrain_v15_7b": ("stage 1, 7B", ["train.py", "--config", "configs/pretrain.py:v15,7b"]),
    "pretrain_v1_13b": ("stage 1, 13B", ["train.py", "--config", "configs/pretrain.py:v1,13b"]),
    "eval_v15_7b": ("inference, bfloat16, 7B", [*EVAL, "preset:v15-7b"]),
    "eval_v1_13b": ("inference, bfloat16, 13B", [*EVAL, "preset:v1-13b"]),
}
GIB = 2**30


def measure(command: list[str], topologies: list[str], out: Path) -> list[dict]:
    """The rows of a case; those that the file lacks are compiled and added to it."""
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    for topology in topologies:
        if any(row["topology"] == topology for row in rows):
            continue
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            done = subprocess.run([sys.executable, *command, "--preflight", topology, "--preflight_json", file.name], cwd=ROOT)
            text = Path(file.name).read_text(encoding="utf-8")
            if done.returncode not in (0, 1) or not text:
                raise SystemExit(f"{' '.join(command)} --preflight {topology} ended with status {done.returncode}")
            rows += json.loads(text)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: a line a case, a cell a machine: peak of a device, in GiB, and a way out where it does not fit."""
    names = [name for name in dict.fromkeys(row["topology"] for rows in found.values() for row in rows)]
    usable = {row["topology"]: row["memory_bytes"] / GIB for rows in found.values() for row in rows}
    lines = ["| | " + " | ".join(f"`{name}` ({usable[name]:.1f})" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for case, rows in found.items():
        cells = {row["topology"]: _cell(row) for row in rows}
        lines.append(f"| {CASES[case][0]} | " + " | ".join(cells.get(name, "") for name in names) + " |")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    peak = f"{row['bytes']['peak'] / GIB:.1f}"
    if row["fits"]:
        return peak
    ways = [" ".join([*(f"`{key}={value}`" for key, value in way["changes"].items()),
                      *([f"on `{way['topology']}`"] if way["topology"] != row["topology"] else []), f"{way['peak'] / GIB:.1f}"])
            for way in row["would_fit"]]
    return f"~~{peak}~~ " + ("; ".join(ways) if ways else "no")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=ROOT / "benchmarks/results/preflight", type=local, metavar="DIR")
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help=f"of {', '.join(CASES)}")
    parser.add_argument("--topologies", metavar="X,Y", help=f"default {TOPOLOGIES}; an empty list compiles nothing")
    args = parser.parse_args()
    found = {}
    for name in args.cases.split(","):
        asked = TOPOLOGIES if args.topologies is None else args.topologies
        found[name] = measure(CASES[name][1], [topology for topology in asked.split(",") if topology], args.out / f"{name}.json")
    print(table({name: rows for name, rows in found.items() if rows}))


if __name__ == "__main__":
    main()
