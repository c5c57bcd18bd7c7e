"""The own tree: what is saved comes back to the bit, sharded as asked, and a step that is not whole is never taken for one."""

import errno
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree import base, store
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError

CFG = LlavaConfig(VisionConfig(32, 64, 2, 4, 28, 14), DecoderConfig(64, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 512, architecture="mistral"))
ROOT = Path(__file__).resolve().parents[2]
META = {"data": {"epoch": 1, "position": 17}, "rng": [0, 42]}


@pytest.fixture(scope="module")
def source():
    return random_checkpoint(CFG, seed=1)


@pytest.fixture(scope="module")
def trained(source):
    parts = ("projector/", "decoder/norm/", "decoder/layers_1/mlp/down")
    return {name: jnp.asarray(source.read(name)) * 2 for name in source.tensors if name.startswith(parts)}


@pytest.fixture
def workdir(tmp_path, source, trained):
    write_model(tmp_path / "run", source, without=trained)
    return tmp_path / "run"


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mu_dtype=jnp.bfloat16))


def like(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def save(workdir, steps, trained):
    with store.StepWriter(workdir) as writer:
        for step in steps:
            writer.save(step, {n: a + step for n, a in trained.items()}, optimizer().init(trained), META | {"step": step})


@pytest.fixture(scope="module")
def runs(tmp_path_factory, source, trained):
    """Steps -> a workdir in which they are saved, once for all tests."""
    @functools.cache
    def run(*steps):
        write_model(path := tmp_path_factory.mktemp("saved") / "run", source, without=trained)
        save(path, steps, trained)
        return path
    return run


@pytest.fixture
def saved(tmp_path, runs):
    """Steps -> a workdir of the test's own in which they are saved."""
    return lambda *steps: shutil.copytree(runs(*steps), tmp_path / "run")


def flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_step_comes_back_whole(workdir, trained):
    gradients = jax.tree.map(lambda x: 0.1 * x, trained)
    _, state = jax.jit(optimizer().update)(gradients, optimizer().init(trained), trained)  # moments that are not 0
    with store.StepWriter(workdir) as writer:
        writer.save(3, trained, state, META)
    assert store.newest_intact_step(workdir) == (3, [])
    found = store.restore_step(workdir, 3, like(trained), like(state))
    assert_same(found[0], trained)
    assert_same(found[1], state)
    assert found[2] == META


def test_a_step_is_restored_with_the_sharding_that_is_asked_for(workdir, trained):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = NamedSharding(mesh, P("fsdp"))
    trained = {name: trained[name] for name in ("projector/linear_1/kernel", "projector/linear_1/bias")}
    save(workdir, [1], {n: jax.device_put(a, sharded) for n, a in trained.items()})
    other = NamedSharding(mesh, P("tp"))
    found, state, _ = store.restore_step(workdir, 1, like(trained, other), like(optimizer().init(trained), NamedSharding(mesh, P())))
    assert {a.sharding for a in found.values()} == {other}
    assert_same(found, {n: a + 1 for n, a in trained.items()})
    assert_same(state, optimizer().init(trained))


def test_arrays_may_be_donated_as_soon_as_save_returns(workdir, trained):
    trained, wanted = ({n: copy(a) for n, a in trained.items()} for copy in (jnp.copy, np.array))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    with store.StepWriter(workdir) as writer:
        writer.save(1, trained, optimizer().init(trained), META)
        trained = overwrite(trained)
    checkpoint = open_checkpoint(workdir)
    for name, array in wanted.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_save_does_not_wait_for_the_manifest(workdir, trained, monkeypatch):
    may_write, write = threading.Event(), store._write_manifest
    monkeypatch.setattr(store, "_write_manifest", lambda directory: (may_write.wait(60), write(directory)))
    with store.StepWriter(workdir) as writer:
        writer.save(1, trained, optimizer().init(trained), META)  # returns although the manifest is held back
        assert store.newest_intact_step(workdir)[0] is None
        may_write.set()
        writer.wait()
        assert store.newest_intact_step(workdir) == (1, [])


def test_a_failure_in_the_background_is_raised_by_wait(workdir, trained, monkeypatch):
    def fail(directory):
        raise OSError("the disk is full")
    monkeypatch.setattr(store, "_write_manifest", fail)
    writer = store.StepWriter(workdir)
    writer.save(1, trained, optimizer().init(trained), META)
    with pytest.raises(UserError, match=f"{workdir}/checkpoints/1 could not be written: the disk is full"):
        writer.close()
    assert not list((workdir / "checkpoints").iterdir()), "what was written of it fills the disk"


def test_a_step_that_the_disk_has_no_room_for_is_refused_before_it_is_begun(workdir, trained, monkeypatch):
    size = sum(x.nbytes for x in jax.tree.leaves((trained, optimizer().init(trained))))
    free = size
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with store.StepWriter(workdir) as writer:
        writer.save(1, trained, optimizer().init(trained), META)
        free = size - 1
        with pytest.raises(UserError, match=r"checkpoints/2 needs 85\.9 kB; its disk has 85\.9 kB free"):
            writer.save(2, trained, optimizer().init(trained), META)
    assert store.steps(workdir) == [1]


def test_what_other_writes_of_a_failed_save_make_anew_is_deleted_too(tmp_path):
    step = tmp_path / "3"
    step.mkdir()
    late = threading.Timer(0.25, lambda: (step / "state").mkdir(parents=True))
    with pytest.raises(OSError, match="full"), store._deleted_if_failed(step):
        late.start()
        raise OSError("full")
    late.join()
    assert not step.exists()


def test_a_disk_that_fills_up_in_a_save_is_one_sentence(workdir, source, monkeypatch, capfd):
    """A limit on the size of files stands in for it: TensorStore fails in threads of Orbax, which would log each failure, and other
    writes end when the first has failed already, which would find no event loop any more."""
    unseen = []
    monkeypatch.setattr(sys, "unraisablehook", unseen.append)
    everything = {name: jnp.asarray(source.read(name)) for name in source.tensors if name.startswith("decoder/")}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=f"^{workdir}/checkpoints/1 could not be written: File too large$"):
            with store.StepWriter(workdir) as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
                writer.save(1, everything, optimizer().init(everything), META)
                writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    said = capfd.readouterr().err
    assert "ERROR" not in said and "exception" not in said and not unseen and store.newest_intact_step(workdir)[0] is None
    assert not list((workdir / "checkpoints").iterdir()), "what was written of it fills the disk"


def test_a_tree_is_base_and_newest_step(saved, source, trained):
    workdir = saved(5, 10)
    newest, older = open_checkpoint(workdir), open_checkpoint(workdir / "checkpoints" / "5")
    assert (newest.step, older.step, newest.layout, newest.config) == (10, 5, "tree", CFG)
    for checkpoint, step in ((newest, 10), (older, 5)):
        for name in checkpoint.tensors:
            wanted = trained[name] + step if name in trained else source.read(name)
            np.testing.assert_array_equal(checkpoint.read(name), wanted)
    assert load_params(newest).keys() == {"vision_tower", "projector", "decoder"}


def test_a_base_that_was_interrupted_is_written_anew(tmp_path, source):
    def fail(names):
        yield from names[:5]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "run", source, progress=fail)
    assert list((tmp_path / "run").iterdir()) == []
    write_model(tmp_path / "run", source)
    (tmp_path / "run" / "model" / "config.json").unlink()
    (tmp_path / "run" / "model").rmdir()  # stopped between base and model
    write_model(tmp_path / "run", source)
    assert open_checkpoint(tmp_path / "run").tensors.keys() == source.tensors.keys()


def test_a_base_is_held_to_its_hashes_when_it_is_read(saved, source, trained):
    workdir = saved(1)
    file = workdir / "base" / "model.safetensors"
    checkpoint, whole = open_checkpoint(workdir), file.read_bytes()
    frozen = {name: tensor for name, tensor in source.tensors.items() if name not in trained}
    for name, tensor in list(frozen.items())[::5]:
        at = whole.index(np.ascontiguousarray(tensor.load()).tobytes()) if tensor.load().std() else None  # ones and zeros are often there
        if at is None:
            continue
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(UserError, match=f"base is damaged: {name} has another sha256 than its manifest.json says"):
            checkpoint.read(name)
        with pytest.raises(UserError, match=f"{name} has another sha256"):
            base.check_base(workdir)
        file.write_bytes(whole)
    base.check_base(workdir)
    manifest = workdir / "base" / "manifest.json"
    hashes = json.loads(manifest.read_text())
    assert hashes.keys() == frozen.keys()
    manifest.write_text(json.dumps({**hashes, "decoder/norm/bias": "0"}))
    with pytest.raises(UserError, match="base is damaged: it lacks decoder/norm/bias, which its manifest.json names"):
        open_checkpoint(workdir)


def test_files_travel_with_the_model(tmp_path, source):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    config = CFG.replace(template="v1.5:mistral_instruct")
    write_model(tmp_path / "run", source, config=config, files={"tokenizer.model": tmp_path / "tokenizer.model"})
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.config == config
    assert checkpoint.files["tokenizer.model"].read_bytes() == b"pieces"


@pytest.mark.parametrize("part", ["params", "optimizer", "state"])
def test_a_flipped_bit_is_found_and_the_step_before_is_taken(part, saved):
    workdir = saved(5, 10)
    flip_a_bit(largest(workdir / "checkpoints" / "10" / part))
    step, damaged = store.newest_intact_step(workdir)
    assert step == 5
    assert len(damaged) == 1 and f"checkpoints/10 is damaged: {part}/" in damaged[0]


def test_opening_warns_of_a_damaged_step_and_refuses_it_by_name(saved):
    workdir = saved(5, 10)
    flip_a_bit(largest(workdir / "checkpoints" / "10" / "params"))
    with pytest.warns(UserWarning, match="checkpoints/10 is damaged: params/"):
        assert open_checkpoint(workdir).step == 5
    with pytest.raises(UserError, match="checkpoints/10 is damaged"):
        open_checkpoint(workdir / "checkpoints" / "10")


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda step: (step / "manifest.json").unlink(), "has no manifest.json: the save was interrupted"),
    (lambda step: (step / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
    (lambda step: largest(step / "params").unlink(), "lacks params/.*, which its manifest.json names"),
])
def test_what_else_may_be_wrong_with_a_step(spoil, sentence, saved):
    workdir = saved(5)
    spoil(workdir / "checkpoints" / "5")
    with pytest.raises(UserError, match=sentence):
        open_checkpoint(workdir)
    assert store.newest_intact_step(workdir)[0] is None


@pytest.mark.parametrize("where, what, number, code", [
    ("manifest.json", "stat", errno.EACCES, "Permission denied"), ("manifest.json", "open", errno.EIO, "Input/output error"),
    ("params/", "stat", errno.EIO, "Input/output error"), ("params/", "open", errno.EACCES, "Permission denied")])
def test_a_step_that_cannot_be_read_is_passed_over(saved, monkeypatch, where, what, number, code):
    """The directory may not be entered, or the disk fails."""
    workdir = saved(5, 10)

    def refusing(real):
        def act(path, *args, **kwargs):
            if f"checkpoints/10/{where}" in str(path):
                raise OSError(number, code, str(path))
            return real(path, *args, **kwargs)
        return act
    owner, name = {"stat": (Path, "is_file"), "open": (os, "open")}[what]
    monkeypatch.setattr(owner, name, refusing(getattr(owner, name)))
    step, (sentence,) = store.newest_intact_step(workdir)
    assert step == 5 and sentence.startswith(f"{workdir}/checkpoints/10") and sentence.endswith(f"cannot be read: {code}")


def test_a_name_that_no_file_can_have_is_a_damaged_manifest(saved):
    workdir = saved(5, 10)
    manifest = workdir / "checkpoints" / "10" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "params/" + "x" * 300: "0"}))
    step, (sentence,) = store.newest_intact_step(workdir)
    assert step == 5 and sentence == f"{workdir}/checkpoints/10 cannot be read: File name too long"


def test_a_damaged_step_is_replaced_by_saving_it_again(saved, trained):
    workdir = saved(5)
    flip_a_bit(largest(workdir / "checkpoints" / "5" / "params"))
    save(workdir, [5], trained)
    assert store.newest_intact_step(workdir) == (5, [])


KILLED = """
import os, sys, threading
from pathlib import Path
import jax.numpy as jnp
from llavamed_jax.checkpoints.tree import store

def run(workdir, moment):
    def die():  # as abrupt as SIGKILL: no handler, no atexit
        while not list((Path(workdir) / "checkpoints").glob(moment)):
            pass
        os._exit(9)

    writer = store.StepWriter(workdir)
    writer.save(1, {"decoder/norm/scale": jnp.ones(8)}, {"mu": jnp.ones(8)}, {})
    writer.wait()
    threading.Thread(target=die, daemon=True).start()
    writer.save(2, {f"decoder/layers_{i}/mlp/up_proj/kernel": jnp.ones((1024, 1024)) * i for i in range(20)}, {"mu": jnp.ones(8)}, {})
    writer.wait()

for workdir, moment in zip(sys.argv[1::2], sys.argv[2::2]):  # one process imports JAX, which has begun nothing yet, for all
    if os.fork() == 0:
        run(workdir, moment)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
MOMENTS = {"while it is written": "2.*", "before its manifest": "2"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Moment -> the workdir of a save that was killed then, and the exit status."""
    folders = {name: tmp_path_factory.mktemp("killed") for name in MOMENTS}
    done = subprocess.run([sys.executable, "-c", KILLED, *(str(word) for name in MOMENTS for word in (folders[name], MOMENTS[name]))],
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    return dict(zip(MOMENTS, zip(folders.values(), map(int, done.stdout.split()), strict=True), strict=True))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_save_never_looks_intact(moment, killed):
    workdir, status = killed[moment]
    is_whole = (workdir / "checkpoints" / "2" / "manifest.json").exists()
    assert status == 9 or is_whole  # on a busy machine the save may end before the kill comes
    step, damaged = store.newest_intact_step(workdir)
    if is_whole:
        assert (step, damaged) == (2, [])
    else:
        assert step == 1
        assert all("the save was interrupted" in sentence for sentence in damaged)
    with store.StepWriter(workdir) as writer:  # what the kill left is no hindrance
        assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) in ([".sealed", "1"], [".sealed", "1", "2"])
        writer.save(2, {"decoder/norm/scale": jnp.ones(8)}, {"mu": jnp.ones(8)}, {})
    assert store.newest_intact_step(workdir) == (2, [])


def test_keep_deletes_the_old(workdir, trained):
    with store.StepWriter(workdir) as writer:
        for step in (1, 2, 3, 4):
            writer.save(step, trained, optimizer().init(trained), META)
        writer.wait()
        writer.keep(2, also=[1])
        assert store.steps(workdir) == [1, 3, 4]
        writer.keep(1)
        assert store.steps(workdir) == [4]
    assert store.newest_intact_step(workdir) == (4, [])


def test_steps_beyond_the_one_that_was_reached_take_no_place(saved, trained):
    """Those that are damaged, behind which a run went back: kept in place of its own they would leave it none."""
    workdir = saved(5, 10)
    flip_a_bit(largest(workdir / "checkpoints" / "10" / "params"))
    with store.StepWriter(workdir) as writer:
        writer.save(7, trained, optimizer().init(trained), META)
        writer.wait()
        writer.keep(1, newest=7)
    assert store.steps(workdir) == [7, 10] and store.newest_intact_step(workdir)[0] == 7


def test_a_deletion_that_is_cut_short_leaves_no_step_that_looks_intact(saved, monkeypatch):
    workdir = saved(1, 2)

    def fail(directory):
        (directory / "state").rename(directory / "state-half-gone")
        raise KeyboardInterrupt
    with store.StepWriter(workdir) as writer:
        monkeypatch.setattr(store.shutil, "rmtree", fail)
        with pytest.raises(KeyboardInterrupt):
            writer.keep(1)
        monkeypatch.undo()
    assert not (workdir / "checkpoints" / "1" / "manifest.json").exists()
    assert store.newest_intact_step(workdir) == (2, [])


def test_a_step_goes_before_a_base_that_has_its_tensors_too(tmp_path, source, trained):
    write_model(tmp_path / "run", source)
    save(tmp_path / "run", [1], trained)
    found = open_checkpoint(tmp_path / "run")
    for name, array in trained.items():
        np.testing.assert_array_equal(found.read(name), array + 1)


def test_restoring_other_tensors_is_an_error_that_names_them(saved, trained):
    workdir = saved(5)
    wanted = like(trained)
    wanted["vision_tower/pre_layrnorm/scale"] = jax.ShapeDtypeStruct((32,), jnp.float32)
    wanted["decoder/norm/scale"] = jax.ShapeDtypeStruct((49,), jnp.float32)
    del wanted["projector/linear_0/bias"]
    with pytest.raises(UserError, match=r"missing: vision_tower/pre_layrnorm/scale \[32\].*unexpected: projector/linear_0/bias \[48\]"
                                        r".*decoder/norm/scale is \[48\] where \[49\]"):
        store.restore_step(workdir, 5, wanted, optimizer().init(trained))


def test_a_tree_is_checked_as_strictly_as_a_released_checkpoint(workdir, trained):
    with pytest.raises(UserError, match="tensors missing: projector/linear_0/kernel"):
        open_checkpoint(workdir)  # no step yet
    save(workdir, [1], trained)
    file = workdir / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "surprise": 1}))
    with pytest.raises(UserError, match="unknown keys .'surprise'"):
        open_checkpoint(workdir)


def test_a_step_that_does_not_exist(saved):
    workdir = saved(1)
    with pytest.raises(UserError, match="checkpoints/9 does not exist"):
        open_checkpoint(workdir / "checkpoints" / "9")
    for name in ("01", "1.bak", "²"):
        (workdir / "checkpoints" / "1").rename(other := workdir / "checkpoints" / name)
        with pytest.raises(UserError, match=f"checkpoints/{name} is not the directory of a step; DIR/checkpoints/STEP was expected"):
            open_checkpoint(other)
        other.rename(workdir / "checkpoints" / "1")


@pytest.mark.parametrize("part, shape, dtype, sentence", [
    ("nu", (3, 3), jnp.float32, r"optimizer: 1/0/nu/.* is float32 .*; float32 \[3, 3\] was expected"),
    ("mu", None, jnp.float32, r"optimizer: 1/0/mu/.* is bfloat16 .*; float32 .* was expected"),
    ("count", (), jnp.float32, r"optimizer: 1/0/count is int32 \[\]; float32 \[\] was expected"),
])
def test_restoring_another_optimizer_is_an_error_that_names_the_leaf(part, shape, dtype, sentence, saved, trained):
    def other(path, x):
        is_meant = f"/{part}" in jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.ShapeDtypeStruct(x.shape if shape is None else shape, dtype, sharding=x.sharding) if is_meant else x

    workdir = saved(1)
    state = like(optimizer().init(trained))
    with pytest.raises(UserError, match=sentence):
        store.restore_step(workdir, 1, like(trained), jax.tree_util.tree_map_with_path(other, state))
    with pytest.raises(UserError, match="optimizer: 1/0/count is int32 .*; no such array was expected"):
        store.restore_step(workdir, 1, like(trained), state[:1])


def test_a_first_save_that_was_killed_is_told_from_a_lost_manifest(workdir, trained):
    assert not store.has_sealed(workdir)
    save(workdir, [1], trained)
    (workdir / "checkpoints" / "1" / "manifest.json").unlink()
    assert store.has_sealed(workdir) and store.newest_intact_step(workdir)[0] is None
