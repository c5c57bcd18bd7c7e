"""Going on: every kind of damage to every part of the newest step, every key of the recipe, and a lock that dies with its process."""

import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import optax
import pytest

from llavamed_jax.checkpoints.tree import store
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.training import place as places
from llavamed_jax.training import recipe as recipes
from llavamed_jax.training import step_agreement, trainer
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.trainer import fit
from tests.support.training_runs import ROOT, FakeStep


def promised():
    """The keys that docs/interface.md lets a run change that goes on."""
    sentence, = re.findall(r"^Some keys may differ when a run resumes: (.*?)\.$", (ROOT / "docs/interface.md").read_text(), re.M | re.S)
    named = {name for name in re.findall(r"`([^`]+)`", sentence) if "=" not in name}
    groups = {key for name in named if name.endswith(".*") for key in recipes.SCHEMA if key.startswith(name[:-1])}
    return {name for name in named if not name.endswith(".*")} | groups


MAY_DIFFER = promised()


pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


# ---- damage

@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with the intact steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("steps") / "run"
    trained = {"decoder/norm/scale": jnp.arange(64.0)}
    with store.StepWriter(workdir) as writer:
        for step in (3, 6):
            writer.save(step, trained, optax.adam(1e-3).init(trained), {"data": {"position": step}})
    return workdir


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {"flipped": flip, "cut": lambda file: file.write_bytes(file.read_bytes()[:-2]), "emptied": lambda file: file.write_bytes(b""),
           "removed": lambda file: file.unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["params", "optimizer", "state", "manifest.json"])
def test_any_damage_to_the_newest_step_is_named_and_the_one_before_used(two_steps, tmp_path, damage, part):
    """Every file of the part in turn; of an empty one nothing can be flipped, cut or emptied."""
    newest = two_steps / "checkpoints" / "6"
    files = [newest / part] if part == "manifest.json" else [p for p in (newest / part).rglob("*") if p.is_file()]
    files = [file for file in files if damage == "removed" or file.stat().st_size]
    assert files
    shutil.copytree(two_steps, workdir := tmp_path / "run")
    for file in files:
        victim = workdir / file.relative_to(two_steps)
        DAMAGES[damage](victim)
        step, sentences = store.newest_intact_step(workdir)
        victim.write_bytes(file.read_bytes())
        assert step == 3 and len(sentences) == 1, file
        assert "checkpoints/6" in sentences[0] and "manifest.json" in sentences[0]
        if part != "manifest.json":
            assert file.relative_to(newest).as_posix() in sentences[0]


def test_a_manifest_is_damaged_by_any_flipped_bit(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    manifest = tmp_path / "run" / "checkpoints" / "6" / "manifest.json"
    content = manifest.read_bytes()
    for place in range(0, len(content) - 1, 31):  # all but the end of the last line, which says nothing
        for bit in (0, 5):
            manifest.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1:])
            assert store.newest_intact_step(tmp_path / "run")[0] is None, (place, bit)
    manifest.write_bytes(content)
    assert store.newest_intact_step(tmp_path / "run") == (6, [])


def test_a_first_save_that_was_killed_begins_anew_and_says_so(recipe, tmp_path, capsys):
    """Never whole, it is as if the run had not saved; once whole, a lost manifest is no reason to throw the run away."""
    workdir = tmp_path / "run"
    assert fit(recipe(total_steps=1), workdir)
    for name in ("manifest.json", "../.sealed"):
        (workdir / "checkpoints" / "1" / name).unlink()
    assert fit(recipe(total_steps=1), workdir)
    assert "has no manifest.json: the save was interrupted; the run starts from the beginning" in capsys.readouterr().out
    (workdir / "checkpoints" / "1" / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no intact step to resume from: .*has no manifest.json.*delete its checkpoints/"):
        fit(recipe(total_steps=1), workdir)
    shutil.rmtree(workdir / "checkpoints")
    assert fit(recipe(total_steps=1), workdir)


# ---- where the data stood

def test_a_step_carries_its_own_position_in_the_data(recipe, tmp_path, monkeypatch):
    """Not the prefetcher's, which is ahead; and the batches that follow are those of a run that was not interrupted."""
    def batches_of(name, total_steps, workers=0):
        step = FakeStep()
        monkeypatch.setattr(trainer, "make_train_step", step)
        assert fit(recipe(total_steps=total_steps, **{"data.workers": workers, "checkpoint.every_steps": 0}), tmp_path / name)
        return [batch["input_ids"].tolist() for batch in step.batches]

    whole = batches_of("whole", 4)
    first, rest = batches_of("parts", 2, workers=1), batches_of("parts", 4)
    assert (len(first), len(rest)) == (2, 2) and first + rest == whole
    assert store.newest_intact_step(tmp_path / "parts")[0] == 4


def test_a_run_goes_on_with_the_updates_that_it_skipped(recipe, tmp_path, monkeypatch):
    """They do not count in the schedule, neither before nor after."""
    class Seen(FakeStep):
        def update(self, state, batch):
            seen.append((state.step.item(), state.skipped.item()))
            return super().update(state, batch)

    seen = []
    for total_steps in (3, 4):
        monkeypatch.setattr(trainer, "make_train_step", Seen(lambda k: k == 2))
        assert fit(recipe(total_steps=total_steps), tmp_path / "run")
    assert seen == [(0, 0)] * 3 + [(3, 1)]


def test_what_no_run_wrote_into_its_log_is_left_out(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n5\nnull\n{}\n{"step": null}\n\xff\xfe\x00\n{"step": 3}\n' + b"[" * 200_000 + b'\n{"step": 4}\n{"step": 2')
    workdirs.cut_back(log, 3)
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_steps_are_saved_by_the_clock_too(recipe, tmp_path, monkeypatch):
    """Updates of 50 seconds, a save every two minutes: in the first update after that."""
    class Timed(FakeStep):
        def update(self, state, batch):
            nonlocal now
            now += 50
            return super().update(state, batch)

    now = 0.0
    monkeypatch.setattr(trainer, "make_train_step", Timed())
    monkeypatch.setattr(step_agreement, "time", SimpleNamespace(monotonic=lambda: now))
    assert fit(recipe(**{"checkpoint.every_steps": 0, "checkpoint.every_minutes": 2.0}), tmp_path / "run")
    assert store.steps(tmp_path / "run") == [3, 6, 8]


# ---- another recipe

@pytest.fixture(scope="module")
def written(recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recipe")
    workdirs.write_recipe(workdir, recipe(), {"total_steps": 8})
    return workdir


def other(value):
    """A value that differs, of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, "another"] if isinstance(value, (list, tuple)) else f"another {value or ''}"


@pytest.mark.parametrize("key", sorted(recipes.SCHEMA))
def test_every_key_is_refused_by_its_name_or_may_differ(recipe, written, key):
    cfg = recipe()
    *parents, leaf = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    with cfg.ignore_type(), cfg.unlocked():
        node[leaf] = other(node[leaf])
    if key in MAY_DIFFER:
        workdirs.read_recipe(written, cfg)
    else:
        with pytest.raises(UsageError, match=f"the config key '{key}' is .* started with .* another workdir was expected"):
            workdirs.read_recipe(written, cfg)


def test_the_number_of_updates_is_settled_for_the_epochs_that_it_followed_from(recipe, written):
    assert workdirs.read_recipe(written, recipe())["total_steps"] == 8
    for changes in ({"epochs": 2}, {"total_steps": 9}):
        assert workdirs.read_recipe(written, recipe(**changes)) == {}


def test_what_may_differ_are_keys():
    assert {"total_steps", "checkpoint.keep", "data.skip_limit"} <= MAY_DIFFER <= set(recipes.SCHEMA)


# ---- the lock

# As a place locks and signs it; that imports JAX besides.
HOLDER = """
import os, sys, time
from llavamed_jax.utils import locks
file = open(sys.argv[1] + "/.lock", "w")
assert locks.is_free(file.fileno(), sys.argv[1])
print(os.getpid(), end="", file=file, flush=True)
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_dies_with_its_process(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by another run .process {holder.pid}."), places.locked(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / ".lock").exists(), "that the file exists means nothing"
    with places.locked(tmp_path) as held:
        held.sign()
