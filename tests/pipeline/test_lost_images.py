"""Images that records name and nothing is trained on: counted, printed, and beyond the limit a reason to stop."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from llavamed_jax.checkpoints.tree import store
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import during_training
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.pipeline.lengths import Lengths
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.pipeline.skips import SkipLimit
from llavamed_jax.training import program, trainer
from llavamed_jax.training.rows import Data
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs
from tests.support.training_runs import SAMPLE, FakeStep

IMAGE = next(iter(sorted((SAMPLE / "images").iterdir()))).name
PACKED = {"data.packing": True, "data.row_length": 64}


def record(question="<image>\nis it?", answer="yes", **fields):
    return {"id": question, **fields, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def twice(first, second, image):
    """A record of two questions, the first with an answer longer than a sample may be."""
    return {**record(first, "yes " * 60, image=image),
            "conversations": [*record(first, "yes " * 60)["conversations"], *record(second)["conversations"]]}


GOOD, TEXT = record(image=IMAGE), record("is it text?")
# Kind -> a record that loses images, and what is said of it.
LOST = {
    "no marker": (record("is it?", image=IMAGE), "record 'is it?' names 1 image but has 0 <image> markers"),
    "no marker for a list": (record("is it?", image=[IMAGE]), "names 1 image but has 0 <image> markers"),
    "fewer markers": (record("<image> is it?", image=[IMAGE] * 3), "names 3 images but has 1 <image> marker"),
    "a marker in a first answer that is dropped": (
        {**GOOD, "conversations": [{"from": "gpt", "value": "<image>"}, *record("is it?")["conversations"]]}, "has 0 <image> markers"),
    "another key": (record("is it?", images=[IMAGE]), "names 1 image but has 0 <image> markers"),
    "beyond the cut": (twice("is it", "<image> is it?", IMAGE), "is cut at 40 tokens, which removes 1 image"),
    "one of two beyond the cut": (twice("<image> is it", "<image> is it?", [IMAGE, IMAGE]), "is cut at 40 tokens, which removes 1 image"),
}


def kinds(*packed):
    """Every kind with a sample a row, and some in packed rows: what a record loses is found before its row is."""
    return [*(({"data.packing": False}, kind) for kind in LOST), *((PACKED, kind) for kind in packed)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return runs.write_start(tmp_path_factory.mktemp("start") / "start")


@pytest.fixture
def recipe(start, tmp_path):
    """`recipe(records, **keys)`: with these training records."""
    def recipe(records, **changes):
        (tmp_path / "train.json").write_text(json.dumps(records))
        return runs.shrunk(start, tmp_path, **changes)
    return recipe


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(program, "make_mesh", lambda spec, *_: make_mesh(spec, jax.devices()[:1]))


def opened(cfg):
    return Data.open(cfg, open_start(cfg))


@pytest.mark.parametrize("packing, kind", kinds("no marker"))
def test_beyond_the_limit_the_run_does_not_start(recipe, packing, kind, tmp_path):
    lossy, reason = LOST[kind]
    with pytest.raises(UserError, match=r"5 of the 8 samples of .*train.json lose images, .*more than the allowed 50% .*data.skip_limit") as error:
        fit(recipe([GOOD, TEXT, GOOD, *[lossy] * 5], **packing), tmp_path / "run")
    assert reason in str(error.value) and not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize("packing, kind", kinds("no marker", "fewer markers", "one of two beyond the cut"))
def test_within_the_limit_they_are_named_and_counted(recipe, packing, kind):
    lossy, reason = LOST[kind]
    data = opened(recipe([*[GOOD] * 9, lossy, TEXT], **packing, batch_size=1))
    lost, said = {"fewer markers": 2}.get(kind, 1), "\n".join(data.describe())
    assert f"warning: {lost} images are left out" in said and reason in said
    with contextlib.closing(data.training_batches()) as batches:
        while batches.seen < 11:
            next(batches)
    assert (batches.seen, batches.surplus) == (11, lost), "an epoch"


def test_a_run_prints_and_logs_how_many_are_left_out(recipe, tmp_path, monkeypatch, capsys):
    lossy, reason = LOST["fewer markers"]
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    assert fit(recipe([*[GOOD] * 9, lossy, TEXT], epochs=1, total_steps="none", batch_size=1), tmp_path / "run")
    said = capsys.readouterr().out
    assert "warning: 2 images are left out" in said and reason in said and "2 images left out" in said.splitlines()[-1]
    assert runs.log_lines(tmp_path / "run")[-1]["images_skipped"] == 2


def test_among_text_the_share_of_the_images_counts(recipe):
    """Two in ten samples are few; all images are not."""
    lossy = LOST["no marker"][0]
    with pytest.raises(UserError, match="2 of the 2 images of .* are left out, because they have no <image> marker"):
        opened(recipe([*[TEXT] * 8, lossy, lossy]))
    opened(recipe([*[TEXT] * 6, GOOD, GOOD, lossy, lossy]))
    with pytest.raises(UserError, match="4 of the 6 images of"):
        opened(recipe([*[TEXT] * 6, GOOD, GOOD, *[lossy] * 4]))
    opened(recipe([*[TEXT] * 8, lossy, lossy], **{"data.skip_limit": 1.0}))


def test_a_marker_without_an_image_is_no_sample(recipe):
    bare = record("<image> is it?")
    with pytest.raises(UserError, match="6 of the 11 samples of .* cannot be used.*0 images for 1 <image> markers"):
        opened(recipe([*[GOOD] * 5, *[bare] * 6]))
    with pytest.raises(UserError, match="3 of the 11 samples of .* lose images and 3 cannot be used, .*has 0 <image> markers"):
        opened(recipe([*[GOOD] * 5, *[bare] * 3, *[LOST["no marker"][0]] * 3]))
    lines = opened(recipe([*[GOOD] * 9, bare, LOST["no marker"][0]])).describe()
    assert any("1 records cannot be used" in line for line in lines) and any("1 images are left out" in line for line in lines)


def test_a_source_counts_by_its_weight(recipe, tmp_path):
    """One lossy record in eleven, and nine samples in nineteen."""
    (tmp_path / "lossy.json").write_text(json.dumps([LOST["no marker"][0]]))
    def mixed(weight, **changes):
        cfg = recipe([GOOD] * 10, **changes)
        with cfg.ignore_type():
            cfg.data.train = [{"path": str(tmp_path / "train.json")}, {"path": str(tmp_path / "lossy.json"), "weight": weight}]
        return opened(cfg)
    mixed(9)
    with pytest.raises(UserError, match="11 of the 21 samples of .* lose images"):
        mixed(11)
    with pytest.raises(UserError, match="9 of the 19 samples of .* lose images, .*more than the allowed 40%"):
        mixed(9, **{"data.skip_limit": 0.4})


@pytest.mark.parametrize("key, kind", [*(("data.validation", kind) for kind in LOST), ("data.samples", "no marker"),
                                       ("data.samples", "beyond the cut")])
def test_validation_and_sample_data_are_held_to_the_limit(recipe, tmp_path, key, kind):
    lossy, reason = LOST[kind]
    def data(records):
        (tmp_path / "other.json").write_text(json.dumps(records))
        return opened(recipe([GOOD] * 4, samples_every=2, **{key: tmp_path / "other.json"}))
    with pytest.raises(UserError, match="2 of the 3 samples of .*other.json lose images") as error:
        data([GOOD, lossy, lossy])
    assert reason in str(error.value)
    which = key.removeprefix("data.").removesuffix("s")
    assert any(line.startswith("warning: ") and f"{which} images are left out" in line for line in data([GOOD] * 5 + [lossy]).describe())


def test_broken_images_add_to_those_that_are_lost(recipe, tmp_path):
    """Three of ten lose an image and three cannot be read: neither is too much, both are."""
    shutil.copytree(SAMPLE / "images", tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    records = [*[GOOD] * 4, *[LOST["no marker"][0]] * 3, *[record(image="broken.png")] * 3]
    for limit, is_enough in ((0.5, False), (0.6, True)):
        keys = {"data.images": tmp_path / "images", "data.skip_limit": limit}
        batches = opened(recipe(records, batch_size=10, **keys)).training_batches()
        if is_enough:
            assert next(batches)["segment_ids"].max(axis=1).sum() == 7
            continue
        with pytest.raises(UserError, match="6 of the 10 samples cannot be used or lose an image .3 have an unreadable image."):
            next(batches)


def test_broken_images_of_a_run_count_together_with_those_before_it_was_resumed(recipe, tmp_path, monkeypatch):
    """Six of ten, of which neither part of the run reads as many as are too many."""
    shutil.copytree(SAMPLE / "images", tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    records = [*[GOOD] * 4, *[record(image="broken.png")] * 6]
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    run = lambda steps, limit=0.5: fit(recipe(records, batch_size=2, total_steps=steps, **{
        "data.images": tmp_path / "images", "data.skip_limit": limit}), tmp_path / "run")
    assert run(2) and 0 < store.read_meta(tmp_path / "run", 2)["progress"]["unreadable"] < 6
    with pytest.raises(UserError, match="6 of the first 10 samples have an unreadable image, more than the allowed 50% .*; step 3 is saved"):
        run(5)
    assert run(5, limit=0.6), "a stopped run goes on with a higher limit"


@pytest.mark.parametrize("unreadable, anew, seen, words", [
    (0, 0, 0, ""), (750, 0, 1500, ""), (751, 0, 1500, "751 of the first 1500"), (500, 0, 501, ""), (501, 0, 501, "501 of the first 501"),
    (2000, 0, 2001, ""), (5000, 0, 7000, ""), (5005, 0, 7000, "1001 of the first 2000"),  # 4.7 epochs of 1,500 count as 5
    (500, 500, 1500, ""), (502, 501, 1500, "1001 of the 2000 samples cannot be used or lose an image .502 have"),
    (1500, 1500, 4500, ""), (1503, 1503, 4500, "1001 of the 2000 samples"), (1503, 1503, 4501, "")])
def test_counts_of_a_run_are_judged_by_the_epoch(unreadable, anew, seen, words):
    tokens = np.ones(2000, np.int32)
    tokens[:500] = 0
    plan = Plan(Stream((2000,), (2000,), 0, True), Lengths(tokens, np.ones(2000, np.int16), [], 0, 0, 0), Layout(64, 1, 2, True))
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        SkipLimit(plan, 0.5).refuse_counts(unreadable, anew, seen, "torn")


@pytest.mark.parametrize("weight", [1, 1.1])
def test_a_run_below_the_limit_never_ends_for_its_damaged_records(weight):
    """40 % are damaged and 8 % unreadable, which 50 % allow in each epoch, after any update."""
    tokens = np.ones(10_000, np.int32)
    tokens[:4000] = 0
    stream = Stream((10_000,), (round(10_000 * weight),), 0, True)
    limit = SkipLimit(Plan(stream, Lengths(tokens, np.ones(10_000, np.int16), [], 0, 0, 0), Layout(64, 1, 2, True)), 0.5)
    for seen in range(0, round(24_000 * weight), 600):
        limit.refuse_counts(round(seen * 0.08 / 0.6), round(seen * 0.08 / 0.6), seen, "torn")
    with pytest.raises(UserError, match="cannot be used or lose an image"):
        limit.refuse_counts(round(3300 * weight), round(3300 * weight), round(18_000 * weight), "torn")


def test_validation_images_that_cannot_be_read_are_counted_and_printed(recipe, tmp_path, monkeypatch, capsys):
    shutil.copytree(SAMPLE / "images", tmp_path / "images")
    (tmp_path / "images" / "broken.png").write_bytes(b"none")
    (tmp_path / "validation.json").write_text(json.dumps([*[GOOD] * 4, record(image="broken.png")]))
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    keys = {"data.images": tmp_path / "images", "data.validation": tmp_path / "validation.json", "checkpoint.every_steps": 2}
    assert fit(recipe([GOOD] * 4, total_steps=4, **keys), tmp_path / "run")
    judged = [line for line in runs.log_lines(tmp_path / "run") if "validation_loss" in line]
    assert [line["validation_samples_skipped"] for line in judged] == [1, 1]
    said = capsys.readouterr().out
    assert "warning: 1 validation sample is skipped; the first: " in said and "broken.png" in said


# ---- questions that are asked on the way

def test_a_question_has_the_images_of_its_own_turn():
    def asked(*texts, images):
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return during_training.first_turn({"id": 1, "image": images, "conversations": turns}).images
    assert asked("<image> is it?", "yes", "and <image>?", "no", images=["a", "b"]) == ["a"]
    assert asked("<image><image> alike?", "yes", images=["a", "b"]) == ["a", "b"]
    assert asked("<image><image> alike?", "yes", "and <image>?", "no", images=["a", "b"]) == ["a"]  # several in a turn are one
    assert asked("is it?", "yes", "and <image>?", "no", images=["a"]) == []


def test_a_question_that_lost_its_image_is_not_asked(capsys):
    questions = [during_training.first_turn({"id": i, "image": [], "surplus": 1, "conversations": record("is it?")["conversations"]})
                 for i in range(7)]
    model = during_training.TrainedModel()
    assert [model._row(type("Model", (), {"processor": None}), question) for question in questions] == [None] * 7
    model._say(list(model._refused.items()))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "question 0 is not asked: its record names 1 more images than it has <image> markers"
    assert len(said) == during_training.SHOWN + 1 and said[-1] == "3 more questions are not asked for similar reasons"
