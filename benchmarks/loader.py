"""The data pipeline: `python benchmarks/loader.py [--root VQA_RAD] [--tokenizer FILE] [--records 500000] [--out DIR]`.

One run writes these rows to loader.jsonl:
 throughput  samples a second of one core: what a worker process does for a batch of packed rows (record, ids, labels, pixels as
             uint8), beside what transformers does for the same images alone (Pillow and `CLIPImageProcessorPil`, padded first as
             LLaVA pads), and beside our pixels alone. Turn by turn on the same samples, medians; processor seconds, which other
             programs on the machine do not change much.
 padding     positions and image slots that are empty, packed and unpacked, on VQA-RAD's training questions.
 packers     rows that grain's two packers need for lengths like those of instruction data, by the number of open rows.
 scale       a generated LLaVA file of many records: seconds until it is open, measured and planned, what is kept, and what a
             worker process needs above one that only imports grain.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset, FirstFitPackIterDataset
from PIL import Image

from benchmarks.measure import ROOT, append_row, circumstances
from llavamed_jax.config import preset
from llavamed_jax.datasets.training import TrainingData, read_training
from llavamed_jax.pipeline import lengths, loader
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.pipeline.trial import Trial
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.utils.paths import local

MAX_LENGTH = 2048
WORKER = """
import json, pickle, sys, time

def megabytes():
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024

start = time.process_time()
import grain
if sys.argv[1:]:
    with open(sys.argv[1], "rb") as file:
        make = pickle.load(file)
else:
    iter(grain.MapDataset.range(2).to_iter_dataset())
seconds, ready = time.process_time() - start, megabytes()
if sys.argv[1:]:
    make(0)
print(json.dumps({"seconds": seconds, "megabytes": ready, "megabytes_after_a_batch": megabytes()}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sample = ROOT / "samples" / "vqa_rad"
    parser.add_argument("--root", type=local, default=sample, help="VQA-RAD in its official layout")
    parser.add_argument("--tokenizer", type=local, default=sample / "tokenizer.model")
    parser.add_argument("--preset", default="v15-7b")
    parser.add_argument("--samples", type=int, default=256, help="of the throughput, an eighth at a time")
    parser.add_argument("--records", type=int, default=500_000)
    parser.add_argument("--out", type=local, default=ROOT / "benchmarks" / "results", help="directory of loader.jsonl, to which rows are appended")
    args = parser.parse_args()
    config, tokenizer = preset(args.preset), Tokenizer.load(args.tokenizer)
    processor = Processor(config, tokenizer)
    data = read_training(args.root)
    found = lengths.measure(data, processor, MAX_LENGTH)
    same = dict(preset=args.preset, tokenizer=args.tokenizer.name, data=str(args.root.name), questions=len(data),
                cores=os.cpu_count(), load=round(os.getloadavg()[0], 1), **circumstances())
    write = lambda case, row: append_row(args.out / "loader.jsonl", {"case": case, **row, **same})
    write("throughput", throughput(data, processor, found, args.samples))
    for row in padding(data, found):
        write("padding", row)
    for row in packers(config.tokens_per_image, 4000):
        write("packers", row)
    with tempfile.TemporaryDirectory() as folder:
        write("scale", scale(Path(folder), data, processor, args.records))
    return 0


def throughput(data: TrainingData, processor: Processor, found: lengths.Lengths, count: int) -> dict:
    """Samples a second of processor time, medians over eight parts of the first `count` samples."""
    from transformers import CLIPImageProcessorPil

    size = processor.image_size
    reference = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    plan = plan_of(data, found, 8192)
    rows = [records for _, records in plan.take(0, 0, len(plan.rows(0)))]
    parts = np.array_split(np.concatenate(rows)[:count], 8)
    make = loader.batches(data, processor, plan, MAX_LENGTH)._make

    def transformers_pixels(part):
        for number in part:
            image = Image.open(data.record(int(number))["image"][0]).convert("RGB")
            reference(padded(image), return_tensors="np")["pixel_values"]

    def our_pixels(part):
        for number in part:
            processor.images_uint8(data.record(int(number))["image"])

    def whole_samples(part):
        report = {"skipped": [], "records": [], "seen": 0, "truncated": 0, "surplus": 0, "unsupervised": 0}
        made = [make._sample(int(number), 0, report) for number in part]
        batch = loader.examples.empty_batch(1, MAX_LENGTH * len(part), len(part), size)
        loader.examples.fill_row(batch, 0, made)

    ways = dict(transformers_pixels=transformers_pixels, our_pixels=our_pixels, whole_samples=whole_samples)
    for way in ways.values():
        way(parts[0])
    seconds = {name: [] for name in ways}
    for part in parts:
        for name, way in ways.items():
            seconds[name].append(processor_seconds(lambda way=way, part=part: way(part)) / len(part))
    return {"samples": count, **{f"{name}_a_second": round(1 / statistics.median(times), 1) for name, times in seconds.items()}}


def padded(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square, which its training does before the processor."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def processor_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def plan_of(data: TrainingData, found: lengths.Lengths, row_length: int) -> Plan:
    """Packed rows of a length, or for 0 unpacked rows of MAX_LENGTH."""
    stream = Stream.of(data, 0)
    slots = Trial(stream, found, 9.0).image_slots(row_length) if row_length else found.max_images  # 9: a frozen tower at 7B
    return Plan(stream, found, Layout(row_length or MAX_LENGTH, slots, 1, bool(row_length)))


def padding(data: TrainingData, found: lengths.Lengths) -> list[dict]:
    out = []
    for row_length in (0, 2048, 4096, 8192):
        plan = plan_of(data, found, row_length)
        rows, layout = len(plan.rows(0)), plan.layout
        out.append({"packed": bool(row_length), "row_length": layout.row_length, "image_slots": layout.image_slots, "rows": rows,
                    "mean_length": round(found.mean, 1), "padding": round(1 - found.tokens.sum() / (rows * layout.row_length), 4),
                    "image_padding": round(1 - found.images.sum() / (rows * layout.image_slots), 4)})
    return out


def packers(tokens_per_image: int, count: int) -> list[dict]:
    """One image a sample and texts whose lengths are log-normal about 450 tokens, up to MAX_LENGTH."""
    rng, out = np.random.default_rng(0), []
    tokens = tokens_per_image + rng.lognormal(np.log(450), 0.6, count).clip(10, MAX_LENGTH - tokens_per_image).astype(int)
    for packer in (FirstFitPackIterDataset, BestFitPackIterDataset):
        for row_length in (2048, 8192):
            for bins in (16, 64, 256):
                empty = np.zeros(row_length, bool)
                elements = grain.MapDataset.range(count).map(lambda i, empty=empty: {"tokens": empty[:tokens[i]]})
                elements = elements.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
                start = time.process_time()
                rows = sum(1 for _ in packer(elements, length_struct={"tokens": row_length}, num_packing_bins=bins))
                out.append({"packer": packer.__name__.removesuffix("PackIterDataset"), "row_length": row_length, "bins": bins,
                            "padding": round(1 - tokens.sum() / (rows * row_length), 4),
                            "microseconds_a_sample": round((time.process_time() - start) / count * 1e6, 1)})
    return out


def scale(folder: Path, data: TrainingData, processor: Processor, count: int) -> dict:
    """A file of `count` alignment records of about 700 bytes, all with one image."""
    image = Path(data.record(0)["image"][0])
    file, cache = folder / "large.json", folder / "cache"
    cache.mkdir()
    with open(file, "w", encoding="utf-8") as out:
        for i in range(count):
            words = " ".join(["the image shows a chest with no sign of disease"] * (4 + i % 8))
            turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": words}]
            out.write("[" if not i else ",\n")
            out.write(json.dumps({"id": str(i), "image": image.name, "domain": {"mri": False}, "conversations": turns}))
        out.write("]")
    row = {"records": count, "megabytes": round(file.stat().st_size / 2**20, 1)}
    for name in ("seconds_to_index", "seconds_to_open_again"):
        start = time.process_time()
        large = read_training(file, image.parent, cache=cache)
        row[name] = round(time.process_time() - start, 2)
    measured = min(count, 5 * lengths.BLOCK)  # texts come in eight lengths, so that what these have the others have too
    measure = lengths._Measure(large, processor, MAX_LENGTH)
    parts: list[dict] = []
    seconds = processor_seconds(lambda: parts.extend(measure(block) for block in range(-(-measured // lengths.BLOCK))))
    row["microseconds_to_measure_a_record"] = round(seconds / measured * 1e6, 1)
    first = [np.concatenate([part[name] for part in parts]) for name in ("tokens", "images")]
    found = lengths.Lengths(*(np.resize(part, count) for part in first), [], 0, 0, 0)
    plan = Plan(Stream.of(large, 0), found, Layout(2048, 3, 1, True), cache)
    row["seconds_to_plan_an_epoch"] = round(processor_seconds(lambda: plan.rows(0)), 1)
    row["megabytes_kept"] = round(sum(path.stat().st_size for path in cache.iterdir()) / 2**20, 1)
    return {**row, **worker_overhead(folder, large, processor, plan)}


def worker_overhead(folder: Path, data: TrainingData, processor: Processor, plan: Plan) -> dict:
    """Private memory and processor seconds of a process that is ready to make batches, less those of one with grain alone."""
    make = loader.batches(data, processor, plan, MAX_LENGTH)._make
    (folder / "make.pickle").write_bytes(pickle.dumps(make))
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, folder / "worker.py", *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=environment)
        return json.loads(done.stdout)

    runs = [(run(), run(folder / "make.pickle")) for _ in range(5)]
    middle = lambda part, name: statistics.median(pair[part][name] for pair in runs)
    return {"worker_megabytes_pickled": round((folder / "make.pickle").stat().st_size / 2**20, 1),
            "grain_seconds": round(middle(0, "seconds"), 2), "grain_megabytes": round(middle(0, "megabytes"), 1),
            "worker_extra_seconds": round(middle(1, "seconds") - middle(0, "seconds"), 2),
            "worker_extra_megabytes": round(middle(1, "megabytes") - middle(0, "megabytes"), 1),
            "worker_extra_megabytes_after_a_batch": round(middle(1, "megabytes_after_a_batch") - middle(0, "megabytes_after_a_batch"), 1)}


if __name__ == "__main__":
    raise SystemExit(main())
