"""A run whose `checkpoints/` cannot be reached or has lost its steps: that is said before anything of the run is written."""

import json
import re
import shutil

import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.errors import UserError
from llavamed_jax.training import place as places
from llavamed_jax.training import trainer
from llavamed_jax.training.trainer import fit
from tests.support.training_runs import FakeStep, log_lines

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


@pytest.fixture(scope="module")
def saved(recipe, one_device, tmp_path_factory):
    """A run with the steps 3, 6 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", FakeStep())
        assert fit(recipe(), workdir := tmp_path_factory.mktemp("saved") / "run")
    return workdir


@pytest.fixture
def work(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "away")
    return tmp_path / "run"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("how, sentence", [
    ("link", "checkpoints is a link to .*disk, which does not exist; .*mount its disk"),
    ("loop", "checkpoints cannot be read: Too many levels of symbolic links; .*mount its disk"),
    ("file", "checkpoints is not a directory; .*mount its disk"),
    ("empty", "checkpoints has no step, but .*metrics.jsonl has reached update 8, before which steps were saved; mount the disk"),
    ("linked to an empty one", "checkpoints has no step, but .*metrics.jsonl has reached update 8, before which .*; mount the disk"),
])
def test_steps_that_are_elsewhere_are_waited_for(recipe, work, tmp_path, how, sentence):
    """A disk that is not mounted: the run is as it was, and goes on once the disk is there."""
    place = work / "checkpoints"
    {"link": lambda: place.symlink_to(tmp_path / "disk"), "loop": lambda: place.symlink_to(place), "file": lambda: place.write_text(""),
     "empty": place.mkdir, "linked to an empty one": lambda: ((tmp_path / "disk").mkdir(), place.symlink_to(tmp_path / "disk"))}[how]()
    before = contents(work)
    with pytest.raises(UserError, match=f"^{re.escape(str(work))}/{sentence}"):
        fit(recipe(total_steps=9), work)
    assert contents(work) == before
    if "has no step" not in sentence:
        with pytest.raises(UserError, match=f"^{re.escape(str(work))}/{sentence}"):
            open_checkpoint(work)
    place.rmdir() if how == "empty" else place.unlink()
    place.symlink_to(tmp_path / "away")
    assert fit(recipe(total_steps=9), work) and newest_intact_step(work) == (9, [])


@pytest.mark.parametrize("reached", [1, 6])
def test_a_run_that_saved_nothing_begins_anew_and_says_so(recipe, work, capsys, reached):
    """Killed before its first save, or before the second that would have waited for the first: nothing shows that there was a step."""
    (work / "checkpoints").mkdir()
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines(work) if line["step"] <= reached))
    assert fit(recipe(total_steps=2), work)
    assert f"{work} has no step: the run starts from the beginning, and so does its metrics.jsonl, which had reached update {reached}\n" in capsys.readouterr().out


def test_a_run_whose_checkpoints_were_removed_begins_anew_even_after_a_failure(recipe, work, tmp_path, capsys):
    """As its errors advise; and what fails before the run begins leaves nothing that speaks against it."""
    with pytest.raises(UserError, match="nowhere"):
        fit(recipe(init=tmp_path / "nowhere"), work)
    assert fit(recipe(total_steps=2), work) and newest_intact_step(work) == (2, [])
    assert capsys.readouterr().out.count(f"{work} has no step: the run starts from the beginning") == 2


def test_steps_that_were_all_removed_by_hand_are_said(recipe, saved, tmp_path):
    """With `rm -r checkpoints/*`, which leaves the mark that there were steps."""
    shutil.copytree(saved, work := tmp_path / "run")
    for step in (3, 6, 8):
        shutil.rmtree(work / "checkpoints" / str(step))
    before = contents(work)
    with pytest.raises(UserError, match=f"^{work} has no intact step to resume from: its steps were removed; delete its checkpoints/ to start from"):
        fit(recipe(), work)
    with pytest.raises(UserError, match=f"^{work} is the workdir of a run without a saved step; at least one step in its checkpoints/ was expected$"):
        open_checkpoint(work)
    assert contents(work) == before


@pytest.mark.parametrize("total_steps", [8, 9])
def test_what_a_killed_save_left_goes_before_anything_is_written(recipe, saved, tmp_path, monkeypatch, total_steps):
    """The disk may be full of it. A finished run changes nothing."""
    shutil.copytree(saved, work := tmp_path / "run")
    (leftover := work / "checkpoints" / "9.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    sign = places.Place.sign
    monkeypatch.setattr(places.Place, "sign", lambda self: (sign(self), gone.append(not leftover.parent.exists())))
    gone = []
    assert fit(recipe(total_steps=total_steps), work)
    assert gone[:1] == ([] if total_steps == 8 else [True]) and leftover.exists() == (total_steps == 8)
