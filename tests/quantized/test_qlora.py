"""Training of factors beside rounded kernels (QLoRA): the state's bits, resuming, meshes, answers in training, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llavamed_jax.adapters.lora import adapter_of, attach
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config.adapter import is_factor
from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation.during_training import Samples, TrainedModel
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.stacking import stack, unstack
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.training import state as states
from llavamed_jax.training.callbacks import Callbacks
from llavamed_jax.training.program import Program
from llavamed_jax.training.step import llava_loss, make_train_step, put_batch
from llavamed_jax.training.trainer import fit
from tests.quantized.test_quantized_model import path  # noqa: F401
from tests.support.training_runs import log_lines, set_back, shrunk, write_data

QLORA = {"quantize": "int4", "lora.rank": 3, "lora.alpha": 6, "trainable": '["decoder/.*_lora_[ab]","projector/.*"]',
         "optimizer.learning_rate": 1e-2, "mesh.data": 2, "mesh.fsdp": 1, "total_steps": 5}
# Dropout, micro-batches, and factors of the tower too, of which the last layer's are in no step.
RUN = {**QLORA, "lora.dropout": 0.2, "micro_batches": 2, "trainable": '["(decoder|vision_tower)/.*_lora_[ab]","projector/.*"]',
       "lora.targets": '["decoder/layers_.+/.*_proj","vision_tower/layers_.+/self_attn/q_proj"]'}


def recipe(path, folder, **changes):  # noqa: F811
    return shrunk(path, folder, **{**QLORA, **changes})


@pytest.fixture(scope="module")
def run_with_answers(path, tmp_path_factory):  # noqa: F811
    """The folder of a run, and the answers that its sampler gave at its end."""
    folder, answers, sampler = tmp_path_factory.mktemp("qlora"), [], Samples(TrainedModel())
    callbacks = Callbacks(sampler=lambda snapshot: answers.append(sampler(snapshot)) or answers[-1])
    assert fit(recipe(path, write_data(folder), **RUN, samples_every=5), folder / "run", callbacks)
    return folder, answers


@pytest.fixture(scope="module")
def run(run_with_answers):
    return run_with_answers[0]


@pytest.mark.parametrize("how, element", [("int8", jnp.int8), ("int4", jnp.int4), ("nf4", jnp.uint4)])
def test_the_state_has_few_bits_and_counts_them(path, tmp_path, how, element):  # noqa: F811
    cfg = recipe(path, write_data(tmp_path), quantize=how)
    checkpoint = attach(open_checkpoint(path), adapter_of(cfg), 0)
    mesh = make_mesh("data=1", jax.devices()[:1])
    program, exact = (Program.of(c, checkpoint.config, mesh, 5, tuple(cfg.trainable)) for c in (cfg, recipe(path, tmp_path, quantize=None)))
    state = program.initial_state(checkpoint)
    rounded = {name: x for name, x in state.frozen.items() if isinstance(x, Kernel)}
    assert len(rounded) == 7 and all(x.shape[0] == 2 for x in rounded.values())
    assert all({leaf.dtype for leaf in jax.tree.leaves(x)} >= {jnp.dtype(element)} for x in rounded.values())
    abstract = program.abstract_state()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    weights = sum(np.prod(x.shape) for x in rounded.values())
    saved = exact.state_bytes() - program.state_bytes()
    assert 0.7 * weights * (4 - (1 if how == "int8" else 0.5)) < saved < weights * (4 - (1 if how == "int8" else 0.5))


def test_updates_are_those_of_the_widened_kernels_and_the_same_on_a_mesh(path, tmp_path):  # noqa: F811
    """The gradient passes through the rounded kernels as through the same values in float32."""
    cfg = recipe(path, write_data(tmp_path))
    checkpoint = attach(open_checkpoint(path), adapter_of(cfg), 0)
    config, rng = checkpoint.config, np.random.default_rng(0)
    ids = rng.integers(3, 90, (8, 20)).astype(np.int32)
    batch = dict(input_ids=ids, labels=ids, positions=np.tile(np.arange(20, dtype=np.int32), (8, 1)), segment_ids=np.ones((8, 20), np.int32))

    def updated(spec, devices, is_widened=False):
        mesh = make_mesh(spec, jax.devices()[:devices])
        program = Program.of(recipe(path, tmp_path, quantize=None) if is_widened else cfg, config, mesh, 5, tuple(cfg.trainable))
        params = load_params(checkpoint, scan=True, quantize="int4")
        if is_widened:
            flat = flatten_dict(load_params(checkpoint, quantize="int4"), sep="/")
            widened = {name: np.asarray(x.widened(jnp.float32)) if isinstance(x, Kernel) else np.asarray(x) for name, x in flat.items()}
            params = stack(states.merge(widened, {}))
        state = states.create(params, program.shardings, program.optimizer, jnp.float32)
        step = make_train_step(llava_loss(Llava(config, scan=True)), program.optimizer, program.schedule, mesh, program.shardings)
        losses = []
        for _ in range(3):
            state, metrics = step(state, put_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        return jax.device_get(state.trainable), np.array(losses)

    (wide, losses), (one, same), (more, others) = updated("data=1", 1, True), updated("data=1", 1), updated("data=2,fsdp=2,tp=2", 8)
    np.testing.assert_allclose(same, losses, rtol=2e-6)
    np.testing.assert_allclose(others, losses, rtol=5e-6)
    for name in filter(is_factor, wide):
        assert np.linalg.norm(one[name] - wide[name]) <= 1e-3 * np.linalg.norm(wide[name]), name
        assert np.linalg.norm(more[name] - wide[name]) <= 5e-3 * np.linalg.norm(wide[name]), name


def test_resuming_is_bit_exact(run, path, tmp_path):  # noqa: F811
    again = set_back(run / "run", tmp_path / "run", last=5, to=3)
    assert fit(recipe(path, run, **RUN), again)
    one, two = open_checkpoint(run / "run"), open_checkpoint(again)
    for name in one.tensors:
        assert one.read(name).tobytes() == two.read(name).tobytes(), name
    losses = lambda where: [line["loss"] for line in log_lines(where) if "loss" in line]
    assert losses(again) == losses(run / "run") and len(losses(again)) == 5


def test_a_run_keeps_its_bits(run, path):  # noqa: F811
    with pytest.raises(UsageError, match="'quantize' is 'nf4', but .* with 'int4'"):
        fit(recipe(path, run, **RUN | {"quantize": "nf4"}), run / "run")
    base, tuned = open_checkpoint(path), open_checkpoint(run / "run")
    assert all(np.array_equal(tuned.read(name), base.read(name)) for name in base.tensors if not name.startswith("projector/"))
    factors = [name for name in tuned.tensors if is_factor(name)]
    unused = {f"vision_tower/layers_1/self_attn/q_proj/kernel_lora_{x}" for x in "ab"}
    assert len(factors) == 2 * (14 + 2) and {name for name in factors if not tuned.read(name).any()} == unused  # B began at 0


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_with_its_quantize_it_is_evaluated_over_the_kernels_it_was_trained_with(run, path, dtype):  # noqa: F811
    cfg, tuned = recipe(path, run, **RUN), open_checkpoint(run / "run")
    program = Program.of(cfg, tuned.config, make_mesh("data=1", jax.devices()[:1]), 5, tuple(cfg.trainable))
    trained = unstack(dict(program.initial_state(attach(open_checkpoint(path), adapter_of(cfg), 0)).frozen))
    asked = flatten_dict(load_params(tuned, dtype, quantize="int4", as_stored=True), sep="/")
    kernels = {name: x for name, x in asked.items() if isinstance(x, Kernel)}
    assert len(kernels) == 14
    for name, kernel in kernels.items():
        for one, two in zip(jax.tree.leaves(kernel), jax.tree.leaves(trained[name]), strict=True):
            assert one.dtype == two.dtype and np.array_equal(np.asarray(one), np.asarray(two)), name


def test_what_cannot_be_is_refused(path, tmp_path):  # noqa: F811
    folder = write_data(tmp_path)
    for changes, sentence in (({"lora.rank": 0}, "'quantize' is 'int4' and lora.rank is 0; a rank was expected"),
                              ({"trainable": '["decoder/.*"]'}, "'trainable' names decoder/layers/.*kernel, which is rounded"),
                              ({"quantize": "int2"}, "'quantize' is 'int2'; int8 or int4 or nf4 or None was expected")):
        with pytest.raises(UsageError, match=sentence):
            fit(recipe(path, folder, **changes), tmp_path / "run")


def test_answers_during_training_are_the_quantised_models(run_with_answers):
    _, (answers,) = run_with_answers
    assert answers and all(isinstance(each.answer, str) for each in answers)
