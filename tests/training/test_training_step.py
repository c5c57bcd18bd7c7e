"""One update: the loss, the split of the parameters, the optimizer beside torch's, micro-batches, shardings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from llavamed_jax.config import IMAGE_TOKEN, DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UsageError
from llavamed_jax.models.llava import Llava, abstract_params
from llavamed_jax.models.stacking import stack, unstack
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training import state as states
from llavamed_jax.training.losses import IGNORE, cross_entropy
from llavamed_jax.training.step import llava_loss, make_eval_step, make_train_step, put_batch

CFG = LlavaConfig(VisionConfig(16, 32, 3, 2, 16, 8),
                  DecoderConfig(64, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 128, architecture="mistral"), max_length=24)
TRAINABLE = ("projector/.*", "decoder/.*")
PROJECTOR = [f"projector/linear_{n}/{part}" for n in (0, 1) for part in ("kernel", "bias")]
OPTIMIZER = dict(learning_rate=1e-3, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
                 mu_dtype="float32", overrides=())


def optimizer_config(**changes):
    return ConfigDict({**OPTIMIZER, **changes})


@pytest.fixture(scope="module")
def params():
    """Unrolled random parameters whose norms are not at their initial value."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        is_scale = jax.tree_util.keystr(path).endswith("['scale']")
        return 0.02 * rng.standard_normal(x.shape, np.float32) + np.float32(is_scale)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(CFG))


def make_batch(seed=0, rows=8, length=24):
    """Rows of different lengths and numbers of supervised tokens; every other row has an image."""
    rng = np.random.default_rng(seed)
    P = CFG.tokens_per_image
    batch = dict(input_ids=rng.integers(3, 64, (rows, length)), labels=np.full((rows, length), IGNORE),
                 positions=np.tile(np.arange(length), (rows, 1)), segment_ids=np.zeros((rows, length)),
                 pixel_values=np.zeros((rows, 1, 16, 16, 3), np.float32))
    for row in range(rows):
        end = rng.integers(P + 4, length + 1)
        answer = rng.integers(P + 2, end)
        if row % 2 == 0:
            batch["input_ids"][row, 1:1 + P] = IMAGE_TOKEN
            batch["pixel_values"][row, 0] = rng.standard_normal((16, 16, 3))
        batch["labels"][row, answer:end] = batch["input_ids"][row, answer:end]
        batch["segment_ids"][row, :end] = 1
    return {n: x.astype(np.float32 if n == "pixel_values" else np.int32) for n, x in batch.items()}


@functools.cache
def program(mesh_spec="data=1", trainable=TRAINABLE, micro_batches=1, weighting="token"):
    """(optimizer, shardings, step, mesh) on as many devices as the mesh asks for; compiled once for all tests."""
    mesh = make_mesh(mesh_spec, jax.devices()[: math.prod(int(p.split("=")[1]) for p in mesh_spec.split(","))])
    abstract = abstract_params(CFG, scan=True)
    optimizer, schedule = optimizers.build(optimizer_config(warmup_ratio=0.0), 10, list(states.partition(abstract, trainable)[0]))
    shardings = states.state_shardings(CFG, abstract, trainable, optimizer, mesh)
    loss = llava_loss(Llava(CFG, scan=True), weighting)
    step = make_train_step(loss, optimizer, schedule, mesh, shardings, micro_batches, weighting)
    return optimizer, shardings, step, mesh


def build(params, mesh_spec="data=1", trainable=TRAINABLE, micro_batches=1, weighting="token"):
    """(state, step, mesh) before the first update."""
    optimizer, shardings, step, mesh = program(mesh_spec, trainable, micro_batches, weighting)
    return states.create(stack(params), shardings, optimizer, jnp.float32), step, mesh


@functools.cache
def evaluation(weighting="token"):
    return make_eval_step(llava_loss(Llava(CFG, scan=True), weighting), program()[3])


def train(built, batches):
    state, step, mesh = built
    losses = []
    for batch in batches:
        state, metrics = step(state, put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return state, np.array(losses)


# ---- the loss

CROSS_ENTROPY = jax.jit(cross_entropy)


def test_loss_is_torchs_and_counts_each_segment_alone():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 9, 11), np.float32) * 3
    labels = rng.integers(0, 11, (2, 9))
    labels[0, :3] = labels[1, 5] = IGNORE
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9])
    total, count = CROSS_ENTROPY(logits, labels, segments)
    pairs = [(b, t) for b in range(2) for t in range(8)
             if labels[b, t + 1] != IGNORE and segments[b, t] == segments[b, t + 1] != 0]
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.stack([logits[b, t] for b, t in pairs])), torch.tensor([labels[b, t + 1] for b, t in pairs]), reduction="sum")
    assert int(count) == len(pairs) == 3 + 7
    np.testing.assert_allclose(float(total), float(expected), rtol=1e-6)


def test_loss_without_supervision_is_zero_over_zero():
    total, count = CROSS_ENTROPY(np.ones((2, 9, 11), np.float32), np.full((2, 9), IGNORE), np.ones((2, 9), int))
    assert (float(total), float(count)) == (0.0, 0.0)


# ---- the split

def test_partition_is_by_whole_names(params):
    trained, frozen = states.partition(stack(params), ["projector/.*"])
    assert set(trained) == set(PROJECTOR)
    assert "decoder/layers/mlp/up_proj/kernel" in frozen and not set(trained) & set(frozen)


@pytest.mark.parametrize("regex", ["projektor/.*", "projector", "decoder/("])
def test_regex_that_is_wrong_names_itself(params, regex):
    with pytest.raises(UsageError) as error:
        states.partition(stack(params), ["decoder/.*", regex])
    assert repr(regex) in str(error.value)


# ---- the optimizer

@pytest.mark.parametrize("ratio, steps", [
    (0.03, 100), (0.0, 10), (0.34, 10), (0.03, 3906), (0.03, 1), (0.0, 1), (1.0, 1), (1.0, 7), (0.5, 2), (0.03, 120_000)])
def test_schedule_is_that_of_earlier_runs_and_transformers(ratio, steps):
    """At every update, and at the end of the run, where the value is what the last metrics show."""
    ours = np.asarray(jax.jit(jax.vmap(optimizers.warmup_cosine(2e-3, ratio, steps)))(np.arange(steps + 1)))
    assert ours[0] == (0 if ratio else np.float32(2e-3)), "the first update of a run that warms up changes nothing"
    # The hand-written schedule of earlier commits, in float32 as it was.
    warmup, step = math.ceil(ratio * steps), np.arange(steps + 1, dtype=np.float32)
    cosine = 0.5 * (1.0 + np.cos(np.pi * np.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)))
    assert cosine.dtype == np.float32
    earlier = 2e-3 * np.where(step < warmup, step / max(1, warmup), cosine)
    np.testing.assert_allclose(ours, earlier, rtol=0, atol=2e-7 * 2e-3)
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    scheduler = transformers.get_cosine_schedule_with_warmup(torch.optim.SGD([torch.zeros(1)], lr=2e-3), warmup, steps)
    rates = [2e-3 * scheduler.lr_lambdas[0](step) for step in range(steps + 1)]
    np.testing.assert_allclose(ours, rates, rtol=0, atol=2e-7 * 2e-3)


def test_updates_are_torch_adamw_with_clipping(params):
    """Twenty updates on the same gradients: AdamW with decay groups, clipped by the norm over what is trained."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps, rate, decay = 20, 1e-3, 0.1
    names = list(states.partition(stack(params), TRAINABLE)[0])
    flat = {n: x for n, x in states.partition(stack(params), TRAINABLE)[0].items()}
    theirs = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in flat.items()}
    is_plain = lambda n: n.endswith(("scale", "bias"))
    optimizer = torch.optim.AdamW([dict(params=[p for n, p in theirs.items() if not is_plain(n)], weight_decay=decay),
                                   dict(params=[p for n, p in theirs.items() if is_plain(n)], weight_decay=0.0)], lr=rate)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * steps), steps)
    transform, _ = optimizers.build(optimizer_config(weight_decay=decay, warmup_ratio=0.1), steps, names)
    ours, opt_state = flat, jax.jit(transform.init)(flat)

    @jax.jit
    def updated(grads, opt_state, ours):
        updates, opt_state = transform.update(grads, opt_state, ours)
        return optax.apply_updates(ours, updates), opt_state

    for seed in range(steps):
        rng = np.random.default_rng(seed)
        grads = {n: rng.standard_normal(x.shape, np.float32) * np.float32(10.0 ** rng.integers(-4, 0)) for n, x in flat.items()}
        ours, opt_state = updated(grads, opt_state, ours)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        scheduler.step()
    for name in names:
        np.testing.assert_allclose(ours[name], theirs[name].detach().numpy(), rtol=0, atol=2e-7, err_msg=name)


def first_update(changes, params):
    """(updates, state) of the first update, whose gradients are the parameters."""
    transform, _ = optimizers.build(optimizer_config(**changes), 10, list(params))
    return jax.jit(lambda x: transform.update(x, transform.init(x), x))(params)


def test_override_sets_the_learning_rate_of_what_it_names():
    """Of two that match, the first counts."""
    params = {"projector/linear_0/kernel": np.ones(3, np.float32), "decoder/norm/scale": np.ones(3, np.float32)}
    updates_with = lambda *overrides: [float(x[0]) for x in first_update(dict(warmup_ratio=0.0, overrides=overrides), params)[0].values()]
    with pytest.raises(UsageError, match="vision"):
        updates_with(("vision/.*", 2e-5))
    for overrides, rest in (((("projector/.*", 2e-5),), 1e-3), ((("projector/.*", 2e-5), (".*", 3e-5)), 3e-5)):
        found = dict(zip(sorted(params), updates_with(*overrides), strict=True))  # a compiled function sorts a dict
        assert found == pytest.approx({"projector/linear_0/kernel": -2e-5, "decoder/norm/scale": -rest}, rel=1e-5)


def test_a_clip_norm_of_zero_clips_nothing():
    """As LLaVA-1.5 was trained."""
    for clip_norm, moment in ((1.0, 0.1 * 0.5), (0.0, 0.1 * 100)):
        _, state = first_update(dict(clip_norm=clip_norm), {"a/kernel": np.full(4, 100, np.float32)})
        np.testing.assert_allclose(state[1].mu["a/kernel"], moment, rtol=1e-5)


def test_an_eps_beyond_float32_moves_nothing():
    updates, _ = first_update(dict(eps=1e300, warmup_ratio=0.0), {"a/kernel": np.ones(4, np.float32)})
    assert not np.asarray(updates["a/kernel"]).any()


def test_first_moment_has_the_dtype_of_the_recipe():
    transform, _ = optimizers.build(optimizer_config(mu_dtype="bfloat16"), 10, ["a/kernel"])
    adam = transform.init({"a/kernel": jnp.ones(3)})[1]
    assert (adam.mu["a/kernel"].dtype, adam.nu["a/kernel"].dtype) == (jnp.bfloat16, jnp.float32)


# ---- the update

@pytest.fixture(scope="module")
def single(params):
    """Four updates on one device: what every other way of computing them is compared with."""
    state, losses = train(build(params), [make_batch(s) for s in range(4)])
    assert losses[-1] < losses[0] + 1 and np.isfinite(losses).all()
    return state, losses


def assert_same(a, b, atol):
    for name in a.trainable:
        np.testing.assert_allclose(np.asarray(a.trainable[name]), np.asarray(b.trainable[name]), rtol=0, atol=atol, err_msg=name)


def test_frozen_parameters_keep_their_bits_and_the_rest_moves(params, single):
    state, _ = single
    trained, frozen = states.partition(stack(params), TRAINABLE)
    assert frozen and all(np.array_equal(np.asarray(state.frozen[n]), frozen[n]) for n in frozen)
    assert all(not np.array_equal(np.asarray(state.trainable[n]), trained[n]) for n in trained)


@pytest.mark.parametrize("mesh, micro_batches", [("data=2,fsdp=2,tp=2", 2), ("fsdp=8", 1)])
def test_sharded_and_accumulated_is_single(params, single, mesh, micro_batches, capfd):
    """Also with a micro-batch for each half of the rows, whose numbers of supervised tokens are uneven."""
    counts = (make_batch(0)["labels"] != IGNORE).sum(1)
    assert len(set(counts)) > 4, "the rows must differ in supervised tokens for this test to see a mean of means"
    state, losses = train(build(params, mesh, micro_batches=micro_batches), [make_batch(s) for s in range(4)])
    assert "rematerialization" not in capfd.readouterr().err, "XLA gathers an array that should stay sharded"
    np.testing.assert_allclose(losses, single[1], rtol=1e-6)
    assert_same(state, single[0], 2e-5)
    assert len(state.trainable["decoder/layers/mlp/up_proj/kernel"].sharding.device_set) == 8


def test_moments_lie_like_their_parameters(params):
    state, _, _ = build(params, "data=2,fsdp=2,tp=2")
    adam = state.opt_state[1]
    for name, value in state.trainable.items():
        assert adam.mu[name].sharding == adam.nu[name].sharding == value.sharding, name
    assert not state.trainable["decoder/layers/mlp/up_proj/kernel"].sharding.is_fully_replicated


# ---- every sample alike

@pytest.fixture(scope="module")
def by_hand(params):
    """(batches, losses, gradients' norms, parameters) where each sample's mean loss is computed on its own, from whole logits,
    and averaged over all samples of a batch: also with one that has no supervised token, whose share of the gradient is 0."""
    batches = [make_batch(seed) for seed in range(3)]
    batches[1]["labels"][3] = IGNORE
    optimizer, *_ = program()
    model, (trained, frozen) = Llava(CFG, scan=True), states.partition(stack(params), TRAINABLE)
    opt_state, losses, norms = jax.jit(optimizer.init)(trained), [], []

    def mean(trained, batch):
        logits = model.apply({"params": states.merge(trained, frozen)}, batch["input_ids"], batch["pixel_values"], batch["positions"],
                             batch["segment_ids"])
        alone = jax.vmap(lambda *row: cross_entropy(*(x[None] for x in row)))
        total, count = alone(logits, batch["labels"], batch["segment_ids"])
        means = total / jnp.maximum(count, 1)
        return means.mean(), means

    @jax.jit
    def update(trained, opt_state, batch):
        (_, means), grads = jax.value_and_grad(mean, has_aux=True)(trained, batch)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, means, optax.tree.norm(grads)

    for batch in batches:
        trained, opt_state, means, norm = update(trained, opt_state, batch)
        losses.append(float(means[means > 0].mean()))
        norms.append(float(norm))
    return batches, losses, norms, trained


def packed(batch):
    """The eight rows two and two in rows of twice the length, one sample's padding within the row."""
    def pair(name, x):
        x = x.reshape(4, 2, *x.shape[1:])
        if name == "segment_ids":
            x = x * np.array([1, 2])[None, :, None]
        return x.reshape(4, -1, *x.shape[3:])
    return {name: pair(name, x).astype(x.dtype) for name, x in batch.items()}


@pytest.mark.parametrize("mesh, micro_batches, is_packed", [
    ("data=1", 4, True), ("fsdp=2,tp=2", 2, True), ("data=1", 1, False), ("data=2,fsdp=2,tp=2", 2, False), ("data=8", 1, False)])
def test_by_sample_each_sample_weighs_alike(params, by_hand, mesh, micro_batches, is_packed):
    batches, losses, norms, wanted = by_hand
    assert len(set((batches[0]["labels"] != IGNORE).sum(1))) > 4, "samples must differ in supervised tokens"
    state, step, mesh = build(params, mesh, micro_batches=micro_batches, weighting="sample")
    for batch, loss, norm in zip(batches, losses, norms, strict=True):
        state, metrics = step(state, put_batch(packed(batch) if is_packed else batch, mesh))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["tokens"]) == (batch["labels"][:, 1:] != IGNORE).sum()
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    for name, value in wanted.items():
        np.testing.assert_allclose(np.asarray(state.trainable[name]), value, rtol=0, atol=2e-5, err_msg=name)


def of_rows(state, batch, rows):
    """(sum of losses, number of supervised tokens) of some rows; the labels of all others are ignored."""
    chosen = np.isin(np.arange(8), rows)[:, None]
    return evaluation()(state, put_batch({**batch, "labels": np.where(chosen, batch["labels"], IGNORE)}, program()[3]))


def test_validation_by_sample_is_the_mean_of_the_samples_means(params):
    state, _, mesh = build(params)
    batch = make_batch(0)
    batch["labels"][5] = IGNORE
    parts = [of_rows(state, batch, [i]) for i in range(8)]
    total, count = evaluation("sample")(state, put_batch(batch, mesh))
    assert float(count) == 7 and float(parts[5][1]) == 0
    np.testing.assert_allclose(float(total), sum(float(t / c) for t, c in parts if c), rtol=1e-6)


def test_gradient_that_is_not_finite_moves_nothing(params):
    built = build(params)
    state, step, mesh = built
    bad = make_batch(0)
    bad["pixel_values"][0, 0, 0, 0, 0] = np.nan
    before = {n: np.array(x) for n, x in state.trainable.items()}
    state, metrics = step(state, put_batch(bad, mesh))
    assert float(metrics["skipped"]) == 1 and int(state.skipped) == 1 and int(state.step) == 1
    assert all(np.array_equal(before[n], np.asarray(x)) for n, x in state.trainable.items())
    assert int(state.opt_state[1].count) == 0
    state, metrics = step(state, put_batch(make_batch(0), mesh))
    assert float(metrics["skipped"]) == 0 and float(metrics["learning_rate"]) == pytest.approx(1e-3)
    assert any(not np.array_equal(before[n], np.asarray(x)) for n, x in state.trainable.items())


def test_the_old_states_memory_is_used_for_the_new_one(params):
    """All of it, what is frozen too: else parameters and moments would be held twice."""
    state, step, mesh = build(params)
    old = jax.tree.leaves(state)
    step(state, put_batch(make_batch(0), mesh))
    assert all(x.is_deleted() for x in old)


@pytest.mark.parametrize("optimizer, slope, offset, finite", [
    (optax.chain(optax.scale(1e38), optax.scale(1e38)), 1, 0, (True, True)), (optax.clip_by_global_norm(1.0), 1e30, 0, (True, False)),
    (optax.scale(-1e-3), 1, math.inf, (False, True))], ids=["update", "norm", "loss"])
def test_each_of_loss_norm_and_update_must_be_finite(params, optimizer, slope, offset, finite):
    """What the optimizer makes of a finite gradient, a norm that overflows, a loss: one alone is enough."""
    mesh = make_mesh("data=1", jax.devices()[:1])
    shardings = states.state_shardings(CFG, stack(params), ("projector/.*",), optimizer, mesh)
    state = states.create(stack(params), shardings, optimizer, jnp.float32)
    before = {n: np.array(x) for n, x in state.trainable.items()}
    summed = lambda tree, batch: (offset + sum(slope * x.sum() for x in jax.tree.leaves(tree["projector"])), jnp.float32(0))
    state, metrics = make_train_step(summed, optimizer, lambda _: jnp.float32(0), mesh, shardings)(state, {})
    assert float(metrics["skipped"]) == 1 and float(metrics["tokens"]) == 0
    assert (np.isfinite(float(metrics["loss"])), np.isfinite(float(metrics["grad_norm"]))) == finite
    assert all(np.array_equal(before[n], np.asarray(x)) for n, x in state.trainable.items())


CLIPPED = optimizers.build(optimizer_config(warmup_ratio=0.0, clip_norm=1e-30), 10, PROJECTOR)[0]


@pytest.mark.parametrize("optimizer, size, moved", [(optax.scale(1e-16), 1e-16, 0), (optax.scale(1e-12), 1e-12, 1), (CLIPPED, None, 0)],
                         ids=["still", "moving", "clipped"])
def test_a_change_that_only_zeros_can_take_on_moves_nothing(params, optimizer, size, moved):
    """Float32 holds 1e-16 beside nothing else: a run of such updates learns nothing. Where the gradient is clipped so far, AdamW too
    makes such updates."""
    mesh = make_mesh("data=1", jax.devices()[:1])
    params = {name: np.zeros_like(x) for name, x in flatten_dict(stack(params), sep="/").items()}
    shardings = states.state_shardings(CFG, params, ("projector/.*",), optimizer, mesh)
    total = lambda tree, batch: (sum(x.sum() for x in jax.tree.leaves(tree["projector"])), jnp.float32(1))
    state, metrics = make_train_step(total, optimizer, lambda _: jnp.float32(1), mesh, shardings)(
        states.create(params, shardings, optimizer, jnp.float32), {})
    changed = np.asarray(state.trainable[PROJECTOR[0]])
    assert float(metrics["moved"]) == moved and changed.any()
    assert size is None or np.allclose(changed, size, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_numbers_that_overflow_in_the_optimizer_stay_while_the_update_counts_as_skipped(params, mu_dtype):
    """Two of many, in AdamW itself, again and again: they and their moments keep their bits, and nothing is ever not finite."""
    optimizer, _ = optimizers.build(optimizer_config(warmup_ratio=0.0, learning_rate=1e38, clip_norm=0.0, mu_dtype=mu_dtype), 10, PROJECTOR)
    mesh, name = make_mesh("data=1", jax.devices()[:1]), "projector/linear_0/kernel"
    shardings = states.state_shardings(CFG, stack(params), ("projector/.*",), optimizer, mesh)
    params = flatten_dict(stack(params), sep="/")
    params[name] = params[name].copy()
    params[name][:2, 0] = -3e38
    ones = lambda tree, batch: (sum((x - jax.lax.stop_gradient(x)).sum() for x in jax.tree.leaves(tree["projector"])), jnp.float32(1))
    state = states.create(params, shardings, optimizer, jnp.float32)
    step = make_train_step(ones, optimizer, lambda _: jnp.float32(0), mesh, shardings)
    for number in (1, 2):
        state, metrics = step(state, {})
        adam = state.opt_state[1]
        assert (float(metrics["skipped"]), int(state.skipped), int(state.step)) == (1, 0, number)
        assert int(adam.count) == number, "the bias of the moments that were written is corrected by as many updates"
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves((state.trainable, adam.mu, adam.nu)))
        assert np.array_equal(np.asarray(state.trainable[name])[:2, 0], np.float32([-3e38, -3e38]))
        assert not np.asarray(adam.mu[name], np.float32)[:2, 0].any()
        assert (np.asarray(state.trainable[name])[2:] < -1e37).all() and np.asarray(adam.mu[name], np.float32)[2:].all()


def test_gradient_is_taken_of_the_trainable_part_alone(params):
    """A frozen decoder's weights have no gradient: the step of stage 1 does fewer FLOPs than that of stage 2."""
    flops = []
    for trainable in (("projector/.*",), TRAINABLE):
        state, step, mesh = build(params, trainable=trainable)
        flops.append(step.lower(state, put_batch(make_batch(), mesh)).cost_analysis()["flops"])
    assert flops[0] < 0.8 * flops[1]


def test_validation_weighs_by_tokens(params):
    state, _, mesh = build(params)
    parts = [of_rows(state, make_batch(), rows) for rows in (range(4), range(4, 8))]
    total, count = evaluation()(state, put_batch(make_batch(), mesh))
    assert float(parts[0][1]) != float(parts[1][1])
    np.testing.assert_allclose(sum(float(p[0]) for p in parts), float(total), rtol=1e-6)
    assert sum(float(p[1]) for p in parts) == float(count)


def test_what_goes_to_disk_is_one_array_a_layer(params):
    ours, theirs = unstack(flatten_dict(stack(params), sep="/")), flatten_dict(params, sep="/")
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_bfloat16_is_close_and_keeps_what_is_trained_in_float32(params, single):
    """As on an accelerator: computation and frozen parameters in bfloat16, what is trained and its moments in float32."""
    optimizer, shardings, _, mesh = program()
    state = states.create(stack(params), shardings, optimizer, jnp.bfloat16)
    evaluate = make_eval_step(llava_loss(Llava(CFG, jnp.bfloat16, scan=True)), mesh)
    total, count = evaluate(state, put_batch(make_batch(0), mesh))
    assert float(total / count) == pytest.approx(single[1][0], rel=1e-2)
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
    numbers = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim)
    assert numbers(state.opt_state) == 2 * numbers(state.trainable), "what is frozen has no moments"
    assert {x.dtype for x in state.trainable.values()} == {x.dtype for x in state.opt_state[1].mu.values()} == {jnp.dtype("float32")}


def test_a_models_shapes_are_the_callers_own():
    """They are computed once a config; who takes a leaf out changes nobody else's."""
    for scan in (True, False):
        first, second = (abstract_params(CFG, scan=scan) for _ in range(2))
        before = flatten_dict(second)
        del first["decoder"]["norm"]["scale"]
        assert flatten_dict(second) == before == flatten_dict(abstract_params(CFG, scan=scan))
    assert "layers" not in second["decoder"] and "layers" in abstract_params(CFG, scan=True)["decoder"]
