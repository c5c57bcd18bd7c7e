"""Processes that were not started alike end before the first update, all with one sentence that names what is not the same."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli import processes
from llavamed_jax.cli.eval import main as evaluate
from llavamed_jax.cli.train import main as train
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.parallel import agreement
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import alike, inputs, recipe
from llavamed_jax.training.rows import Data
from llavamed_jax.training.settings import Settings
from llavamed_jax.training.start import open_start
from llavamed_jax.utils import code
from llavamed_jax.utils.nested import flatten
from tests.support import training_runs as runs
from tests.support import xla
from tests.support.several import Threads, ends, two
from tests.support.training_runs import ROOT, SAMPLE


@pytest.fixture
def several(monkeypatch):
    """Compares what each of some processes has; returns what each of them raises."""
    def compared(*values, count=2):
        threads = Threads(count)
        monkeypatch.setattr(agreement, "distributed", threads)
        found = threads.run(lambda k: agreement.check_same(lambda: values[min(k, len(values) - 1)]))
        assert len({(type(error), str(error)) for error in found}) == 1, "one sentence"
        assert all(group.ends_alike == (found[0] is not None) for group in threads.groups)
        return found[0]

    return compared


# ---- the comparison

def test_all_hear_what_is_not_the_same(several):
    assert several({"the code": 1, "x": [1, "a", None, 0.5]}, count=3) is None
    error = several({"the code": 1, "the number of rows": 7}, {"the code": 1, "the number of rows": 8})
    assert type(error) is agreement.StartedOtherwise
    assert str(error) == ("process 1 was started differently from process 0: the number of rows (7 in process 0, 8 in process "
                          "1); the same was expected in all processes")
    error = several({"--a": 1}, {"--a": 2}, {"--a": 3}, {"--a": 1}, count=4)
    assert type(error) is UsageError
    assert "process 1 and 1 more of 4 were started differently from process 0: --a (1 in process 0, 2 in process 1)" in str(error)


def test_values_that_json_changes_equal_themselves(several):
    values = {"a": float("nan"), "b": float("inf"), "c": (1, 2), "d": ROOT, "e": "é\ud800"}
    assert several(values, dict(values)) is None
    assert "a (1.0 in process 0, 'NaN' in process 1)" in str(several({"a": 1.0}, {"a": float("nan")}))


def test_what_only_one_has_is_named(several):
    assert "--dtype (missing in process 0)" in str(several({"x": 1}, {"x": 1, "--dtype": "float16"}))
    assert "--dtype (missing in process 1)" in str(several({"x": 1, "--dtype": "float16"}, {"x": 1}))


def test_of_long_values_that_end_otherwise_the_end_is_shown(several):
    folder = "/mnt/" + "very/long/" * 12
    sentence = str(several({"--workdir": f"{folder}a"}, {"--workdir": f"{folder}b"}))
    assert "long/a' in process 0" in sentence and "long/b' in process 1" in sentence and len(sentence) < 300


def test_one_process_compares_nothing():
    agreement.check_same(lambda: pytest.fail("was called"))


# ---- what is compared before anything is opened

@pytest.fixture
def cfg(tmp_path):
    data = runs.write_data(tmp_path)
    return runs.shrunk(tmp_path / "start", data, **{"data.validation": data / "validation.json", "seed": 3})


def another(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case None:
            return 5
        case _:
            return (*value, "more")


def test_each_key_of_the_recipe_is_compared(cfg, tmp_path, several):
    for key in recipe.SCHEMA:
        other = cfg.copy_and_resolve_references()
        value = flatten(cfg)[key]
        wrong = another(value)
        with other.ignore_type():
            *parents, leaf = key.split(".")
            (other[parents[0]] if parents else other)[leaf] = wrong
        error = several(*(alike.start(each, tmp_path, {"profile": None}) for each in (cfg, other)))
        assert type(error) is UsageError and f": the config key {key!r} (" in str(error)
        assert str(error).count("in process 0") == str(error).count("in process 1") == 1
        if isinstance(value, (bool, int, float)):
            assert f"the config key {key!r} ({value!r} in process 0, {wrong!r} in process 1)" in str(error)


@pytest.mark.parametrize("what", ["--workdir", "--profile", "the version of Python", "the code of llavamed_jax",
                                  *(f"the version of {name}" for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
                                                                          "transformers", "numpy", "tokenizers", "pillow", "libtpu")),
                                  "jax's setting jax_default_matmul_precision", "jax's setting jax_enable_x64",
                                  "the environment variable XLA_FLAGS"])  # fmt: skip
def test_flags_packages_and_code_are_compared(cfg, tmp_path, several, monkeypatch, what):
    here = alike.start(cfg, tmp_path, {"profile": None})
    name, flags, workdir = what.split()[-1], {"profile": None}, tmp_path
    match what:
        case "--workdir":
            workdir = tmp_path / "other"
        case "--profile":
            flags = {"profile": (2, 3)}
        case "the version of Python":
            monkeypatch.setattr(agreement.platform, "python_version", lambda: "3.9.9")
        case "the code of llavamed_jax":
            monkeypatch.setattr(agreement, "code_sha256", lambda: "0" * 64)
        case "jax's setting jax_default_matmul_precision":
            monkeypatch.setattr("jax.config", type("", (), {name: "bfloat16" if here[what] != "bfloat16" else "highest"}))
            monkeypatch.setattr(agreement, "_SETTINGS", (name,))
            here = {k: v for k, v in here.items() if not k.startswith("jax's") or k == what}
        case "jax's setting jax_enable_x64":
            monkeypatch.setattr("jax.config", type("", (), {name: not here[what]}))
            monkeypatch.setattr(agreement, "_SETTINGS", (name,))
            here = {k: v for k, v in here.items() if not k.startswith("jax's") or k == what}
        case "the environment variable XLA_FLAGS":
            monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        case _:
            own = code.version
            monkeypatch.setattr(agreement, "version", lambda package: "9.9" if package == name else own(package))
    there = alike.start(cfg, workdir, flags)
    error = several(here, there)
    assert type(error) is (UsageError if what.startswith("--") else agreement.StartedOtherwise)
    assert f"process 0: {what} (" in str(error) and str(error).count("in process 1") == 1, str(error)


def test_a_recipe_is_compared_before_anything_is_opened_or_written(tmp_path, monkeypatch, capsys):
    def refuse(make):
        assert make()["the config key 'optimizer.learning_rate'"] == 0.25 and make()["--workdir"] == str(tmp_path / "run")
        raise UsageError("started otherwise")

    monkeypatch.setattr(agreement, "check_same", refuse)
    status = train([*command(tmp_path, **{"optimizer.learning_rate": 0.25}), "--workdir", str(tmp_path / "run")])
    assert (status, *capsys.readouterr()) == (2, "", "error: started otherwise\n") and not list(tmp_path.iterdir())


def test_where_a_host_writes_and_how_a_path_is_written_may_differ(cfg, tmp_path, several, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b=2 --xla_dump_to=/tmp/0")
    here = alike.start(cfg, tmp_path, {})
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2  --xla_dump_to=/tmp/1 --xla_a=1")
    assert several(here, alike.start(cfg, tmp_path / "sub" / "..", {})) is None


# ---- what is compared when it is open

def opened(cfg, workdir):
    return alike.model(cfg, workdir, open_start(cfg), None)


def copied(cfg, tmp_path):
    """The recipe with a copy of its start, which is the same model in another place."""
    shutil.copytree(cfg.init, tmp_path / "copy")
    other = cfg.copy_and_resolve_references()
    other.init = str(tmp_path / "copy")
    return other


def test_equal_models_in_other_places_are_equal(cfg, tmp_path, several):
    runs.write_start(tmp_path / "start")
    other = copied(cfg, tmp_path)
    assert several(opened(cfg, tmp_path), opened(other, tmp_path)) is None


@pytest.mark.parametrize("what", ["weights", "tokenizer", "config", "a tokenizer of the recipe's", "another preset", "torch weights"])
def test_other_models_are_refused(cfg, tmp_path, several, what):
    runs.write_start(tmp_path / "start")
    other = copied(cfg, tmp_path)
    named = {"weights": "the model's file base/manifest.json", "tokenizer": "the model's file model/tokenizer.model",
             "config": "the config of the model", "a tokenizer of the recipe's": "the model's file tokenizer: tokenizer.model",
             "another preset": "the config of the model", "torch weights": "the model's file model.safetensors"}[what]
    tokenizer = tmp_path / "copy" / "model" / "tokenizer.model"
    if what == "weights":
        checkpoint = open_checkpoint(tmp_path / "start")
        shutil.rmtree(tmp_path / "copy")
        write_model(tmp_path / "copy", random_checkpoint(checkpoint.config, 1), files=checkpoint.files)
    elif what == "config":
        file = tmp_path / "copy" / "model" / "config.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps({**found, "max_length": 63}))
    elif what == "torch weights":
        from llavamed_jax.checkpoints.export.directory import export
        for folder, of in (("a", "start"), ("b", "copy")):
            export(open_checkpoint(tmp_path / of), tmp_path / folder, "transformers")
        cfg.init, other.init = str(tmp_path / "a"), str(tmp_path / "b")
        (file,) = (tmp_path / "b").glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif what == "another preset":
        for each, preset in ((cfg, "small"), (other, "v15-7b")):
            each.init, each.tokenizer = f"preset:{preset}", str(SAMPLE / "tokenizer.model")
    elif what == "a tokenizer of the recipe's":
        for each, of in ((cfg, "start"), (other, "copy")):
            each.tokenizer = str(tmp_path / of / "model" / "tokenizer.model")
    if "tokenizer" in what:
        from sentencepiece import sentencepiece_model_pb2
        proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.read_bytes())
        proto.pieces[-1].score -= 1
        tokenizer.write_bytes(proto.SerializeToString())
    error = several(opened(cfg, tmp_path), opened(other, tmp_path))
    assert type(error) is agreement.StartedOtherwise and f"{named} ('sha256 " in str(error), str(error)


def test_a_directory_of_a_hosts_own_disk_is_refused(cfg, tmp_path, several, monkeypatch):
    runs.write_start(tmp_path / "start")
    monkeypatch.setattr(alike, "_PATIENCE_S", 0.1)
    error = several(opened(cfg, tmp_path), opened(cfg, tmp_path / "nowhere"))
    assert "the workdir ('exists' in process 0, 'does not exist' in process 1)" in str(error)


# ---- what is compared when the data has been read

def read(cfg):
    return Data.open(cfg, open_start(cfg))


@pytest.mark.parametrize("key, change", [("data.train", "text"), ("data.train", "fewer"), ("data.train", "image"),
                                         ("data.validation", "text"), ("data.samples", "text"), ("data.train", "pixels")])
def test_other_data_is_refused(cfg, tmp_path, several, key, change):
    runs.write_start(tmp_path / "start")
    (tmp_path / "there").mkdir()
    shutil.copytree(SAMPLE / "images", tmp_path / "images")
    cfg.data.images, cfg.samples_every = str(tmp_path / "images"), 3
    with cfg.ignore_type():
        cfg.data.samples = cfg.data.train
    here = alike.data(read(cfg), 8)
    records = json.loads((tmp_path / ("validation.json" if key == "data.validation" else "train.json")).read_text())
    other = next(record["image"] for record in records if record["image"] != records[0]["image"])
    if change == "text":
        records[0]["conversations"][0]["value"] = records[0]["conversations"][0]["value"].swapcase().replace("<IMAGE>", "<image>")
    elif change == "fewer":
        records = records[:-1]
    elif change == "image":
        records[0]["image"] = other
    else:
        (tmp_path / "images" / records[0]["image"]).write_bytes((tmp_path / "images" / other).read_bytes())
    (tmp_path / "there" / "data.json").write_text(json.dumps(records))
    with cfg.ignore_type():
        cfg.data[key.partition(".")[2]] = str(tmp_path / "there" / "data.json")
    there = alike.data(read(cfg), 8)
    if change == "pixels":
        (tmp_path / "there" / "data.json").write_bytes((tmp_path / "train.json").read_bytes())
        there = alike.data(read(cfg), 8)
    error = several(here, there)
    named = f"the records of {key} ('" if change != "pixels" else f"the image {tmp_path}/images/{records[0]['image']} ('sha256 "
    assert type(error) is agreement.StartedOtherwise and named in str(error), str(error)
    assert several(here, dict(here)) is None


def test_other_rows_of_equal_records_are_refused(cfg, tmp_path, several):
    """As where a folder `cache/`, or the length that a tokenizer's code makes of a sample, is another."""
    runs.write_start(tmp_path / "start")
    data = read(cfg)
    lengths = replace(data.plan.lengths, tokens=np.where(np.arange(len(data.plan.lengths.tokens)) == 2, 9, data.plan.lengths.tokens))
    plan = type(data.plan)(data.plan.stream, lengths, data.plan.layout)
    error = several(alike.data(data, 8), alike.data(replace(data, plan=plan), 8))
    assert "process 0: the rows of data.train (…" in str(error) and "the records" not in str(error)
    assert "process 0: the number of updates (8 in process 0, 9 in process 1)" in str(several(alike.data(data, 8), alike.data(data, 9)))


@pytest.mark.parametrize("part", ["mesh", "settings"])
def test_what_each_process_chooses_by_its_memory_is_compared(cfg, tmp_path, monkeypatch, part):
    """`fit` compares it where it is chosen: both processes end with one sentence."""
    runs.write_start(tmp_path / "start")
    (tmp_path / "run").mkdir()  # process 0 has made it; the others would wait for it
    meshes, chosen = [make_mesh("data=1"), make_mesh("fsdp=2")], [Settings("minimal", 1), Settings("full", 4)]
    found = []
    for k in range(2):
        monkeypatch.setattr(inputs, "open_mesh", lambda *_, k=k: meshes[k if part == "mesh" else 0])
        monkeypatch.setattr(inputs.settings, "of_run", lambda *_, k=k: chosen[k if part == "settings" else 0])
        values = {}
        monkeypatch.setattr(agreement, "check_same", lambda make, values=values: values.update(make()))
        inputs.open_inputs(cfg, tmp_path / "run", 8, None, {})
        found.append(values)
    monkeypatch.undo()
    threads = Threads(2)
    monkeypatch.setattr(agreement, "distributed", threads)
    error, other = threads.run(lambda k: agreement.check_same(lambda: found[k]))
    assert str(error) == str(other)
    words = {"mesh": "the mesh that fits its devices ('data 1, fsdp 1, tp 1' in process 0, 'data 1, fsdp 2, tp 1' in process 1)",
             "settings": "the settings that fit the memory of its devices ('remat=minimal micro_batches=1' in process 0, "
                         "'remat=full micro_batches=4' in process 1)"}
    assert f"process 1 was started differently from process 0: {words[part]}" in str(error)


# ---- two processes

def command(tmp_path, **changes):
    keys = {"init": tmp_path / "start", "data.train": "train.json", "data.images": runs.images(), "batch_size": 4, "total_steps": 2,
            "max_length": 40, "mesh.data": 2, "mesh.fsdp": 1, "checkpoint.every_steps": 0, **changes}
    return ["--config", f"{ROOT}/configs/demo.py:vqa", *(f"--config.{key}={value}" for key, value in keys.items() if value is not None)]


@pytest.mark.parametrize("key, first, second", [("total_steps", 2, 4), ("init", "start", "other")])
def test_two_processes_of_other_recipes_end_with_one_sentence(tmp_path, key, first, second):
    runs.write_start(tmp_path / "start")
    running = two("train", *command(tmp_path, **{key: None}), "--workdir", str(tmp_path / "run"),
                  only_first=[f"--config.{key}={first}"], only_second=[f"--config.{key}={second}"], folders=(tmp_path, tmp_path))
    (status, out, said), (there, silent, said_there) = ends(running, 300)
    assert (status, there) == (2, 2) and out == silent == "" and said == said_there
    assert said == (f"error: process 1 was started differently from process 0: the config key {key!r} ({first!r} in process 0, "
                    f"{second!r} in process 1); the same was expected in all processes\n")
    assert not (tmp_path / "run").exists()


def test_two_processes_of_other_data_under_one_name_end_with_one_sentence(tmp_path):
    runs.write_start(tmp_path / "start")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        runs.write_data(folder)
    records = json.loads((folders[1] / "train.json").read_text())
    records[3]["conversations"][1]["value"] = "another"
    (folders[1] / "train.json").write_text(json.dumps(records))
    running = two("train", *command(tmp_path), "--workdir", str(tmp_path / "run"), folders=folders, XLA_FLAGS=xla.flags())
    (status, _, said), (there, silent, said_there) = ends(running, 300)
    assert (status, there, silent) == (1, 1, "") and said == said_there and len(said.splitlines()) == 1, said + said_there
    assert "error: process 1 was started differently from process 0: the records of data.train ('12 records, sha256 " in said
    assert not list((tmp_path / "run").glob("checkpoints/*"))


EVALUATION = ["--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", "runs/x"]


@pytest.mark.parametrize("command, words", [(train, ["--config", "configs/demo.py:vqa"]), (evaluate, EVALUATION)], ids=["train", "eval"])
def test_a_process_joins_the_others_before_it_reads_its_config(tmp_path, monkeypatch, capsys, command, words):
    def join(place):
        raise UserError(f"{place.index} of {place.count} at {place.coordinator} has joined")

    monkeypatch.setattr(processes, "join", join)
    several = ["--coordinator", "here:1", "--num_processes", "2", "--process_id", "1", "--config.bogus=1"]
    assert command([*words, "--workdir", str(tmp_path / "run"), *several]) == 1
    assert capsys.readouterr().err == "error: 1 of 2 at here:1 has joined\n"


def test_a_config_that_one_process_cannot_read_ends_all_at_once(tmp_path):
    """Before it had joined the others it would have left them waiting for it for five minutes."""
    begun = time.monotonic()
    running = two("tests.support.fake_eval", "0", "--", *EVALUATION, "--workdir", str(tmp_path / "run"), only_second=["--config.bogus=1"])
    (status, _, said), (there, _, said_there) = ends(running, 300)
    assert (status, there) == (2, 2) and time.monotonic() - begun < 120
    assert "error: process 1 failed: the config key 'bogus' does not exist" in said
    assert said_there.startswith("error: the config key 'bogus' does not exist") and not (tmp_path / "run" / "model").exists()
