"""The pipeline: rows, an order that depends on seed and epoch alone, resuming, broken images, and processes that end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
from llavamed_jax.datasets.records import MemoryRecords
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UserError
from llavamed_jax.pipeline import examples, lengths, loader
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer

P, SIZE, T = 36, 96, 96  # of preset:small, and the rows of these tests
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for i in range(3):
        Image.new("RGB", (10 + i, 10), (80 * i,) * 3).save(path / f"{i}.png")
    (path / "broken.png").write_bytes(b"\x89PNG nothing")
    return path


def record(i, images=(), answer="an answer"):
    marks = "<image>\n" * len(images)
    return {"id": i, "image": [str(image) for image in images], "conversations": [
        {"from": "human", "value": f"{marks}number {i}"}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def data(folder):
    """Ten samples: with no image, one image, or two."""
    return made([[record(i, [folder / f"{j}.png" for j in range(i % 3)]) for i in range(10)]])


def made(sources, weights=None):
    return TrainingData([MemoryRecords(source) for source in sources], weights or [1.0] * len(sources))


def batches_of(data, processor, rows, length, *, seed=0, shuffle=True, workers=0, packed=False, **arguments):
    """One sample a row, unless `packed`."""
    found = lengths.measure(data, processor, length)
    slots = found.max_images * (3 if packed else 1)
    plan = Plan(Stream.of(data, seed, shuffle), found, Layout(3 * length if packed else length, slots, rows, packed))
    return loader.batches(data, processor, plan, length, num_workers=workers, **arguments)


def numbers(processor, batch):
    """Which sample each row holds; None for padding."""
    texts = [processor.decode(row[row > 0]) for row in batch["input_ids"]]
    return [int(text.split("number ")[1].split()[0]) if text else None for text in texts]


def take(iterator, count=None):
    out = []
    for batch in iterator:
        out.append({name: np.array(array) for name, array in batch.items()})
        if len(out) == count:
            break
    return out


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- rows ----


def test_row_form(processor, data):
    batch, = take(batches_of(data, processor, 10, T, epochs=1, shuffle=False))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "input_ids": ((10, T), "int32"), "labels": ((10, T), "int32"), "positions": ((10, T), "int32"),
        "segment_ids": ((10, T), "int32"), "pixel_values": ((10, 2, SIZE, SIZE, 3), "uint8"), "num_images": ((10,), "int32")}
    assert numbers(processor, batch) == list(range(10))
    for i in range(10):
        ids, labels = processor.expand(*processor.training_example(data.sources[0][i]["conversations"], num_images=i % 3))
        n = len(ids)
        assert batch["input_ids"][i].tolist() == ids + [0] * (T - n)
        assert batch["labels"][i].tolist() == labels + [IGNORE] * (T - n)
        assert batch["positions"][i].tolist() == [*range(n), *[0] * (T - n)]
        assert batch["segment_ids"][i].tolist() == [1] * n + [0] * (T - n)
        assert batch["num_images"][i] == i % 3 and (batch["input_ids"][i] == IMAGE_TOKEN).sum() == P * (i % 3)
        np.testing.assert_array_equal(batch["pixel_values"][i, :i % 3], processor.images_uint8(data.sources[0][i]["image"]))
        assert not batch["pixel_values"][i, i % 3:].any()


def test_a_run_without_images_carries_none(processor):
    batch, = take(batches_of(made([[record(0)]]), processor, 2, T, epochs=1))
    assert "pixel_values" not in batch and numbers(processor, batch) == [0, None]


@pytest.mark.parametrize("length, kept", [(3, 3), (4, 4), (10, 5), (40, 5), (41, 41), (42, 42), (45, 42), (78, 78), (100, 80)])
def test_cut_never_leaves_part_of_an_image(length, kept):
    ids = [1] * 5 + [IMAGE_TOKEN] * 36 + [1] + [IMAGE_TOKEN] * 36 + [1] * 2
    assert examples.cut(ids, length, 36) == kept


def test_a_cut_sample_is_counted_and_leaves_its_second_image_out(processor, folder):
    data = made([[record(0, [folder / "0.png", folder / "broken.png"])]])
    batches = batches_of(data, processor, 1, 60, epochs=1)
    batch, = take(batches)
    assert batch["num_images"].tolist() == [1] and (batch["input_ids"] == IMAGE_TOKEN).sum() == P
    assert (batches.truncated, batches.unsupervised, batches.skipped) == (1, 1, [])


def test_a_conversation_that_the_template_cannot_hold_names_its_record(processor):
    broken = {"id": "r7", "image": [], "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]}
    with pytest.raises(UserError, match="record 'r7': the template v1.5:mistral_instruct needs a first message"):
        next(batches_of(made([[broken]]), processor, 1, T))


@pytest.mark.parametrize("arguments, sentence", [
    (dict(rows=1, length=P), "one image takes 36 tokens")])
def test_bad_arguments(processor, data, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        batches_of(data, processor, **{"length": T, **arguments})


# ---- order ----


def test_every_epoch_shows_every_sample_once_in_another_order(processor, data):
    shown = [n for batch in take(batches_of(data, processor, 4, T, seed=5), 10) for n in numbers(processor, batch)]
    epochs = [shown[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other, = take(batches_of(data, processor, 10, T, seed=6), 1)
    assert numbers(processor, other) != epochs[0]


def test_the_last_batch_is_filled_up_with_padding(processor, data):
    batches = take(batches_of(data, processor, 4, T, epochs=1))
    assert sorted(n for b in batches for n in numbers(processor, b) if n is not None) == list(range(10))
    assert numbers(processor, batches[-1])[2:] == [None, None]
    assert not batches[-1]["segment_ids"][2:].any() and (batches[-1]["labels"][2:] == IGNORE).all()


def test_weights_are_shares_of_an_epoch(processor):
    data = made([[record(i) for i in range(4)], [record(10 + i) for i in range(3)]], [0.5, 2.0])
    batches = take(batches_of(data, processor, len(data), T), 4)
    epochs = [numbers(processor, batch) for batch in batches]
    for epoch in epochs:
        assert sorted(n for n in epoch if n >= 10) == [10, 10, 11, 11, 12, 12]
        assert len([n for n in epoch if n < 10]) == 2
    for first in (0, 2):  # half a source an epoch: two epochs walk through it once
        assert sorted(n for epoch in epochs[first:first + 2] for n in epoch if n < 10) == [0, 1, 2, 3]


def test_processes_share_each_batch(processor, data):
    whole = take(batches_of(data, processor, 4, T, seed=1), 5)
    shares = [0, 3], [1, 2]  # as a mesh may lie on a slice
    parts = [take(batches_of(data, processor, 4, T, seed=1, part=part), 5) for part in shares]
    assert_equal(whole, [{name: np.concatenate([a[name], b[name]])[np.argsort(sum(shares, []))] for name in a}
                         for a, b in zip(*parts, strict=True)])


def test_batches_do_not_depend_on_workers_and_resuming_is_seamless(processor, data):
    whole, before = take(batches_of(data, processor, 3, T, seed=2), 9), set(active_children())
    with_workers = batches_of(data, processor, 3, T, seed=2, workers=2)
    assert_equal(whole[:4], take(with_workers, 4))
    state = json.loads(json.dumps(with_workers.state()))
    assert (state["epoch"], state["row"], state["samples"], state["seed"]) == (1, 2, 10, 2)
    assert len(set(active_children()) - before) == 2
    with_workers.close()
    assert not set(active_children()) - before
    for workers in (0, 1):
        resumed = batches_of(data, processor, 3, T, seed=2, workers=workers)
        resumed.restore(state)
        assert_equal(whole[4:], take(resumed, 5))
        assert resumed.state() == {**state, "epoch": 2, "row": 7}
        resumed.close()


def test_a_finished_stream_stays_finished(processor, data):
    batches = batches_of(data, processor, 4, T, epochs=2)
    assert len(take(batches)) == 5
    assert batches.state()["epoch"] == 2
    again = batches_of(data, processor, 4, T, epochs=2)
    again.restore(batches.state())
    assert take(again) == []


def test_state_of_other_data_is_refused(processor, data):
    batches = batches_of(data, processor, 2, T, seed=1)
    with pytest.raises(UserError, match="other data: samples was 11 and is 10 now"):
        batches.restore({**batches.state(), "samples": 11})
    with pytest.raises(UserError, match="seed was 3 and is 1 now"):
        batches.restore({**batches.state(), "seed": 3})
    with pytest.raises(UserError, match="row_length was 50 and is 96 now"):
        batches.restore({**batches.state(), "row_length": 50})
    longer = made([[record(i, answer="a longer answer") for i in range(10)]])
    with pytest.raises(UserError, match="other data: the lengths of the samples differ; the same data"):
        batches.restore(batches_of(longer, processor, 2, T, seed=1).state() | {"image_slots": 2})


# ---- broken images ----


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_skipped_and_listed(processor, folder, workers):
    records = [record(i, [folder / "0.png"]) for i in range(6)]
    records[2]["image"], records[4]["image"] = [str(folder / "broken.png")], [str(folder / "nowhere.png")]
    seen = []
    batches = batches_of(made([records]), processor, 3, T, epochs=1, shuffle=False, workers=workers,
                             on_skip=seen.append, skip_limit=0.4)
    rows = [numbers(processor, batch) for batch in take(batches)]
    batches.close()
    assert rows == [[0, 1, None], [3, None, 5]]
    assert seen == batches.skipped and [(s["id"], s["epoch"], Path(s["image"]).name) for s in seen] == [
        (2, 0, "broken.png"), (4, 0, "nowhere.png")]
    assert "not an image" in seen[0]["reason"] and "does not exist" in seen[1]["reason"]


def test_a_damaged_record_is_listed_at_the_beginning_of_a_run_and_never_again(processor):
    damaged = {**record("r7"), "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "x"}]}
    first, again = (batches_of(made([[record(0), damaged, record(2), record(3)]]), processor, 1, T) for _ in range(2))
    take(first, 5)  # into the second epoch
    assert [(entry["id"], entry["epoch"]) for entry in first.skipped] == [("r7", None)]
    again.restore(first.state())
    take(again, 5)
    assert not again.skipped


def test_too_many_broken_images_stop_the_run(processor, folder):
    records = [record(i, [folder / "broken.png"]) for i in range(6)]
    with pytest.raises(UserError, match="3 of the first 3 samples have an unreadable image, more than the allowed 40% .* not an image"):
        next(batches_of(made([records]), processor, 3, T, skip_limit=0.4))


def test_broken_samples_of_one_id_are_counted_each(processor, folder):
    records = [{**record(i, [folder / "broken.png"]), "id": "same"} for i in range(6)]
    with pytest.raises(UserError, match="3 of the first 3 samples have an unreadable image"):
        next(batches_of(made([records]), processor, 3, T, skip_limit=0.4))


def test_an_epoch_that_teaches_nothing_stops_the_run(processor, folder):
    silent = [{**record(i), "conversations": record(i)["conversations"][:1]} for i in range(4)]
    for records in (silent, [record(0, [folder / "broken.png"])]):
        with pytest.raises(UserError, match=f"none of the {len(records)} samples of an epoch has a supervised token"):
            take(batches_of(made([records]), processor, 2, T, skip_limit=1.0))


@pytest.mark.parametrize("template, answer, length, why", [
    (None, None, T, "record 1 has no answer or an empty answer"), (None, "", T, "record 1 has no answer or an empty answer"),
    (None, "an answer", 9, "record 1 is cut at 9 tokens, before or within its answer"),
    (None, "one </s> two", T, "the template v1.5:mistral_instruct does not find the answers of record 1: the text contains a special token"),
    ("up:vicuna_v1", "one </s> two", T, "the template up:vicuna_v1 does not find the answers of record 1: the text contains a special token")])
def test_why_nothing_is_learnt_of_a_sample(processor, mistral_tokenizer, template, answer, length, why):
    """LLaVA's "tokenization mismatch" (its issues 375, 779, 1166, 1706), which trains at a loss of 0 there."""
    here = Processor(preset("small"), Tokenizer.load(mistral_tokenizer), template) if template else processor
    records = [record(0), {**record(1), "conversations": record(1, answer=answer)["conversations"][:1 if answer is None else 2]}]
    found = lengths.measure(made([records]), here, length)
    assert found.unsupervised == (2 if length < T else 1)
    assert why.replace("record 1", "record 0" if length < T else "record 1") in found.first_unsupervised
    with pytest.raises(UserError, match="none of the 1 samples of an epoch has a supervised token: .*record"):
        take(batches_of(made([records[1:]]), here, 1, length, skip_limit=1.0))


def test_one_broken_sample_counts_once_over_the_epochs(processor, folder):
    records = [record(0, [folder / "broken.png"]), record(1, [folder / "0.png"])]
    batches = batches_of(made([records]), processor, 2, T, epochs=3)
    assert len(take(batches)) == 3 and len(batches.skipped) == 3


# ---- processes ----

PROGRAM = """
    import os, signal, sys, time
    from multiprocessing import active_children

    from llavamed_jax.config import preset
    from llavamed_jax.pipeline import lengths, loader
    from llavamed_jax.datasets.training import TrainingData
    from llavamed_jax.pipeline.packing import Layout, Plan, Stream
    from llavamed_jax.processor import Processor
    from llavamed_jax.datasets.records import MemoryRecords
    from llavamed_jax.text.tokenizer import Tokenizer
    from llavamed_jax.utils import child_processes

    child_processes.SEGMENT = "@NAME@"  # in the workers too, which import this file

    def main():
        records = [{"id": i, "image": ["IMAGE"], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]}
                   for i in range(8)]
        data, processor = TrainingData([MemoryRecords(records)]), Processor(preset("small"), Tokenizer.load(TOKENIZER))
        found = lengths.measure(data, processor, 64)
        plan = Plan(Stream.of(data, 0), found, Layout(64, 1, 2, False))
        batches = loader.batches(data, processor, plan, 64, num_workers=int(sys.argv[1]))
        kept = [next(batches), next(batches)]  # of two workers one each; still held when the program ends
        for child in active_children():
            os.kill(child.pid, signal.SIGINT), os.kill(child.pid, signal.SIGTERM)
        for _ in range(6):  # more than were made before the signals
            next(batches)
        print(*(child.pid for child in active_children()), flush=True)
        if sys.argv[2] == "killed":
            time.sleep(60)
        return batches, kept

    if __name__ == "__main__":
        held = main()
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux's /proc which processes run")
@pytest.mark.parametrize("count, end", [(1, "return"), (2, "killed")])
def test_worker_processes_end_with_the_program(mistral_tokenizer, folder, tmp_path, count, end):
    """A plain program: its workers outlive signals that are meant for it, and never itself, even killed; nor does
    the shared memory through which they hand on batches."""
    prefix = f"lm{os.getpid() % 10**6}{end[0]}"  # names of segments are short
    segments = lambda: [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
    script = tmp_path / "program.py"
    program = textwrap.dedent(PROGRAM).replace("TOKENIZER", repr(str(mistral_tokenizer)))
    script.write_text(program.replace("@NAME@", prefix).replace("IMAGE", str(folder / "0.png")))
    program = subprocess.Popen([sys.executable, script, str(count), end], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == count
    if end == "killed":
        assert all(map(is_running, workers)) and segments()
        program.send_signal(signal.SIGKILL)
    _, err = program.communicate(timeout=60)
    assert program.returncode == {"return": 0, "killed": -signal.SIGKILL}[end], err
    if end == "return":
        assert not err  # grain's destructors have nothing left to complain about
    deadline = time.time() + 10
    while (any(map(is_running, workers)) or segments()) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers)) and not segments()
