"""A run's data: packed rows and what is logged of them, what recipe.json keeps of them, and what cannot be used."""

import json
import math
import os
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llavamed_jax.cli.common import load_config
from llavamed_jax.config import IMAGE_TOKEN, preset
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.pipeline import sizes
from llavamed_jax.training import program, trainer
from llavamed_jax.training.rows import Data
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from llavamed_jax.training.update_rows import packed
from tests.support import training_runs
from tests.support.training_runs import FakeStep, log_lines

PACKED = {"trainable": '["projector/linear_0/kernel"]', "data.packing": True, "data.row_length": 96, "batch_size": 6, "max_length": 40,
          "checkpoint.every_steps": 0}


@pytest.fixture(scope="module")
def recipe(start, data):
    return lambda **changes: training_runs.shrunk(start, data, **{**PACKED, **changes})


@pytest.fixture
def run(monkeypatch):
    """`run(cfg, workdir, devices=1)` -> the batches that its updates got, with a step that computes nothing."""
    def run(cfg, workdir, mesh="data=1", finishes=True):
        step = FakeStep()
        devices = jax.devices()[:int(mesh[-1])]
        monkeypatch.setattr(program, "make_mesh", lambda spec, *_: make_mesh(mesh, devices))
        monkeypatch.setattr(trainer, "make_train_step", step)
        assert fit(cfg, workdir) is finishes
        return [{name: np.asarray(array) for name, array in batch.items()} for batch in step.batches]
    return run


def resolved(workdir):
    return json.loads((workdir / "recipe.json").read_text())["resolved"]


def test_fractions_of_padding_are_those_of_the_batches(recipe, run, tmp_path, capsys):
    batches = run(recipe(total_steps=5), tmp_path / "run")
    lines, samples = log_lines(tmp_path / "run"), 0
    assert len(lines) == len(batches) == 5
    for line, batch in zip(lines, batches, strict=True):
        assert batch["input_ids"].shape == (2, 96)
        assert line["padding_fraction"] == pytest.approx((batch["segment_ids"] == 0).mean())
        slots, images = batch["pixel_values"].shape[:2], (batch["input_ids"] == IMAGE_TOKEN).sum() / 4
        assert line["image_padding_fraction"] == pytest.approx(1 - images / (slots[0] * slots[1]))
        samples += sum(len(set(row[row > 0])) for row in batch["segment_ids"])
        assert line["samples"] == samples
    found = resolved(tmp_path / "run")
    assert (found["row_length"], found["rows"], found["samples"], found["total_steps"]) == (96, 2, 12, 5)
    assert found["image_slots"] == batches[0]["pixel_values"].shape[1] >= 2
    said = capsys.readouterr().out
    assert f"12 samples with a mean of {found['mean_length']} tokens and at most" in said
    assert re.search(rf"packed rows per epoch, each of 96 tokens and {found['image_slots']} images; 2 rows per update", said)


def test_the_number_of_updates_comes_from_the_rows(recipe, run, tmp_path):
    cfg = recipe(epochs=3, total_steps="none")
    batches = run(cfg, tmp_path / "run")
    data = Data.open(cfg, open_start(cfg))
    rows = [len(data.plan.rows(epoch)) for epoch in range(3)]
    assert len(batches) == resolved(tmp_path / "run")["total_steps"] == sum(count // 2 for count in rows) < 3 * 12 // 2


def test_rows_are_kept_on_another_mesh_which_only_adds_empty_ones(recipe, run, tmp_path):
    whole = run(recipe(total_steps=5), tmp_path / "whole")
    first = run(recipe(total_steps=3), tmp_path / "run")
    before = resolved(tmp_path / "run")
    later = run(recipe(total_steps=5), tmp_path / "run", mesh="data=4")
    assert {**resolved(tmp_path / "run"), "total_steps": 3} == before
    assert (len(first), len(later)) == (3, 2) and later[0]["input_ids"].shape == (4, 96)
    for alone, padded in zip(whole[3:], later, strict=True):
        assert all(np.array_equal(alone[name], padded[name][:2]) for name in alone)
        assert not padded["segment_ids"][2:].any()
    strip = lambda line: {k: line[k] for k in ("step", "samples", "tokens")}
    assert list(map(strip, log_lines(tmp_path / "run"))) == list(map(strip, log_lines(tmp_path / "whole")))


def test_unpacked_rows_need_a_batch_that_divides_and_get_empty_rows_later(recipe, run, tmp_path):
    apart = {"data.packing": False, "batch_size": 6}
    with pytest.raises(UsageError, match="'batch_size' is 6; a multiple of 4 was expected"):
        run(recipe(**apart), tmp_path / "run", mesh="data=4")
    whole = run(recipe(**apart, total_steps=2), tmp_path / "whole")
    run(recipe(**apart, total_steps=1), tmp_path / "run")
    later = run(recipe(**apart, total_steps=2), tmp_path / "run", mesh="data=4")
    assert later[0]["input_ids"].shape == (8, 40)
    assert all(np.array_equal(a["input_ids"], b["input_ids"][:6]) for a, b in zip(whole[1:], later, strict=True))


def test_validation_rows_are_packed_too_and_hold_every_sample_once(recipe):
    cfg = recipe()
    cfg.data.validation = cfg.data.train
    data = Data.open(cfg, open_start(cfg))
    batches = list(data.validation_batches())
    assert sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches) == 12
    assert all(batch["input_ids"].shape == (2, 96) for batch in batches)
    assert data.validation_plan.rows(0).records.tolist() == Data.open(cfg, open_start(cfg)).validation_plan.rows(0).records.tolist()


def test_validation_takes_the_rows_of_a_micro_batch_at_a_time(recipe):
    cfg = recipe(batch_size=24, micro_batches=4)
    cfg.data.validation = cfg.data.train
    data = Data.open(cfg, open_start(cfg), make_mesh("data=2"))
    assert data.plan.layout.rows == 8 and data.validation_plan.layout.rows == 2
    batches = list(data.validation_batches())
    assert {batch["input_ids"].shape for batch in batches} == {(2, 96)}
    assert sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in batches) == 12


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_that_no_memory_holds_is_refused(recipe, packing, monkeypatch):
    cfg = recipe(batch_size=10, micro_batches=10, **{"data.packing": packing})
    data = Data.open(cfg, open_start(cfg))
    needed = sum(array.nbytes for name, array in next(data.training_batches()).items() if name != "num_images")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": needed, "SC_PHYS_PAGES": 1}.get)
    Data.open(cfg, open_start(cfg))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": needed - 1, "SC_PHYS_PAGES": 1}.get)
    with pytest.raises(UsageError, match="'batch_size' is 10: an update of 10 rows of .* GB; at most this machine's memory"):
        Data.open(cfg, open_start(cfg))


def test_a_sample_is_no_longer_than_the_decoder_knows_positions(recipe):
    Data.open(recipe(max_length=128, **{"data.row_length": 0}), open_start(recipe()))
    with pytest.raises(UsageError, match="'max_length' is 129; at most 128 was expected"):
        Data.open(recipe(max_length=129), open_start(recipe()))


def test_sample_questions_that_cannot_be_read_are_known_at_the_start(recipe):
    cfg = recipe(samples_every=100, **{"data.samples": "absent.json"})
    with pytest.raises(UserError, match="absent.json does not exist"):
        Data.open(cfg, open_start(cfg))
    cfg.samples_every = 0
    Data.open(cfg, open_start(cfg))


def test_rows_divide_by_devices_and_micro_batches(recipe):
    cfg = recipe(batch_size=36, micro_batches=3)
    layout = Data.open(cfg, open_start(cfg), make_mesh("data=2,fsdp=2,tp=2")).plan.layout
    assert layout.rows % (2 * 2 * 3) == 0 and layout.micro_batches == 3


def test_the_number_of_micro_batches_is_chosen_and_said(recipe, monkeypatch):
    cfg = recipe(micro_batches="auto")
    assert Data.open(cfg, open_start(cfg)).plan.layout.micro_batches == 1
    monkeypatch.setattr(sizes, "AT_A_TIME", 96)
    data = Data.open(cfg, open_start(cfg))
    assert (data.plan.layout.rows, data.plan.layout.micro_batches) == (2, 2)
    assert any(line.endswith("in 2 micro-batches") for line in data.describe())
    settled = {**data.resolved(), "rows": 6}  # of a run on another mesh
    layout = Data.open(cfg, open_start(cfg), make_mesh("data=4"), settled=settled).plan.layout
    assert (layout.rows, layout.padding_rows, layout.micro_batches) == (6, 2, 2)


def test_a_mesh_that_cannot_make_the_batch_is_refused_with_the_ways_that_would(recipe):
    changes = dict(batch_size=13, batch_size_may_grow=False)
    cfg = recipe(**changes, **{"data.row_length": 96})
    with pytest.raises(UsageError) as refused:
        Data.open(cfg, open_start(cfg), make_mesh("data=8"))
    said = re.fullmatch(r"the config key 'batch_size' is 13, but 8 packed rows of 96 tokens on 8 devices \(data x fsdp is 8\) make "
                        r"updates of about (\d+) samples; data.row_length=0, (.*) was expected, or batch_size_may_grow=true to train "
                        r"with what the rows hold", str(refused.value))
    samples, ways = int(said[1]), re.split(", | or ", said[2])
    assert ways == [f"batch_size={samples}", "4 devices"]  # the model has one key/value head, so no tp
    for way, mesh in (({"data.row_length": 0}, "data=8"), (dict(batch_size=samples), "data=8"), ({}, "data=4")):
        taken = recipe(**{"data.row_length": 96, **changes, **way})
        data = Data.open(taken, open_start(taken), make_mesh(mesh))
        made = data.samples_an_update()
        assert abs(made - taken.batch_size) <= 0.1 * taken.batch_size and not any("warning: updates" in line for line in data.describe())
    grown = recipe(batch_size=13, batch_size_may_grow=True)
    data = Data.open(grown, open_start(grown), make_mesh("data=8"))
    assert data.plan.layout.rows == 8 and data.resolved()["samples_an_update"] == round(data.samples_an_update(), 1)
    warning, = (line for line in data.describe() if line.startswith("warning: updates have about"))
    assert f"about {data.samples_an_update():.0f} samples and not 13 (batch_size); the learning rate stays as it is" in warning


def test_256_devices_make_128_conversations_with_tensor_parallelism_only():
    cfg = load_config(f"{training_runs.ROOT}/configs/finetune.py:v15,7b", [])
    of = lambda mesh: packed(cfg, SimpleNamespace(shape=mesh, size=math.prod(mesh.values())), preset("v15-7b"), 1080.0, 2048)
    with pytest.raises(UsageError, match=r"256 packed rows of 2048 tokens on 256 devices \(data x fsdp is 256\) make updates of about "
                                         r"485 samples; mesh.tp=4, batch_size=485 or 64 devices was expected, or batch_size_may_grow"):
        of(dict(data=1, fsdp=256, tp=1))
    for mesh in (dict(data=1, fsdp=64, tp=4), dict(data=8, fsdp=8, tp=1), dict(data=1, fsdp=8, tp=1), dict(data=1, fsdp=1, tp=1)):
        made = of(mesh)
        assert made.is_close and abs(made.samples - 128) <= 12.8, mesh


def test_a_row_length_shorter_than_a_sample_is_a_wrong_value(recipe):
    with pytest.raises(UsageError, match="'data.row_length' is 16, but the longest sample has"):
        Data.open(recipe(**{"data.row_length": 16}), open_start(recipe()))


def test_damaged_records_are_listed_once_and_too_many_stop_the_run(recipe, run, tmp_path, capsys):
    records = json.loads(open(recipe().data.train).read())
    damaged = [{"id": "x"}, 5, {**records[0], "image": "absent.png"}]
    (tmp_path / "train.json").write_text(json.dumps(records + damaged))
    cfg = {"data.train": tmp_path / "train.json", "epochs": 2, "total_steps": "none"}
    run(recipe(**cfg), tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in listed[:2]] == [1, 1] and "record 12 of" in listed[0]["reason"]
    assert sum("absent.png" in str(entry["image"]) for entry in listed[2:]) == len(listed) - 2 >= 1
    last = log_lines(tmp_path / "run")[-1]
    assert last["samples_skipped"] == len(listed) and last["images_skipped"] == 0
    assert "warning: 2 records cannot be used and are listed in skipped.jsonl; the first: record 12 of" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"2 of the 15 samples of .*train.json cannot be used, more than the allowed 10% .*data.skip_limit"):
        run(recipe(**cfg, **{"data.skip_limit": 0.1}), tmp_path / "other")


def test_damaged_records_make_no_set_larger_than_an_update(recipe, tmp_path):
    records = json.loads(open(recipe().data.train).read())
    (tmp_path / "train.json").write_text(json.dumps(records + [5] * 90))
    cfg = recipe(total_steps="none", batch_size=48, epochs=3, **{
        "data.packing": False, "data.train": tmp_path / "train.json", "data.skip_limit": 1.0})
    data = Data.open(cfg, open_start(cfg), make_mesh("data=1"))
    assert (data.total_steps(), data.plan.layout.rows) == (3, 12)


@pytest.mark.parametrize("changes, devices", [
    ({"data.packing": False, "micro_batches": "auto"}, 8), ({"data.packing": False, "micro_batches": 2}, 1),
    ({"data.row_length": 0}, 8), ({"data.row_length": 96, "micro_batches": 3}, 2)])
def test_a_set_smaller_than_an_update_is_trained_as_often_as_epochs_say(recipe, changes, devices):
    """Each epoch is one update of all samples, as HF's Trainer has it; `total_steps` counts updates of `batch_size`."""
    changes = {"batch_size": 48, "epochs": 3, "batch_size_may_grow": False, **changes}
    cfg = recipe(total_steps="none", **changes)
    data = Data.open(cfg, open_start(cfg), make_mesh(f"data={devices}"))
    assert data.total_steps() == 3
    batches = data.training_batches()
    trained = [int(next(batches)["segment_ids"].max(axis=1).sum()) for _ in range(3)]
    batches.close()
    layout = data.plan.layout
    assert abs(sum(trained) - 36) <= (3 if layout.is_packed else 0)  # another epoch may have a row less
    assert (layout.rows + layout.padding_rows) % (devices * layout.micro_batches) == 0
    warning, = (line for line in data.describe() if "batch_size" in line and line.startswith("warning"))
    assert warning == "warning: an epoch has 12 samples, fewer than 48 (batch_size): each epoch is one update, of all of them"
    again = Data.open(cfg, open_start(cfg), make_mesh("data=1"), settled={**data.resolved(), "micro_batches": 1})
    assert again.plan.layout.rows == layout.rows
    cfg = recipe(total_steps=3, **{**changes, "batch_size_may_grow": True})
    data = Data.open(cfg, open_start(cfg), make_mesh("data=1"))
    assert data.samples_an_update() == pytest.approx(48, rel=0.1)
