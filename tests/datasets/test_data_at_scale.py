"""Data as it comes: hundreds of damaged samples of every kind, files of many records, and workers that stay small."""

import json
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.config import preset
from llavamed_jax.datasets import records
from llavamed_jax.datasets.training import TrainingData, read_training
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.pipeline import lengths, loader
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.processor import Processor

ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH = 160


def turns(question, answer="so it is"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def images(folder: Path) -> Path:
    folder.mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    for name, content in {"cut.png": whole[:len(whole) // 2], "empty.png": b"", "text.png": b"Dear reader,\n" * 9, "bomb.png": bomb(),
                          "flipped.png": whole[:60] + bytes(b ^ 0xFF for b in whole[60:200]) + whole[200:]}.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    Image.new("RGB", (3000, 2)).save(folder / "long.png")
    return folder


# Kind of damage -> record. First those that are known from the text alone, then those that only reading the image shows.
NO_RECORD = {
    "a number": 7, "null": None, "a list": [1], "nothing": {}, "no turns": {"conversations": []}, "turns of text": {"conversations": "hi"},
    "no value": {"conversations": [{"from": "human"}]}, "null as value": {"conversations": turns("hi", None)},
    "a list as value": {"conversations": turns(["hi"])}, "a robot": {"conversations": [{"from": "robot", "value": "x"}]},
    "two questions": {"conversations": [{"from": "human", "value": "x"}] * 2},
    "an image by number": {"image": 5, "conversations": turns("<image>")},
    "images by number": {"image": [5], "conversations": turns("<image>")}, "an image too few": {"conversations": turns("<image> what?")},
    "three markers": {"image": "good.png", "conversations": turns("<image><image>") + turns("<image>")},
    "an empty question": {"conversations": turns("")}, "half a surrogate": {"conversations": turns("\ud800")},
    "half a surrogate in a name": {"image": "\ud800.png", "conversations": turns("<image>")},
}
NO_IMAGE = {name: {"image": name, "conversations": turns("<image>\nwhat?")} for name in (
    "absent.png", "cut.png", "empty.png", "text.png", "bomb.png", "folder.png", "long.png", "\0.png", "x" * 300)}
# What is mended instead: counted, and trained.
MENDED = {
    "too long": ({"image": "good.png", "conversations": turns("<image>\nwhat?", "long " * 300)}, "truncated"),
    "too many images": ({"image": ["good.png"] * 9, "conversations": turns("<image>" * 9)}, "surplus"),
    "an image too many": ({"image": ["good.png", "absent.png"], "conversations": turns("<image>")}, "surplus"),
    "no answer": ({"conversations": turns("what?")[:1]}, "unsupervised"),
    "an empty answer": ({"image": "good.png", "conversations": turns("<image>", "")}, None),
    "the other spelling": ({"image": "good.png", "conversatons": turns("<image>", 5)}, None),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Two hundred damaged records and thirty that are mended among three hundred good ones, in a file each form."""
    folder = tmp_path_factory.mktemp("damaged")
    images(folder / "images")
    kinds = list({**NO_RECORD, **NO_IMAGE}.items())
    bad = [(kind, row) for i in range(200) for kind, row in [kinds[i % len(kinds)]]]
    mended = [(kind, row) for kind, (row, _) in MENDED.items() for _ in range(5)]
    good = [("good", {"image": "good.png", "conversations": turns(f"<image>\nquestion {i}")}) for i in range(300)]
    everything = bad + mended + good
    order = np.random.default_rng(0).permutation(len(everything))
    rows = [({**row, "id": f"{kind} {i}"} if isinstance(row, dict) else row, kind) for i, (kind, row) in enumerate(everything)]
    rows = [rows[i] for i in order]
    (folder / "list.json").write_text(json.dumps([row for row, _ in rows]))
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in rows) + '{"id": "torn", "conver')
    return folder, [kind for _, kind in rows]


@pytest.mark.parametrize("file, workers", [("list.json", 0), ("lines.jsonl", 1)])
def test_two_hundred_damaged_samples_are_skipped_counted_and_listed(processor, damaged, file, workers):
    folder, kinds = damaged
    data = read_training(folder / file, folder / "images")
    found = lengths.measure(data, processor, MAX_LENGTH)
    torn = int(file == "lines.jsonl")
    without_record, without_image = sum(kind in NO_RECORD for kind in kinds), sum(kind in NO_IMAGE for kind in kinds)
    assert without_record + without_image == 200
    assert len(found.damaged) == without_record + torn and found.usable == len(kinds) - without_record
    assert [found.tokens[i] > 0 for i in range(len(kinds))] == [kind not in NO_RECORD for kind in kinds]
    plan = Plan(Stream.of(data, 0), found, Layout(4 * MAX_LENGTH, 8, 4, True))
    batches = loader.batches(data, processor, plan, MAX_LENGTH, num_workers=workers, epochs=1)
    samples = sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches)
    assert samples == 330 and len(batches.skipped) == 200 + torn
    listed = [entry for entry in batches.skipped if entry["image"]]
    assert len(listed) == without_image and all(entry["epoch"] == 0 and entry["reason"] for entry in listed)
    assert {str(entry["id"]).rsplit(" ", 1)[0] for entry in listed} == set(NO_IMAGE)
    assert batches.truncated == found.truncated == 10 and batches.surplus == found.surplus == 5 * (9 - MAX_LENGTH // 36) + 5
    assert batches.unsupervised == found.unsupervised and found.unsupervised >= 5
    json.dumps(batches.skipped)


def test_reasons_name_record_and_file(processor, damaged):
    folder, kinds = damaged
    found = lengths.measure(read_training(folder / "list.json", folder / "images"), processor, MAX_LENGTH)
    for entry in found.damaged:
        assert "\n" not in entry["reason"] and ("record" in entry["reason"])


def test_lengths_of_large_data_are_measured_in_workers_and_kept(processor, damaged, tmp_path, monkeypatch):
    folder, _ = damaged
    data = read_training(folder / "list.json", folder / "images")
    here = lengths.measure(data, processor, MAX_LENGTH)
    assert lengths.BLOCK < data.num_records < 2 * lengths.BLOCK, "two blocks"
    monkeypatch.setattr(lengths, "LARGE", 10)
    there = lengths.measure(data, processor, MAX_LENGTH, num_workers=1, cache=tmp_path)
    monkeypatch.setattr(lengths, "_Measure", None)  # is not called again
    kept = lengths.measure(data, processor, MAX_LENGTH, cache=tmp_path)
    for found in (there, kept):
        arrays = ("tokens", "images", "lost")
        assert all(np.array_equal(getattr(found, name), getattr(here, name)) for name in arrays) and here.lost.any() and here.first_lost
        assert {k: v for k, v in vars(found).items() if k not in arrays} == {k: v for k, v in vars(here).items() if k not in arrays}
    with pytest.raises(TypeError):
        lengths.measure(data, processor, MAX_LENGTH + 1, cache=tmp_path)
    other = Processor(preset("small"), processor.tokenizer, template="up:vicuna_v1")
    with pytest.raises(TypeError):
        lengths.measure(data, other, MAX_LENGTH, cache=tmp_path)
    twice = TrainingData([*data.sources, *data.sources], [1.0, 1.0])
    lines = read_training(folder / "lines.jsonl", folder / "images")
    for others in (twice, lines):
        with pytest.raises(TypeError):
            lengths.measure(others, processor, MAX_LENGTH, cache=tmp_path)
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(TypeError):  # what was damaged is measured anew
        lengths.measure(data, processor, MAX_LENGTH, cache=tmp_path)


def test_data_that_changed_after_it_was_measured_stops_the_run(processor, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"conversations": turns("what?")}] * 4))
    data = read_training(file)
    plan = Plan(Stream.of(data, 0), lengths.measure(data, processor, 64), Layout(64, 0, 2, False))
    file.write_text(json.dumps([{"conversations": turns("w  t?")}] * 4))
    with pytest.raises(UserError, match="tokens and 0 images, but had .* when the data was measured"):
        next(loader.batches(data, processor, plan, 64))


def test_a_length_that_holds_no_image_is_refused(processor, damaged):
    folder, _ = damaged
    rows = records.MemoryRecords([{"id": 1, "image": [str(folder / "images" / "good.png")], "conversations": turns("<image>")}])
    with pytest.raises(UsageError, match="'max_length' is 30, but one image takes 36 tokens"):
        lengths.measure(TrainingData([rows]), processor, 30)


# ---- workers ----

WORKER = """
    import json, resource, sys, time

    def memory():
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024

    start = time.process_time()
    import grain
    if sys.argv[1:]:
        import pickle
        with open(sys.argv[1], "rb") as file:
            make = pickle.load(file)
        batch, report = make(0)
        assert batch["input_ids"].any()
    else:
        iter(grain.MapDataset.range(2).map(str).to_iter_dataset())
    print(json.dumps({"seconds": time.process_time() - start, "megabytes": memory()}))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux's /proc for memory")
def test_a_worker_is_little_more_than_grain(processor, damaged, tmp_path):
    """A worker's process with the batch maker of 50,000 records, after its first batch, beside one that only imports grain."""
    import pickle

    folder, _ = damaged
    rows = [{"id": str(i), "image": "good.png", "conversations": turns(f"<image>\nquestion {i}", "a b c d " * 20)} for i in range(50_000)]
    (tmp_path / "large.json").write_text(json.dumps(rows))
    data = read_training(tmp_path / "large.json", folder / "images")
    found = lengths.Lengths(np.full(50_000, 123, np.int32), np.ones(50_000, np.int16), [], 0, 0, 0)
    example = lengths.examples.tokenize(data.record(7), processor, MAX_LENGTH)
    found.tokens[:] = [len(example.ids) + len(str(i)) - 1 for i in range(50_000)]
    plan = Plan(Stream.of(data, 0), found, Layout(MAX_LENGTH, 1, 4, False))
    plan.rows(0)
    make = loader.batches(data, processor, plan, MAX_LENGTH)._make
    (tmp_path / "make.pickle").write_bytes(pickle.dumps(make))
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))

    def run(*words):
        done = subprocess.run([sys.executable, tmp_path / "worker.py", *words], capture_output=True, text=True, cwd=ROOT,
                              env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    bare, worker = run(), run(tmp_path / "make.pickle")
    assert worker["megabytes"] - bare["megabytes"] < 50
    assert worker["seconds"] - bare["seconds"] < 1.0  # half a second on a machine that nothing else uses


@pytest.mark.slow
def test_the_benchmark_runs_in_small(tmp_path):
    subprocess.run([sys.executable, ROOT / "benchmarks" / "loader.py", "--records", "3000", "--samples", "16", "--out", tmp_path],
                   check=True, capture_output=True, cwd=ROOT)
    rows = [json.loads(line) for line in (tmp_path / "loader.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"throughput", "padding", "packers", "scale"}
    unpacked, *packed = [row for row in rows if row["case"] == "padding"]
    assert all(row["padding"] < 0.3 * unpacked["padding"] for row in packed)
