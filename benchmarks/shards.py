"""Shards of training records: `python benchmarks/shards.py [--images FOLDER --tokenizer FILE] [--plan RECORDS] [--out DIR]`.

One run appends these rows to shards.jsonl:
 images  samples a second of one core and megabytes, loose files beside shards of png and of jpeg, for the images below FOLDER and
         the model `preset:v15-7b` (336 pixels): what a worker process does for a sample. Processor seconds, turn by turn, medians.
 plan    an index of RECORDS records, made up: seconds until it is open and measured, until the first update's rows are known,
         for each further window, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.measure import ROOT, append_row, circumstances
from llavamed_jax.config import preset
from llavamed_jax.datasets import shards
from llavamed_jax.datasets.training import read_training
from llavamed_jax.pipeline import examples, lengths, packing, stored
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.pipeline.trial import Trial
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.utils.paths import local

MODEL, MAX_LENGTH, ROUNDS = "v15-7b", 2048, 3


def seconds(data, processor: Processor) -> float:
    """Processor seconds to read every record with its pixels."""
    begun = time.process_time()
    for number in range(len(data)):
        example = examples.tokenize(data.record(number), processor, MAX_LENGTH)
        _, broken = examples.read_images(example, processor)
        assert broken is None, broken
    return time.process_time() - begun


def images(folder: Path, tokenizer: Path, most: int) -> dict:
    processor = Processor(preset(MODEL), Tokenizer.load(tokenizer))
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))[:most]
    rows = [{"id": number, "image": str(path), "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]}
            for number, path in enumerate(files)]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "loose.json"
        source.write_text(json.dumps(rows), encoding="utf-8")
        data, megabytes = {"loose": read_training(source)}, {"loose": sum(path.stat().st_size for path in files) / 1e6}
        for kind in ("png", "jpeg"):
            out = Path(scratch) / kind
            subprocess.run([sys.executable, "-m", "llavamed_jax.curation", "records", "--data", str(source), "--checkpoint", f"preset:{MODEL}",
                            "--tokenizer", str(tokenizer), "--out", str(out), "--format", kind], cwd=ROOT, check=True)
            data[kind] = read_training(out)
            megabytes[kind] = sum(path.stat().st_size for path in out.glob("*.array_record")) / 1e6
        taken = {kind: [] for kind in data}
        for _ in range(ROUNDS):
            for kind, each in data.items():
                taken[kind].append(seconds(each, processor))
    return {"case": "images", "images": len(files), "megabytes": {kind: round(size, 1) for kind, size in megabytes.items()},
            "images_a_second_of_a_core": {kind: round(len(files) / statistics.median(times), 1) for kind, times in taken.items()}}


def index(folder: Path, count: int, processor: Processor) -> None:
    """Writes manifest and lengths of shards that are empty files: planning reads none."""
    rng = np.random.default_rng(0)
    span = 10_000
    listed = [{"file": f"part-00000-of-00001-{number:05d}.array_record", "records": min(span, count - number * span), "bytes": 0,
               "sha256": "0" * 64} for number in range(-(-count // span))]
    for each in listed:
        (folder / each["file"]).touch()
    tokens = np.minimum(MAX_LENGTH, 576 + rng.gamma(2.0, 60.0, count)).astype(np.int32)
    rest = {"damaged": [], "truncated": 0, "surplus": 0, "unsupervised": 0, "first_lost": "", "first_unsupervised": "", "highest": [1, 1]}
    key = stored.key(processor, MAX_LENGTH, lengths.FORMAT)
    with open(folder / f"lengths-{key}-00000-of-00001.npz", "wb") as file:
        stored.save_arrays(file, tokens, np.ones(count, np.int16), np.zeros(count, np.int16), rest)
    made = {"format": shards.FORMAT, "part": 0, "parts": 1, "shards": listed, "images": {**stored.preprocessing(processor), "format": "png"}, "made_from": {}}
    (folder / "manifest-00000-of-00001.json").write_text(json.dumps(made), encoding="utf-8")


def plan(count: int, tokenizer: Path, windows: int) -> dict:
    processor = Processor(preset(MODEL), Tokenizer.load(tokenizer))
    with tempfile.TemporaryDirectory() as scratch:
        index(Path(scratch), count, processor)
        begun, clock = time.process_time(), time.monotonic()
        data = read_training(scratch)
        found = lengths.measure(data, processor, MAX_LENGTH)
        opened = time.process_time() - begun
        stream = Stream.of(data, 0)
        slots = Trial(stream, found, 600.0).image_slots(4096)
        made = Plan(stream, found, Layout(4096, slots, 32, True))
        rows = list(made.take(0, 0, 32))
        first, wall = time.process_time() - begun, time.monotonic() - clock
        assert len(rows) == 32 and made.num_updates(1) > 0
        more = []
        for window in range(1, min(windows, made.windows)):
            begun = time.process_time()
            made.window(0, window)
            more.append(round(time.process_time() - begun, 1))
    return {"case": "plan", "records": count, "windows": made.windows, "samples_a_window": packing.WINDOW, "seconds_to_open": round(opened, 1),
            "seconds_to_first_update": round(first, 1), "wall_seconds_to_first_update": round(wall, 1), "seconds_of_further_windows": more,
            "updates_expected": made.num_updates(1), "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=local, help="a folder of images")
    parser.add_argument("--most", type=int, default=400, help="of the images")
    parser.add_argument("--tokenizer", type=local, required=True)
    parser.add_argument("--plan", type=int, help="records of the index")
    parser.add_argument("--windows", type=int, default=4, help="windows of the plan that are packed")
    parser.add_argument("--out", type=local, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    rows = ([images(args.images, args.tokenizer, args.most)] if args.images else []) + (
        [plan(args.plan, args.tokenizer, args.windows)] if args.plan else [])
    same = dict(cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), **circumstances())
    for row in rows:
        append_row(args.out / "shards.jsonl", {**row, **same})


if __name__ == "__main__":
    main()
