"""The README's memory tables, from what `--preflight` found: `python benchmarks/memory_table.py [--cases A,B] [--topologies X,Y]`.

Compiles what OUT does not hold yet, a file of rows a case (minutes each on two cores; extra `[preflight]`), and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llavamed_jax.preflight.topologies import Topology  # noqa: E402
from llavamed_jax.utils.paths import local  # noqa: E402

CLUSTERS = "a100-40g-8,a100-80g-8,h100-8,h200-1,v5e-64,v5p-8,v6e-8"
ONE_HOST = "a100-40g-1,a100-80g-1,h200-1,l4-1,rtx4090-1,v5e-8"
MODERN = "h100-8,h200-8,v5p-8,v6e-16"
EVAL = ["eval.py", "--config", "configs/eval/vqa_rad.py", "--checkpoint"]
LEAST = "--config.remat=full"  # auto takes more where there is room
# Adapters on few devices: each takes one row of 2,048 tokens at a time; about 128 samples, as the recipes ask, fill 64 rows of v1.5
# and 48 of v1.0.
V15, V1 = (["train.py", "--config", f"configs/lora.py:{model}", LEAST, "--config.data.row_length=2048",
            f"--config.micro_batches={{{rows} // devices}}"] for model, rows in (("v15,7b", 64), ("v1,13b", 48)))
NF4 = "--config.quantize=nf4"
# A table for each list of topologies; name: title, command
TABLES = {CLUSTERS: {
    "finetune_v15_7b": ("full fine-tuning, 7B (v1.5)", ["train.py", "--config", "configs/finetune.py:v15,7b", LEAST]),
    "finetune_v1_13b": ("full fine-tuning, 13B (v1.0)", ["train.py", "--config", "configs/finetune.py:v1,13b", LEAST]),
    "pretrain_v15_7b": ("stage 1, 7B", ["train.py", "--config", "configs/pretrain.py:v15,7b", LEAST]),
    "pretrain_v1_13b": ("stage 1, 13B", ["train.py", "--config", "configs/pretrain.py:v1,13b", LEAST]),
    "eval_v15_7b": ("inference, bfloat16, 7B", [*EVAL, "preset:v15-7b"]),
    "eval_v1_13b": ("inference, bfloat16, 13B", [*EVAL, "preset:v1-13b"]),
}, ONE_HOST: {
    "lora_v15_7b": ("LoRA, 7B (v1.5)", V15),
    "qlora_v15_7b": ("QLoRA nf4, 7B", [*V15, NF4]),
    "lora_v1_13b": ("LoRA, 13B (v1.0)", V1),
    "qlora_v1_13b": ("QLoRA nf4, 13B", [*V1, NF4]),
    "eval_v15_7b_int8": ("inference, int8, 7B", [*EVAL, "preset:v15-7b", "--quantize", "int8"]),
    "eval_v15_7b_int4": ("inference, int4, 7B", [*EVAL, "preset:v15-7b", "--quantize", "int4"]),
    "eval_v1_13b_int8": ("inference, int8, 13B", [*EVAL, "preset:v1-13b", "--quantize", "int8"]),
    "eval_v1_13b_int4": ("inference, int4, 13B", [*EVAL, "preset:v1-13b", "--quantize", "int4"]),
}, MODERN: {
    "modern_instruct": ("full fine-tuning, SigLIP 2 and Qwen3-8B", ["train.py", "--config", "configs/modern.py:instruct", LEAST]),
}}
CASES = {name: (*case, topologies) for topologies, cases in TABLES.items() for name, case in cases.items()}
GIB = 2**30


def measure(command: list[str], topologies: list[str], out: Path) -> list[dict]:
    """The rows of a case; those that the file lacks are compiled and added to it."""
    rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    for topology in topologies:
        if any(row["topology"] == topology for row in rows):
            continue
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            done = subprocess.run([sys.executable, *_for(command, topology), "--preflight", topology, "--preflight_json",
                                   file.name], cwd=ROOT)
            text = Path(file.name).read_text(encoding="utf-8")
            if done.returncode not in (0, 1) or not text:
                raise SystemExit(f"{' '.join(command)} --preflight {topology} ended with status {done.returncode}")
            rows += json.loads(text)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def _for(command: list[str], topology: str) -> list[str]:
    """The command for a machine: `{64 // devices}` stands for a quotient by its number of devices."""
    devices = Topology.parse(topology).num_devices
    return [re.sub(r"\{(\d+) // devices\}", lambda found: str(int(found[1]) // devices), word) for word in command]


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: a line a case, a cell a machine: peak of a device, in GiB, and a way out where it does not fit.

    A line says the samples of an update where all its cells have as many; where they differ, each cell says its own.
    """
    names = [name for name in dict.fromkeys(row["topology"] for rows in found.values() for row in rows)]
    usable = {row["topology"]: row["memory_bytes"] / GIB for rows in found.values() for row in rows}
    lines = ["| | " + " | ".join(f"`{name}` ({usable[name]:.1f})" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for case, rows in found.items():
        said = {_samples(row) for row in rows}
        of = said.pop() if len(said) == 1 else ""
        cells = {row["topology"]: _cell(row) + ("" if of else _samples(row)) for row in rows}
        lines.append(f"| {CASES[case][0]}{of} | " + " | ".join(cells.get(name, "") for name in names) + " |")
    return "\n".join(lines)


def _samples(row: dict) -> str:
    if "mean_length" not in row:  # an evaluation
        return ""
    return f", {row['rows'] * row['row_length'] / row['mean_length']:.0f} samples"


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
    parser.add_argument("--topologies", metavar="X,Y", help="default: those of the case's table; an empty list compiles nothing")
    args = parser.parse_args()
    found = {}
    for name in args.cases.split(","):
        _, command, own = CASES[name]
        asked = own if args.topologies is None else args.topologies
        found[name] = measure(command, [topology for topology in asked.split(",") if topology], args.out / f"{name}.json")
    for cases in TABLES.values():
        if rows := {name: found[name] for name in cases if found.get(name)}:
            print(table(rows), end="\n\n")


if __name__ == "__main__":
    main()
