"""A run that goes on stands on what its own directory holds: not on `init`, not on what was changed, and on no other run's."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llavamed_jax.checkpoints.model_config import tree_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree import store
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.checkpoints.tree.store import newest_intact_step, read_meta, steps
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training import arithmetic, resume, trainer
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.callbacks import Callbacks
from llavamed_jax.training.program import Program
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs
from tests.support.training_runs import SAMPLE, FakeStep

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """A packed run whose updates change nothing, finished at step 6, with steps 3 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", FakeStep())
        assert fit(packed(recipe), workdir)
    assert steps(workdir) == [3, 6]
    return workdir


def packed(recipe, **changes):
    return recipe(**{"data.packing": True, "data.row_length": 64, "epochs": 2, "total_steps": "none", **changes})


@pytest.fixture
def workdir(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def crash_at(step):
    def evaluate(snapshot):
        if snapshot.step == step:
            raise RuntimeError("power cut")
        return {}
    return Callbacks([evaluate])


def tensors(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- a recipe of before

class Weighting(FakeStep):
    """Notes with which weighting of the loss it was made."""

    def __call__(self, *arguments):
        self.seen = arguments[6]  # loss_weighting
        return super().__call__()


def test_a_run_from_before_loss_weighting_goes_on_by_token(recipe, tmp_path, monkeypatch, capsys):
    """Whatever the recipe says now, as often as it goes on; its recipe.json still lacks the key."""
    def run(**changes):
        monkeypatch.setattr(trainer, "make_train_step", step := Weighting())
        assert fit(recipe(**changes, **{"checkpoint.every_steps": 0}), tmp_path / "run")
        return step.seen, capsys.readouterr().out, json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]

    plain = workdirs._plain
    with monkeypatch.context() as patch:
        patch.setattr(workdirs, "_plain", lambda cfg: {key: x for key, x in plain(cfg).items() if key != "loss_weighting"})
        run(total_steps=1)
    for total_steps in (2, 3):
        seen, said, written = run(total_steps=total_steps, loss_weighting="sample")
        assert seen == "token" and "loss_weighting" not in written
        assert "warning: this run was started before the config key 'loss_weighting' existed; it continues with 'token'" in said
    seen, said, _ = run(total_steps=4)
    assert seen == "token" and "loss_weighting" not in said
    with pytest.raises(UsageError, match="'seed' is 7"):
        fit(recipe(total_steps=5, seed=7), tmp_path / "run")


def test_the_weighting_of_a_run_is_settled(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_train_step", step := Weighting())
    assert fit(recipe(total_steps=1, loss_weighting="sample"), tmp_path / "run") and step.seen == "sample"
    with pytest.raises(UsageError, match="'loss_weighting' is 'token', but .* with 'sample'"):
        fit(recipe(total_steps=2), tmp_path / "run")
    assert fit(recipe(total_steps=2, loss_weighting="sample"), tmp_path / "run")


# ---- init

def overwrite(start, **files):
    """Another model of the same shapes in its place."""
    config = tree_config(start)
    shutil.rmtree(start)
    write_model(start, random_checkpoint(config, seed=9), **files)


def test_a_run_needs_its_init_no_more_once_it_has_saved(recipe, tmp_path, monkeypatch):
    """Nor the recipe's tokenizer: the frozen parameters with which it computes, and tensors and batches that follow, are those of an
    undisturbed run. First another model is in the place of `init`, then nothing.
    """
    start, spoken = tmp_path / "start", tmp_path / "spoken.model"
    shutil.copytree(recipe().init, start)
    shutil.copyfile(SAMPLE / "tokenizer.model", spoken)

    def batches_of(workdir, total_steps):
        step = FakeStep()
        monkeypatch.setattr(trainer, "make_train_step", step)
        assert fit(recipe(**{"init": start, "tokenizer": spoken, "total_steps": total_steps, "checkpoint.every_steps": 0}), workdir)
        frozen.append({name: np.asarray(array) for name, array in step.state.frozen.items()})
        return [{name: np.asarray(array) for name, array in batch.items()} for batch in step.batches]

    frozen = []
    whole, found = batches_of(tmp_path / "whole", 4), batches_of(tmp_path / "run", 2)
    overwrite(start)
    spoken.unlink()
    found += batches_of(tmp_path / "run", 3)
    shutil.rmtree(start)
    found += batches_of(tmp_path / "run", 4)
    for one, other in zip(found, whole, strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    for part in frozen[1:]:
        assert part.keys() == frozen[0].keys() and all(np.array_equal(part[name], frozen[0][name]) for name in part)
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_without_a_step_begins_with_init_as_it_is(recipe, tmp_path, without_compiling):
    """The base of the start before is not kept: trained on one model and laid over another, the result would be neither."""
    start = tmp_path / "start"
    shutil.copytree(recipe().init, start)
    with pytest.raises(RuntimeError):
        fit(recipe(init=start, total_steps=3), tmp_path / "run", crash_at(3))
    assert not steps(tmp_path / "run") and (tmp_path / "run" / "base" / "manifest.json").exists()
    overwrite(start, files={"tokenizer.model": SAMPLE / "tokenizer.model"})
    assert fit(recipe(init=start, total_steps=3), tmp_path / "run")
    ours, theirs = tensors(tmp_path / "run"), tensors(start)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_from_before_a_key_was_renamed_goes_on(recipe, tmp_path):
    """`protocol` was `data.protocol` in training recipes, and is `protocol` in evaluations and behind the colon."""
    now = workdirs._plain(recipe(protocol="clean"))
    before = {{"protocol": "data.protocol"}.get(key, key): value for key, value in now.items()}
    assert "data.protocol" in before and "protocol" not in before
    workdirs._refuse_changes(recipe(protocol="clean"), before, "it was started")
    with pytest.raises(UsageError, match="the config key 'protocol' is 'paper', but it was started with 'clean'"):
        workdirs._refuse_changes(recipe(protocol="paper"), before, "it was started")
    with pytest.raises(UsageError, match="the config key 'data.protocol' does not exist; did you mean protocol"):
        recipe(**{"data.protocol": "clean"})


def test_what_is_kept_is_what_was_started_with(recipe, tmp_path):
    """Frozen parameters, config and tokenizer from base/ and model/ are those from init."""
    checkpoint = open_start(recipe(tokenizer=SAMPLE / "tokenizer.model"))
    program = Program.build(recipe(), checkpoint, make_mesh("data=1", jax.devices()[:1]), 8)
    write_model(tmp_path / "run", checkpoint, without=program.trained_names())
    own = trainer.base.open_base(tmp_path / "run")
    assert own.config == checkpoint.config and not set(program.trained_names()) & set(own.tensors)
    state, frozen = program.initial_state(checkpoint), program.frozen(own)
    assert frozen.keys() == state.frozen.keys() and frozen
    assert all(frozen[name].dtype == x.dtype and np.array_equal(frozen[name], x) for name, x in state.frozen.items())


@pytest.mark.parametrize("inside", ["", "checkpoints/6"])
def test_a_model_that_no_run_wrote_is_left_alone(recipe, tmp_path, inside):
    run = tmp_path / "run"
    shutil.copytree(recipe().init, run)
    with pytest.raises(UserError, match="run has model/ but no recipe.json, so it does not belong to a run"):
        fit(recipe(), run)
    (run / inside).mkdir(parents=True, exist_ok=True)
    (run / ".lock").unlink()
    before = contents(run)
    with pytest.raises(UsageError, match="'init' is .* the workdir's own model"):
        fit(recipe(init=run / inside), run)
    assert {name: text for name, text in contents(run).items() if name.name != ".lock"} == before


# ---- what the steps stand on

def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def flip_tensor(file, name):
    """In a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    flip(file, 8 + length + json.loads(content[8:8 + length])[name]["data_offsets"][0])


FROZEN, UNUSED = "vision_tower/layers_0/mlp/fc1/kernel", "vision_tower/post_layernorm/scale"
DAMAGES = {
    "frozen": (lambda run: flip_tensor(run / "base/model.safetensors", FROZEN), f"base is damaged: {FROZEN} has another sha256"),
    "unused": (lambda run: flip_tensor(run / "base/model.safetensors", UNUSED), f"base is damaged: {UNUSED} has another sha256"),
    "cut": (lambda run: os.truncate(run / "base/model.safetensors", 5000), "base/model.safetensors is not a complete safetensors file"),
    "weights": (lambda run: (run / "base/model.safetensors").unlink(), "base holds no weights"),
    "base": (lambda run: shutil.rmtree(run / "base"), "base/manifest.json has been removed since the run"),
    "manifest": (lambda run: (run / "base/manifest.json").unlink(), "base/manifest.json has been removed since the run"),
    "hashes": (lambda run: flip(run / "base/manifest.json", 60), "base/manifest.json has changed since the run"),
    "model": (lambda run: shutil.rmtree(run / "model"), "has been removed since the run"),
    "config": (lambda run: (run / "model/config.json").write_text((run / "model/config.json").read_text().replace("1e-05", "1e-06")),
               "model/config.json has changed since the run"),
    "tokenizer": (lambda run: flip(run / "model/tokenizer.model", 9000), "model/tokenizer.model has changed since the run"),
    "settings": (lambda run: (run / "model/tokenizer_config.json").write_text('{"legacy": false}'), "tokenizer_config.json has been added since"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("epochs", [2, 3], ids=["finished", "to be gone on with"])
def test_a_run_does_not_end_well_without_its_base_and_model(recipe, workdir, without_compiling, damage, epochs):
    act, sentence = DAMAGES[damage]
    before = contents(workdir)
    act(workdir)
    assert contents(workdir) != before
    with pytest.raises(UserError, match=sentence):
        fit(packed(recipe, epochs=epochs), workdir)
    assert steps(workdir) == [3, 6]


def test_whole_it_does(recipe, workdir, without_compiling):
    for epochs in (2, 3):
        assert fit(packed(recipe, epochs=epochs), workdir)
    assert newest_intact_step(workdir)[0] == 9


def test_a_step_is_never_read_over_another_base(recipe, workdir, tmp_path, without_compiling):
    """Whole by itself and of the same shapes: only the step knows that it is not its own."""
    start = tmp_path / "start"
    shutil.copytree(recipe().init, start)
    overwrite(start, files={"tokenizer.model": SAMPLE / "tokenizer.model"})
    assert fit(packed(recipe, init=start), tmp_path / "other")
    assert open_checkpoint(workdir).step == 6
    shutil.rmtree(workdir / "base")
    shutil.copytree(tmp_path / "other/base", workdir / "base")
    for path in (workdir, workdir / "checkpoints/3"):
        with pytest.raises(UserError, match="base/manifest.json has changed since the run"):
            open_checkpoint(path)


# ---- what was settled

def edited(workdir, **resolved):
    file = workdir / "recipe.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "resolved": {**found["resolved"], **resolved}}))


@pytest.mark.parametrize("key, value", [("rows", 1), ("rows", None), ("row_length", 128), ("image_slots", 9), ("mean_length", 1.0),
                                        ("samples", 1), ("total_steps", 60)])
def test_what_was_settled_may_not_be_edited(recipe, workdir, without_compiling, key, value):
    (workdir / "checkpoints/6/manifest.json").unlink()  # to go on from step 3
    edited(workdir, **{key: value})
    with pytest.raises(UserError, match=f"recipe.json has been changed: {key} is {value}, but the run saved .*checkpoints/3 with "):
        fit(packed(recipe), workdir)


def test_rows_are_those_of_the_step(recipe, stopped, monkeypatch):
    """And the position in the data is of rows of this shape: with other rows an update the run would be another."""
    meta = read_meta(stopped, 6)
    assert meta["data"]["rows_an_update"] == meta["run"]["resolved"]["rows"] == 2
    cfg = packed(recipe)
    checkpoint = open_start(cfg)
    batches = trainer.Data.open(cfg, checkpoint, settled={**meta["run"]["resolved"], "rows": 1}).training_batches()
    with pytest.raises(UserError, match="other data: rows_an_update was 2 and is 1 now"):
        batches.restore(meta["data"])


def test_a_recipe_that_was_edited_too_is_refused_by_its_key(recipe, workdir):
    file = workdir / "recipe.json"
    found = json.loads(file.read_text())
    found["recipe"]["optimizer.learning_rate"] = 0.5
    file.write_text(json.dumps(found))
    with pytest.raises(UsageError, match="'optimizer.learning_rate' is 0.5, but the run saved .*checkpoints/6 with 0.00"):
        fit(packed(recipe, **{"optimizer.learning_rate": 0.5}), workdir)
    file.unlink()
    with pytest.raises(UserError, match="recipe.json is missing"):
        fit(packed(recipe), workdir)


def test_epochs_may_be_changed_back_and_forth(recipe, workdir, without_compiling):
    """Also where a run was ended before it saved a step of the new number: recipe.json knows of it, the steps do not."""
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fit(packed(recipe, epochs=3), workdir, crash_at(9))
        assert json.loads((workdir / "recipe.json").read_text())["resolved"]["total_steps"] == 9 and newest_intact_step(workdir)[0] == 6
    assert fit(packed(recipe), workdir) and newest_intact_step(workdir)[0] == 6
    assert fit(packed(recipe, epochs=3), workdir) and newest_intact_step(workdir)[0] == 9


def test_fewer_epochs_than_were_trained_are_a_finished_run(recipe, workdir, without_compiling, capsys):
    """The number of updates follows from the data, so it is known only once they are open."""
    whole = lambda: {path: content for path, content in contents(workdir).items() if path.name != ".lock"}
    before = whole()
    assert fit(packed(recipe, epochs=1), workdir) is True
    assert whole() == before
    assert f"{workdir} is finished: it was trained for 6 updates, although the recipe asks for 3\n" in capsys.readouterr().out


def test_another_length_of_the_run_is_told_with_what_it_does_to_the_rate(recipe, workdir, without_compiling, capsys):
    changes = {"optimizer.learning_rate": 1.0, "optimizer.warmup_ratio": 0.0}
    record = {"recipe": {}, "resolved": {"total_steps": 8}}
    assert workdirs.notes(recipe(**changes), record, 8, 16) == [
        "the run had 8 updates and has 16 now, and its learning rate follows the schedule of 16: it was 3.81e-02 in update 8 and "
        "is 5.00e-01 in update 9"]
    assert workdirs.notes(recipe(**changes), record, 4, 8) == []
    assert fit(packed(recipe, epochs=3), workdir)
    assert "resuming from step 6\nthe run had 6 updates and has 9 now" in capsys.readouterr().out


# ---- steps of others

def test_a_step_of_another_run_is_refused(recipe, workdir, tmp_path, without_compiling):
    assert fit(packed(recipe, epochs=3), tmp_path / "other")
    shutil.copytree(tmp_path / "other/checkpoints/9", workdir / "checkpoints/9")
    with pytest.raises(UserError, match="checkpoints/9 belongs to another run than .*recipe.json"):
        fit(packed(recipe, epochs=3), workdir)


def test_a_step_under_another_number_is_refused(recipe, workdir):
    (workdir / "checkpoints/6").rename(workdir / "checkpoints/8")
    with pytest.raises(UserError, match="checkpoints/8 was saved as step 6"):
        fit(packed(recipe, epochs=3), workdir)


@pytest.mark.parametrize("keys, value, sentence", [
    (["progress", "updates_dreamt"], 3, "records the count 'updates_dreamt', which this version does not know"),
    *((keys, None, f"does not record '{keys[-1]}'") for keys in (
        ["progress"], ["data"], ["run"], ["run", "run"], ["run", "recipe"], ["run", "resolved"], ["run", "model"],
        ["run", "validation"], ["run", "computed"])),
])
def test_a_step_of_another_version_is_refused(recipe, workdir, monkeypatch, keys, value, sentence):
    read = store.read_meta

    def of_another_version(*args):
        meta = read(*args)
        *groups, last = keys
        place = meta[groups[0]] if groups else meta
        if value is None:
            del place[last]
        else:
            place[last] = value
        return meta
    monkeypatch.setattr(store, "read_meta", of_another_version)
    before = (workdir / "recipe.json").read_text()
    with pytest.raises(UserError, match=f"checkpoints/6 {sentence}, because another version saved it; a step of this "
                                        "version was expected"):
        resume.find(workdir, packed(recipe, epochs=3))
    assert (workdir / "recipe.json").read_text() == before


def test_damaged_steps_ahead_do_not_push_out_intact_ones(recipe, workdir, without_compiling):
    """A run that went back from 6 to 3 and keeps one step keeps 3 until 4 is whole, not the damaged 6."""
    file = max((p for p in (workdir / "checkpoints/6/params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(file, 50)
    with pytest.raises(RuntimeError):
        fit(packed(recipe, **{"checkpoint.keep": 1, "checkpoint.every_steps": 2}), workdir, crash_at(6))
    assert steps(workdir) == [3, 4, 6] and newest_intact_step(workdir)[0] == 4


# ---- data and machine

@pytest.mark.parametrize("key, sentence", [("data.train", "the text or the images of the samples differ"),
                                           ("data.validation", "data.validation. have changed since")])
def test_data_of_the_same_lengths_and_other_content_is_refused(recipe, tmp_path, without_compiling, monkeypatch, key, sentence):
    files = {f"data.{name}": runs.write_data(tmp_path) / f"{name}.json" for name in ("train", "validation")}
    monkeypatch.setattr(trainer, "judge", lambda *_: ({}, True))  # which would compile
    assert fit(recipe(total_steps=3, **files), tmp_path / "run")
    records = json.loads(files[key].read_text())
    other = next(i for i, record in enumerate(records) if record["image"] != records[0]["image"])
    records[0]["image"], records[other]["image"] = records[other]["image"], records[0]["image"]
    files[key].write_text(json.dumps(records))
    with pytest.raises(UserError, match=sentence):
        fit(recipe(total_steps=6, **files), tmp_path / "run")
    assert steps(tmp_path / "run") == [3]


def test_another_arithmetic_is_told(recipe, workdir, without_compiling, capsys):
    assert fit(packed(recipe), workdir) and fit(packed(recipe, epochs=3), workdir)
    assert "rounds differently" not in capsys.readouterr().out
    shutil.rmtree(workdir / "checkpoints/9")
    before = jax.config.jax_default_matmul_precision  # which other tests may have set
    with jax.default_matmul_precision("bfloat16"):
        assert fit(packed(recipe, epochs=3), workdir)
    assert f"warning: matmul precision was {before} and is bfloat16 now: the resumed run rounds differently" in capsys.readouterr().out


def test_another_number_of_cores_is_told_when_a_run_goes_on(recipe, tmp_path, without_compiling, capsys, monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "2")
    assert fit(packed(recipe, epochs=1), tmp_path)
    monkeypatch.setenv("PJRT_NPROC", "4")
    assert fit(packed(recipe, epochs=2), tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if "rounds differently" in line]
    assert told == ["warning: CPU cores was 2 and is 4 now: the resumed run rounds differently"]


@pytest.mark.parametrize("what, before, now", [
    ("CPU cores", {"NPROC": "2"}, {"NPROC": "4"}),
    ("CPU cores", {"NPROC": "2"}, {"PJRT_NPROC": "4"}),
    ("the environment variable XLA_FLAGS", {"XLA_FLAGS": "--xla_a=1"}, {"XLA_FLAGS": "--xla_a=2"}),
    ("the environment variable XLA_FLAGS", {}, {"XLA_FLAGS": "--xla_a=2"}),
    ("the environment variable LIBTPU_INIT_ARGS", {}, {"LIBTPU_INIT_ARGS": "--xla_tpu_a=2"}),
    ("CPU", "A", "B"), ("jaxlib", "0.10.1", "0.10.2"), ("jax", "0.10.1", "0.10.2"), ("processes", 1, 2), ("device", "A", "B"),
    ("runtime", "PJRT C API\ncuda 12080", "PJRT C API\ncuda 12090"), ("mesh", {"data": 1}, {"data": 2}),
    ("dtype", "float32", "float16"), ("attention", "xla", "flash"),
])  # fmt: skip
def test_each_thing_that_last_bits_depend_on_is_told(monkeypatch, what, before, now):
    def used(given):
        for name in ("NPROC", "PJRT_NPROC", "XLA_FLAGS", "LIBTPU_INIT_ARGS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items() if what == "CPU cores" or what.startswith("the environment") else ():
            monkeypatch.setenv(name, value)
        here = lambda name, otherwise: given if what == name else otherwise
        monkeypatch.setattr(arithmetic.machine, "cpu_model", lambda: here("CPU", "a CPU"))
        monkeypatch.setattr(arithmetic.distributed, "process_count", lambda: here("processes", 1))
        for module in ("jax", "jaxlib"):
            monkeypatch.setattr(f"{module}.__version__", here(module, "1"))
        device = SimpleNamespace(platform="cpu", device_kind=here("device", "cpu"), client=SimpleNamespace(
            platform_version=here("runtime", "x")))
        return arithmetic.used(SimpleNamespace(
            model=SimpleNamespace(dtype=here("dtype", "float32"), attention=here("attention", "xla")),
            mesh=SimpleNamespace(devices=np.array([device]), shape=here("mesh", {"data": 1})), is_fp8=False))

    first, again, other = used(before), used(before), used(now)
    assert arithmetic.warnings(first, again) == []
    (told,) = arithmetic.warnings(json.loads(json.dumps(first)), other)
    assert re.fullmatch(f"warning: {what} was .+ and is .+ now: the resumed run rounds differently", told)


def test_a_hosts_cores_do_not_count_where_an_accelerator_computes():
    device = SimpleNamespace(platform="gpu", device_kind="H200", client=SimpleNamespace(platform_version="cuda 1"))
    said = arithmetic.used(SimpleNamespace(model=SimpleNamespace(dtype="bfloat16", attention="xla"),
                                               mesh=SimpleNamespace(devices=np.array([device]), shape={"data": 1}), is_fp8=False))
    assert not {"CPU", "CPU cores"} & said.keys() and {"jaxlib", "runtime", "device"} <= said.keys()


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    for name in ("NPROC", "PJRT_NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    assert arithmetic.machine.cpu_cores() == 3
    monkeypatch.setenv("NPROC", "not a number")
    assert arithmetic.machine.cpu_cores() == 3
    monkeypatch.setenv("NPROC", "5")
    assert arithmetic.machine.cpu_cores() == 5
    monkeypatch.setenv("PJRT_NPROC", "7")
    assert arithmetic.machine.cpu_cores() == 7


def test_the_processors_name_and_instructions_count(monkeypatch, tmp_path):
    monkeypatch.setattr(arithmetic.machine, "_CPUINFO", str(tmp_path / "cpuinfo"))
    found = []
    for text in ("model name\t: X 1\nflags\t: avx2 fma\n", "model name\t: X 1\nflags\t: fma avx2\n\nmodel name: X 1\n",
                 "model name\t: X 2\nflags\t: avx2 fma\n", "model name\t: X 1\nflags\t: avx2\n", "CPU part\t: 0xd40\nFeatures\t: asimd\n"):
        (tmp_path / "cpuinfo").write_text(text)
        found.append(arithmetic.machine.cpu_model())
    assert found[0] == found[1] and len(set(found)) == 4 and found[0].startswith("X 1, instructions ") and found[4].startswith("0xd40")
    (tmp_path / "cpuinfo").unlink()
    assert arithmetic.machine.cpu_model()


def test_a_step_of_an_earlier_version_does_not_say_its_cores():
    now = {"device": "cpu", "jax": "2", "CPU cores": "2", "CPU": "x"}
    assert arithmetic.warnings(now, now) == []
    assert arithmetic.warnings({"device": "cpu", "jax": "2"}, now) == [
        "warning: the saved step does not record CPU, CPU cores: the resumed run may round differently"]
    assert arithmetic.warnings({"device": "gpu", "jax": "2"}, now) == [
        "warning: device was gpu and is cpu now: the resumed run rounds differently"]
    assert arithmetic.warnings({**now, "CPU cores": "4"}, now) == [
        "warning: CPU cores was 4 and is 2 now: the resumed run rounds differently"]


# ---- the tokenizer of a recipe

def test_of_a_tokenizer_its_files_are_taken_and_no_other(recipe, tmp_path):
    """So that a run's own directory gives the same ids: by names that are found, with the settings that were read, and without a
    preprocessor, by which images would be normalised."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.model", "other.model", "tokenizer.json"):
        shutil.copyfile(SAMPLE / "tokenizer.model", folder / name)
    (folder / "tokenizer_config.json").write_text('{"legacy": false}')
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    names = {".": {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"},
             "tokenizer.model": {"tokenizer.model", "tokenizer_config.json"}, "other.model": {"tokenizer.model"}}
    for name, expected in names.items():
        checkpoint = open_start(recipe(tokenizer=folder / name))
        assert set(checkpoint.files) == expected
        write_model(tmp_path / f"run of {name}", checkpoint)
        own, asked = Tokenizer.load(tmp_path / f"run of {name}" / "model"), Tokenizer.load(folder / name)
        assert own.is_legacy == asked.is_legacy == (name == "other.model")
        assert own.encode("what is </s> shown") == asked.encode("what is </s> shown")
        assert trainer.base.open_base(tmp_path / f"run of {name}").config == checkpoint.config
