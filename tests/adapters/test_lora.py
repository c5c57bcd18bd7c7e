"""Factors beside kernels: fresh ones change nothing, training moves them alone, runs store them alone, merging keeps the outputs."""

import functools
import json
import re
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llavamed_jax.adapters import peft_write
from llavamed_jax.adapters.lora import attach, config_with, merged
from llavamed_jax.adapters.open import open_model
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.tree import reference
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import AdapterConfig, AdapterRule, is_derived, is_factor
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.models.llava import Llava, abstract_params
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training import state as states
from llavamed_jax.training import void_keys
from llavamed_jax.training.step import DROPOUT, llava_loss, make_train_step, put_batch
from llavamed_jax.training.trainer import fit
from tests.support.programs import apply
from tests.support.training_runs import log_lines, shrunk, write_data, write_start
from tests.training.test_training_step import CFG, make_batch, optimizer_config

DECODER = r"decoder/layers_\d+/.*_proj"
ALL = r"(decoder|vision_tower)/layers_\d+/.*|projector/.*"
TRAINABLE = ("(decoder|vision_tower)/.*_lora_[ab]", "projector/.*_lora_[ab]")


def adapter(*regexes, rank=5, alpha=7.0, **others):
    return AdapterConfig(tuple(AdapterRule(regex, rank, alpha) for regex in regexes or (DECODER,)), **others)


def adapted(seed=0, is_random=True, **others):
    """The step tests' model with an adapter; its B is drawn, so that it does something."""
    checkpoint = attach(random_checkpoint(CFG, 3), adapter(ALL, **others), seed)
    if not is_random:
        return checkpoint
    rng = np.random.default_rng(5)
    drawn = {name: rng.standard_normal(t.shape, np.float32) / 4 for name, t in checkpoint.tensors.items() if name.endswith("lora_b")}
    return checkpoint.replace(tensors={**checkpoint.tensors, **{
        name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in drawn.items()}})


@functools.cache
def forward(config, dtype, scan):
    """The jitted model."""
    return jax.jit(Llava(config, dtype, scan=scan).apply)


def logits(checkpoint, scan=False, dtype=np.float32):
    batch = make_batch()
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(checkpoint.config, dtype, scan)(
            {"params": load_params(checkpoint, dtype, scan)}, batch["input_ids"], batch["pixel_values"], batch["positions"],
            batch["segment_ids"]))


@pytest.mark.parametrize("scan", [False, True])
def test_a_fresh_adapter_is_its_base_bit_for_bit(scan):
    base = logits(random_checkpoint(CFG, 3), scan)
    np.testing.assert_array_equal(logits(adapted(is_random=False), scan), base)
    assert np.abs(logits(adapted(), scan) - base).max() > 0.1


def test_factors_are_drawn_as_torch_draws_them():
    fresh = adapted(is_random=False)
    for name, tensor in fresh.tensors.items():
        if name.endswith("lora_a"):
            a, bound = tensor.load(), tensor.shape[0] ** -0.5
            assert np.abs(a).max() <= bound and np.abs(a).max() > 0.8 * bound and abs(a.mean()) < 0.2 * bound
            assert a.dtype == np.float32 and (a != adapted(seed=1, is_random=False).read(name)).all()


def test_scanned_is_unrolled_and_the_scale_is_float32_in_every_dtype():
    np.testing.assert_allclose(logits(adapted(), scan=True), logits(adapted()), atol=2e-5)
    flat = flatten_dict(load_params(adapted(use_rslora=True), jnp.bfloat16, scan=True), sep="/")
    scales = {name: x for name, x in flat.items() if name.endswith("lora_scale")}
    assert all(x.dtype == np.float32 and np.all(x == np.float32(7 / 5**0.5)) for x in scales.values()) and len(scales) == 7 + 6 + 2


def equations(jaxpr, times=1):
    """Every equation with how often it runs: those of a scan's body once a round."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in eqn.params.values():
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                    yield from equations(getattr(each, "jaxpr", each), inner)


@pytest.mark.parametrize("scan", [False, True])
def test_every_target_is_in_the_program_and_no_factors_are_merged(scan):
    """Counted in the forward and backward pass: a product with A and one with B a target, none of the kernel's shape."""
    config = config_with(CFG, adapter(DECODER))
    params = abstract_params(config, scan)
    flat = flatten_dict(params, sep="/")
    trained, frozen = states.partition(params, ("decoder/.*_lora_[ab]",))
    loss = llava_loss(Llava(config, scan=scan, remat="none"))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in texts().items()}
    step = jax.grad(lambda trained, frozen, batch: loss(states.merge(trained, frozen), batch)[0])
    jaxpr = jax.make_jaxpr(step)(trained, frozen, batch)
    products = Counter()
    kernels = {x.shape[-2:] for name, x in flat.items() if re.fullmatch(r"decoder/layers.*_proj/kernel", name)}
    for eqn, times in equations(jaxpr.jaxpr):
        for out in eqn.outvars:
            assert eqn.primitive.name not in ("add", "add_any", "mul", "dot_general") or out.aval.shape[-2:] not in kernels, eqn
        if eqn.primitive.name == "dot_general" and 5 in eqn.invars[1].aval.shape[-2:] and len(eqn.invars[1].aval.shape) == 2:
            products["A" if eqn.invars[1].aval.shape[1] == 5 else "B"] += times
    targets = 7 * CFG.decoder.num_layers
    assert products["A"] >= targets and products["B"] >= targets
    forward = Counter()
    for eqn, times in equations(jax.make_jaxpr(lambda p, b: loss(p, b)[0])(params, batch).jaxpr):
        if eqn.primitive.name == "dot_general" and len(eqn.invars[1].aval.shape) == 2 and 5 in eqn.invars[1].aval.shape:
            forward["A" if eqn.invars[1].aval.shape[1] == 5 else "B"] += times
    assert forward == {"A": targets, "B": targets}


@functools.cache
def program(config, mesh_spec, devices, micro_batches, seed):
    """Optimizer, shardings, update and mesh; compiled once for all tests."""
    mesh, params = make_mesh(mesh_spec, jax.devices()[:devices]), abstract_params(config, scan=True)
    optimizer, schedule = optimizers.build(optimizer_config(warmup_ratio=0.0, learning_rate=1e-2), 10, list(states.partition(params, TRAINABLE)[0]))
    shardings = states.state_shardings(config, params, TRAINABLE, optimizer, mesh)
    step = make_train_step(llava_loss(Llava(config, scan=True)), optimizer, schedule, mesh, shardings, micro_batches, dropout_seed=seed)
    return optimizer, shardings, step, mesh


@functools.cache
def texts():
    """Rows without an image, for adapters of the decoder alone."""
    return {name: x[1::2] for name, x in make_batch().items() if name != "pixel_values"}


@functools.cache
def dropout_gradients(remat):
    """Jitted (trained, frozen, batch) -> (loss, gradients) of the model with dropped out inputs of the decoder's factors."""
    loss = llava_loss(Llava(config_with(CFG, adapter(DECODER, dropout=0.25)), scan=True, remat=remat))
    return jax.jit(jax.value_and_grad(lambda trained, frozen, batch: loss(states.merge(trained, frozen), batch)[0]))


def dropout_params(**others):
    """(Factors, the rest) of that model; its B is drawn."""
    rng, checkpoint = np.random.default_rng(1), attach(random_checkpoint(CFG, 3), adapter(DECODER, dropout=0.25, **others), 0)
    flat = flatten_dict(load_params(checkpoint, scan=True), sep="/")
    flat = {name: rng.standard_normal(x.shape, np.float32) / 4 if name.endswith("lora_b") else x for name, x in flat.items()}
    return states.partition(flat, ("decoder/.*_lora_[ab]",))


def updated(checkpoint, number=2, mesh_spec="data=1", devices=1, micro_batches=1, seed=None):
    optimizer, shardings, step, mesh = program(checkpoint.config, mesh_spec, devices, micro_batches, seed)
    state = states.create(load_params(checkpoint, scan=True), shardings, optimizer, jnp.float32)
    losses = []
    for i in range(number):
        state, metrics = step(state, put_batch(make_batch(i), mesh))
        losses.append(float(metrics["loss"]))
    return jax.device_get({**state.trainable, **state.frozen}), np.array(losses)


def test_factors_move_and_nothing_else():
    checkpoint = adapted()
    before = flatten_dict(load_params(checkpoint, scan=True), sep="/")
    after, _ = updated(checkpoint)
    for name, x in before.items():
        assert np.array_equal(after[name], x) != is_factor(name), name


def test_on_a_mesh_the_update_is_that_of_one_device():
    checkpoint = adapted()
    (one, losses), (more, others) = updated(checkpoint), updated(checkpoint, 2, "data=2,fsdp=2,tp=2", 8)
    np.testing.assert_allclose(others, losses, rtol=2e-6)
    for name in filter(is_factor, one):
        assert np.linalg.norm(more[name] - one[name]) <= 1e-3 * np.linalg.norm(one[name]), name


def test_dropout_is_of_the_inputs_of_a_alone():
    """Its mean over many keys is the output without; the same key gives the same; without factors nothing is random."""
    trained, frozen = dropout_params(alpha=0.2)
    run = lambda n, frozen=frozen: float(dropout_gradients("none")(trained, frozen, {**texts(), DROPOUT: jax.random.key(n)})[0])
    without = run(0, {name: x * 0 if name.endswith("lora_dropout") else x for name, x in frozen.items()})
    values = np.array([run(n) for n in range(20)])
    assert run(3) == values[3] and len(set(values)) == 20
    assert abs(values.mean() - without) < 4 * values.std() / 20**0.5 + 2e-3 * abs(without) and values.std() > 1e-5 * abs(without)
    base, keyed = load_params(random_checkpoint(CFG, 3), scan=True), {**texts(), DROPOUT: jax.random.key(1)}
    assert "random_bits" not in str(jax.make_jaxpr(llava_loss(Llava(CFG, scan=True)))(base, keyed))


def test_dropouts_rate_and_scale():
    """One layer by hand: the share of zeros, and what is kept divided by the share that is kept."""
    from llavamed_jax.models.layers import Linear
    x = jnp.ones((64, 100))
    params = {"kernel": jnp.zeros((100, 100)), "kernel_lora_a": jnp.eye(100), "kernel_lora_b": jnp.eye(100),
              "kernel_lora_scale": jnp.float32(2), "kernel_lora_dropout": jnp.float32(0.25)}
    layer = Linear(100, (None, None), use_bias=False)
    y = np.asarray(apply(layer, params, x, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(y)) == {np.float32(0), np.float32(2 / 0.75)} and abs((y == 0).mean() - 0.25) < 0.02
    assert (np.asarray(apply(layer, params, x)) == 2).all()


def test_scale_and_rate_are_not_rounded_to_bfloat16():
    """As torch multiplies a bfloat16 tensor by PEFT's scale, a Python float: in float32, rounded once."""
    torch = pytest.importorskip("torch")
    from llavamed_jax.models.layers import Linear
    rng, (rank, alpha, rate) = np.random.default_rng(0), (11, 16.0, 0.1)
    x, a, b = (rng.standard_normal(shape, np.float32) for shape in ((32, 48), (48, rank), (rank, 40)))
    params = {"kernel": jnp.zeros((48, 40)), "kernel_lora_a": a, "kernel_lora_b": b, "kernel_lora_scale": jnp.float32(alpha / rank**0.5)}
    layer = Linear(40, (None, None), use_bias=False, dtype=jnp.bfloat16)
    x = jnp.asarray(x, jnp.bfloat16)
    bare = layer.apply({"params": {**params, "kernel_lora_scale": jnp.float32(1)}}, x)
    wanted = torch.from_numpy(np.asarray(bare, np.float32)).to(torch.bfloat16) * (alpha / rank**0.5)
    np.testing.assert_array_equal(np.asarray(layer.apply({"params": params}, x), np.float32), wanted.float().numpy())
    params |= {"kernel_lora_a": jnp.eye(48), "kernel_lora_b": jnp.eye(48), "kernel": jnp.zeros((48, 48)), "kernel_lora_scale": jnp.float32(1),
               "kernel_lora_dropout": jnp.float32(rate)}
    layer = Linear(48, (None, None), use_bias=False, dtype=jnp.bfloat16)
    y = np.asarray(layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(0)}), np.float32)
    wanted = np.asarray((x.astype(jnp.float32) / np.float32(1 - rate)).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(y[y != 0], wanted[y != 0])
    assert 0.8 < (y != 0).mean() < 1


def test_rematerialised_layers_draw_the_same_dropout():
    """The backward pass of a layer that is computed again has the mask of the forward pass; each layer has its own."""
    (trained, frozen), batch = dropout_params(), {**texts(), DROPOUT: jax.random.key(5)}
    _, grads = zip(*(dropout_gradients(remat)(trained, frozen, batch) for remat in ("none", "full")))
    for remat in ("none", "full"):  # the scan is given a key for each of the two layers
        assert "key<fry>[2]" in str(jax.make_jaxpr(dropout_gradients(remat))(trained, frozen, batch)), remat
    for name in trained:
        one, two = (np.asarray(each[name]) for each in grads)
        np.testing.assert_allclose(one, two, atol=2e-5 * np.abs(one).max(), err_msg=name)


@pytest.mark.slow
def test_every_update_and_micro_batch_has_its_own_dropout():
    checkpoint = adapted(dropout=0.3)
    whole, parts, again = (updated(checkpoint, 3, seed=seed, micro_batches=m)[1] for seed, m in ((1, 1), (1, 2), (1, 1)))
    np.testing.assert_array_equal(whole, again)
    assert (whole != parts).all()
    one_batch = [updated(checkpoint, 1, seed=1)[1][0] for _ in range(2)]
    assert one_batch[0] == one_batch[1] == whole[0]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_merged_equals_unmerged(dtype):
    checkpoint = adapted()
    result = merged(checkpoint.cast(dtype))
    assert result.config == CFG and not any(is_factor(name) for name in result.tensors)
    assert result.tensors["decoder/layers_0/mlp/up_proj/kernel"].load().dtype == dtype
    difference = np.abs(logits(result, dtype=np.float32) - logits(checkpoint)).max()
    assert difference < (2e-5 if dtype == np.float32 else 0.2)
    with pytest.raises(UserError, match="has no adapter to merge"):
        merged(result)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_merge_into_another_dtype_is_rounded_once(dtype):
    """A bfloat16 base: the sum is that of float32, and not one that went through the base's dtype first."""
    checkpoint, name = adapted(), "decoder/layers_0/mlp/up_proj/kernel"
    base = checkpoint.tensors[name]
    stored = base.load().astype(jnp.bfloat16)
    checkpoint = checkpoint.replace(tensors={**checkpoint.tensors, name: Tensor(base.shape, stored.dtype, lambda: stored)})
    wanted = stored.astype(np.float32) + np.float32(7 / 5) * (checkpoint.read(f"{name}_lora_a") @ checkpoint.read(f"{name}_lora_b"))
    result = merged(checkpoint, dtype)
    assert {tensor.dtype for tensor in result.tensors.values()} == {np.dtype(dtype)}
    np.testing.assert_array_equal(result.read(name), wanted.astype(dtype))


def test_the_config_is_read_as_it_was_written():
    config = config_with(CFG, adapter(DECODER, "projector/linear_0", use_rslora=True, dropout=0.5))
    assert LlavaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "adapter" not in CFG.to_dict()


@pytest.mark.parametrize("value, sentence", [
    ({"rules": 3}, "rules, use_rslora and dropout were expected"), ({"rules": [], "other": 1}, "rules, use_rslora and dropout"),
    ({"rules": [{"regex": "x"}]}, "regex, rank and alpha were expected"), ({"rules": [5]}, "an object was expected"),
    ({"rules": [{"regex": "(", "rank": 1, "alpha": 1}]}, "a regular expression was expected"),
    ({"rules": [{"regex": "x", "rank": 0, "alpha": 1}]}, "the rank 0; a whole number from 1"),
    ({"rules": [{"regex": "x", "rank": True, "alpha": 1}]}, "the rank True"),
    ({"rules": [{"regex": "x", "rank": 1, "alpha": "y"}]}, "alpha 'y'; a finite number"),
    ({"rules": [], "dropout": 1}, "dropout 1; 0 or more"), ({"rules": [], "use_rslora": 1}, "use_rslora 1; true or false")])
def test_a_bad_config_is_one_sentence(value, sentence):
    with pytest.raises(UserError, match=sentence):
        LlavaConfig.from_dict({**CFG.to_dict(), "adapter": value})


def test_targets_that_match_nothing_are_named():
    with pytest.raises(UserError, match=r"the target 'decoder/layer_0/.*', which matches no kernel of this model"):
        attach(random_checkpoint(CFG), adapter("decoder/layer_0/.*"), 0)
    with pytest.raises(UserError, match="has an adapter already"):
        attach(adapted(), adapter(DECODER), 0)


# ---- runs


RUN = {"lora.rank": 3, "lora.alpha": 6, "trainable": '["(decoder|vision_tower)/.*_lora_[ab]","projector/.*"]',
       "lora.targets": '["decoder/layers_.+/.*_proj","vision_tower/layers_.+/self_attn/q_proj"]',
       "optimizer.learning_rate": 1e-2, "mesh.data": 1, "mesh.fsdp": 1, "total_steps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, start) of a run of three updates; tests/quantized/test_qlora.py resumes one, on a mesh and with dropout."""
    folder = tmp_path_factory.mktemp("lora")
    start = write_start(folder / "start")
    assert fit(shrunk(start, write_data(folder), **RUN), folder / "run")
    return folder, start


def test_a_run_stores_factors_and_projector_and_names_its_base(run):
    folder, start = run
    assert not (folder / "run" / "base").exists()
    record = json.loads((folder / "run" / "base.json").read_text())
    assert record["checkpoint"] == str(start) and list(record["sha256"]) == ["base/manifest.json"]
    checkpoint = open_checkpoint(folder / "run")
    factors = [name for name in checkpoint.tensors if is_factor(name)]
    assert len(factors) == 2 * (7 + 2) and checkpoint.changed == {name for name in checkpoint.tensors if name.startswith("projector/")}
    base = open_checkpoint(start)
    for name in base.tensors:
        assert np.array_equal(checkpoint.read(name), base.read(name)) != name.startswith("projector/"), name
    unused = {f"vision_tower/layers_1/self_attn/q_proj/kernel_lora_{x}" for x in "ab"}  # no step has them, nor has the base
    assert {name for name in factors if not np.any(checkpoint.read(name))} == unused < {*checkpoint.unused}
    assert [line["step"] for line in log_lines(folder / "run") if "loss" in line] == [1, 2, 3]


def test_a_base_that_changed_or_went_is_said(run, tmp_path):
    folder, start = run
    here, there = shutil.copytree(folder / "run", tmp_path / "run"), shutil.copytree(start, tmp_path / "moved")
    record = json.loads((here / "base.json").read_text())
    (here / "base.json").write_text(json.dumps({**record, "checkpoint": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="names the base .*gone, which does not exist"):
        open_checkpoint(here)
    (here / "base.json").write_text(json.dumps({**record, "checkpoint": str(there)}))
    assert open_checkpoint(here).step == 3  # it may move
    assert fit(shrunk(start, folder, **RUN), here)
    manifest = there / "base" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(UserError, match="has changed since the run was started: base/manifest.json"):
        open_checkpoint(here)
    manifest.unlink()
    with pytest.raises(UserError, match="names the base .*moved, which has no base/manifest.json; the checkpoint that the run was started from"):
        open_checkpoint(here)
    for other in (here, folder / "run"):
        (here / "base.json").write_text(json.dumps({**record, "checkpoint": str(other)}))
        with pytest.raises(UserError, match=f"base.json names the base {other}, which is the workdir of a run that trains an adapter; "):
            open_checkpoint(here)
    (here / "base.json").write_text("{}")
    with pytest.raises(UserError, match="base.json is damaged"):
        open_checkpoint(here)


def test_a_tower_by_its_name_on_a_hub_is_written_as_the_directory_it_was_fetched_to(run, tmp_path, monkeypatch):
    folder, start = run
    checkpoint = attach(open_checkpoint(start), adapter(DECODER), 0)
    monkeypatch.setattr(reference.hub, "local", lambda name: tmp_path / "cache" / name)
    reference.write(tmp_path, checkpoint, "openai/clip")
    assert json.loads((tmp_path / "base.json").read_text())["vision_tower"] == str(tmp_path / "cache" / "openai/clip")


def test_another_base_of_the_same_shape_is_refused(run, tmp_path):
    folder, start = run
    here, other = shutil.copytree(folder / "run", tmp_path / "run"), tmp_path / "other"
    from llavamed_jax.checkpoints.tree.model import write_model
    write_model(other, random_checkpoint(open_checkpoint(start).config, 9))
    record = json.loads((here / "base.json").read_text())
    digest = __import__("hashlib").sha256((other / "base" / "manifest.json").read_bytes()).hexdigest()
    (here / "base.json").write_text(json.dumps({**record, "checkpoint": str(other), "sha256": {"base/manifest.json": digest}}))
    with pytest.raises(UserError, match="base.json has changed since the run"):
        open_checkpoint(here)


def test_an_exported_adapter_over_the_base_is_the_run(run, tmp_path):
    folder, start = run
    checkpoint = open_checkpoint(folder / "run")
    peft_write.write(checkpoint, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6, str(start))
    found = open_model(start, adapter=tmp_path / "out")
    assert found.tensors.keys() == checkpoint.tensors.keys()
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(found.read(name), checkpoint.read(name), err_msg=name)


def test_a_merged_run_answers_as_the_run(run, tmp_path):
    import llavamed_jax as lm
    from llavamed_jax.cli.convert import main
    folder, _ = run
    assert main(["merge-lora", "--base", str(folder / "run"), "--out", str(tmp_path / "merged")]) == 0
    one, two = lm.load(folder / "run"), lm.load(tmp_path / "merged")
    ids = np.arange(3, 23)[None]
    np.testing.assert_allclose(two.logits(ids, None), one.logits(ids, None), atol=2e-5)
    assert two.config.adapter is None and one.config.adapter is not None


def test_a_base_without_files_is_copied(run, tmp_path, capsys):
    from llavamed_jax.cli.convert import main
    """Of a preset, and of another run's step, which that run may delete; its adapter alone is opened over the run."""
    folder, start = run
    full = tmp_path / "full"
    assert fit(shrunk(start, folder, **{"total_steps": 1, "mesh.data": 2, "mesh.fsdp": 1}), full)
    assert fit(shrunk(full, folder, **RUN | {"total_steps": 1}), tmp_path / "run")
    assert (tmp_path / "run" / "base" / "manifest.json").is_file() and not (tmp_path / "run" / "base.json").exists()
    shutil.rmtree(full)
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.step == 1
    assert main(["export-lora", "--base", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "names the run itself, which PEFT cannot open; --base_name" in capsys.readouterr().out
    for opened in (open_model(tmp_path / "out"), open_model(tmp_path / "run", adapter=tmp_path / "out")):
        assert opened.changed == checkpoint.changed and opened.adapter_directory == tmp_path / "out"
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(opened.read(name), checkpoint.read(name), err_msg=name)
    other = tmp_path / "other"
    peft_write.write(checkpoint.replace(changed=frozenset()), other)
    with pytest.raises(UserError, match="lacks projector/linear_0/bias, .* which the run .* trained beside an adapter of its own"):
        open_model(tmp_path / "run", adapter=other)
    with pytest.raises(UserError, match="has an adapter already"):
        open_model(folder / "run", adapter=other)  # whose base is at hand


def test_a_run_from_an_adapter_or_with_bad_targets_is_refused(run, tmp_path):
    folder, start = run
    with pytest.raises(UserError, match="has an adapter already; `convert merge-lora` merges it"):
        fit(shrunk(folder / "run", folder, **RUN), tmp_path / "a")
    for targets, error, sentence in (('["decoder/lm_head"]', UserError, "factors of decoder/lm_head, which training cannot"),
                                     ('["decoder/x"]', UserError, "matches no kernel"), ("[]", UsageError, "'lora.targets' is empty"),
                                     ('["("]', UsageError, "not a valid regular expression")):
        changes = {**RUN, "lora.targets": targets, "trainable": '["projector/.*"]'}
        with pytest.raises(error, match=sentence):
            fit(shrunk(start, folder, **changes), tmp_path / "b")
    with pytest.raises(UserError, match="differs between layers; training scans"):
        config_with(CFG, adapter("decoder/layers_0/.*"))
        abstract_params(config_with(CFG, adapter("decoder/layers_0/.*")), scan=True)


@pytest.mark.parametrize("recipe, keys, sentence", [
    ("vqa_rad", ["lora.rank=4"], r"'trainable' names decoder/layers/mlp/down_proj/kernel, .* and the factors beside it too; the factors alone were expected"),
    ("vqa_rad", ["lora.rank=4", 'trainable=["decoder/layers_1/.*", "decoder/layers_0/.*_lora_[ab]"]'], r"names decoder/layers/mlp/down_proj/kernel, .* too"),
    ("lora_vqa", ['lora.targets=["decoder/layers_.+/.*_proj", "vision_tower/layers_.+/.*"]'],
     r"does not name vision_tower/layers/mlp/fc1/kernel_lora_b, .* would stay 0 and do nothing"),
    ("lora_vqa", ['trainable=["decoder/layers_1/.*_lora_[ab]", "projector/.*"]'], r"does not name decoder/layers/mlp/down_proj/kernel_lora_b"),
    ("lora_vqa", ['trainable=["decoder/.*_lora_a", "projector/.*"]'], r"does not name decoder/layers/mlp/down_proj/kernel_lora_b"),
    ("lora_vqa", [], None), ("lora_vqa", ['trainable=["decoder/.*_lora_b", "projector/.*"]'], None),  # A as it was drawn
    ("vqa_rad", ["lora.rank=4", 'trainable=["decoder/.*_lora_[ab]", "projector/.*", "decoder/norm/scale"]'], None)])
def test_a_kernel_or_all_its_factors_are_trained(recipe, keys, sentence):
    from llavamed_jax.adapters.lora import adapter_of
    from llavamed_jax.cli.common import load_config
    from llavamed_jax.training.program import Program
    cfg = load_config(f"configs/{recipe}.py:small", keys)
    build = lambda: Program.of(cfg, config_with(CFG, adapter_of(cfg)), make_mesh("data=1", jax.devices()[:1]), 5, tuple(cfg.trainable))
    if sentence is None:
        assert build()
    else:
        with pytest.raises(UsageError, match=sentence):
            build()


def test_over_a_base_of_few_bits_the_sum_is_of_its_exact_values(tmp_path):
    """Scales of bfloat16: the kernel is not rounded to their dtype before the factors are added."""
    from tests.checkpoints.test_quantised_export import exported
    _, _, out = exported(tmp_path / "hf", "int4", jnp.bfloat16)
    checkpoint = attach(open_checkpoint(out), adapter(DECODER), 0)
    rng = np.random.default_rng(5)
    drawn = {name: rng.standard_normal(t.shape, np.float32) / 4 for name, t in checkpoint.tensors.items() if name.endswith("lora_b")}
    checkpoint = checkpoint.replace(tensors={**checkpoint.tensors, **{name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in drawn.items()}})
    run = lambda checkpoint, as_stored: np.asarray(jax.jit(Llava(checkpoint.config).apply)(
        {"params": load_params(checkpoint, np.float32, as_stored=as_stored)}, np.arange(3, 27)[None]))
    with jax.default_matmul_precision("highest"):
        few, wide, result = run(checkpoint, True), run(checkpoint, False), run(merged(checkpoint, np.float32), False)
    for other in (wide, result):
        assert np.abs(other - few).max() < 2e-5 * np.abs(few).max()
    assert merged(checkpoint).tensors["decoder/layers_0/mlp/up_proj/kernel"].load().dtype == jnp.bfloat16


def test_a_run_over_a_base_of_few_bits_has_its_exact_values(tmp_path):
    """At its start, and when its base is read again; an evaluation of the run has the kernels in few bits."""
    from llavamed_jax.checkpoints.tree.base import open_base
    from llavamed_jax.checkpoints.tree.model import write_model
    from llavamed_jax.training.start import open_start
    from tests.checkpoints.test_quantised_export import exported
    _, _, out = exported(tmp_path / "hf", "int4", jnp.bfloat16)
    start = open_start(shrunk(out, tmp_path, **{"lora.rank": 3}))
    (tmp_path / "run").mkdir()
    write_model(tmp_path / "run", start, without=[name for name in start.tensors if is_factor(name)], stays=True)
    base, stored = open_base(tmp_path / "run"), open_checkpoint(out)
    rounded = [name for name, tensor in stored.tensors.items() if tensor.few_bits]
    assert len(rounded) == 14 and base.few_bits == "int4"
    for name in rounded:
        exact = np.asarray(stored.tensors[name].few_bits.load().widened(np.float32))
        assert (exact != stored.read(name)).any()
        for found in (start, base):
            np.testing.assert_array_equal(found.read(name), exact, err_msg=name)


def test_keys_without_a_rank_are_said_to_be_void(run):
    folder, start = run
    said = void_keys.sentences(shrunk(start, folder, **{"lora.alpha": 5, "lora.dropout": 0.1}))
    assert [re.search(r"'(lora\.\w+)'", sentence)[1] for sentence in said] == ["lora.alpha", "lora.dropout"]
    assert not any(map(is_derived, states.partition(abstract_params(config_with(CFG, adapter()), scan=True), [".*"])[0]))


def test_flags_of_a_model_need_a_model(tmp_path, capsys):
    from llavamed_jax.cli.eval import main
    argv = ["--config", "configs/eval/vqa_rad.py:demo", "--predictions", "x.jsonl", "--workdir", str(tmp_path / "w")]
    for flag, value in (("--adapter", "x"), ("--quantize", "int8")):
        assert main([*argv, flag, value]) == 2
        assert f"{flag} needs a model; it cannot be used with --predictions" in capsys.readouterr().err
