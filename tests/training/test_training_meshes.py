"""A checkpoint moves between meshes: what eight devices saved is, in bits, what two or one get back."""

import jax
import numpy as np
import pytest

from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree import store
from llavamed_jax.checkpoints.tree.base import open_base
from llavamed_jax.checkpoints.tree.model import open_tree, write_model
from llavamed_jax.cli.common import load_config
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.models.stacking import unstack
from llavamed_jax.parallel.mesh import make_mesh, put
from llavamed_jax.training import resume
from llavamed_jax.training.program import Program
from llavamed_jax.training.progress import Progress
from tests.support.training_runs import ROOT

# Of few shapes: for each, and for each of its parts on the eight devices, a save compiles a program.
CFG = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(32, 32, 32, 2, 4, 4, 8, 1e-5, 1e4, 128, architecture="mistral"))
META = {"data": {"position": 7}, "progress": vars(Progress(updates_skipped=1)), "seed": 0}


def program_on(spec: str, number: int, checkpoint) -> Program:
    recipe = load_config(f"{ROOT}/configs/finetune.py:small", ["optimizer.mu_dtype=bfloat16", 'trainable=["projector/.*","decoder/(norm|lm_head|layers/mlp)/.*"]'])
    return Program.build(recipe, checkpoint, make_mesh(spec, jax.devices()[:number]), 8)


def at_random(tree):
    """The same shapes, dtypes and places, filled with numbers of which no two are alike."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: put(rng.standard_normal(x.shape).astype(x.dtype), x.sharding), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir, checkpoint = tmp_path_factory.mktemp("run"), random_checkpoint(CFG)
    program = program_on("fsdp=4,tp=2", 8, checkpoint)
    state = program.initial_state(checkpoint)
    state = state.replace(trainable=at_random(state.trainable), opt_state=at_random(state.opt_state))
    assert any(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in jax.tree.leaves(state.opt_state))
    write_model(workdir, checkpoint, without=program.trained_names())
    with store.StepWriter(workdir) as writer:
        writer.save(5, unstack(state.trainable), state.opt_state, META)
    return workdir, checkpoint, state


@pytest.mark.parametrize("spec, number", [("data=2,fsdp=2,tp=2", 8), ("data=2", 2), ("data=1", 1)])
def test_eight_devices_state_is_the_same_on_others(saved, spec, number):
    workdir, checkpoint, wanted = saved
    program = program_on(spec, number, checkpoint)
    found, progress = resume.restore(workdir, 5, open_base(workdir), program, META)
    assert (int(found.step), int(found.skipped), progress.updates_skipped) == (5, 1, 1)
    for part in ("trainable", "frozen", "opt_state"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
            assert len(one.sharding.device_set) == number
        placed = jax.tree.leaves(jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim), ours,
                                              getattr(program.shardings, part)))
        assert all(placed)


def test_a_tree_on_disk_knows_no_mesh(saved):
    """What eight devices trained is read as any checkpoint is."""
    workdir, _, state = saved
    read = open_tree(workdir)
    for name, value in unstack(state.trainable).items():
        assert np.array_equal(read.read(name), np.asarray(value)), name
