"""The shape of a run's rows follows from how samples really pack: rows of an update, their length, and nothing to pack."""

import numpy as np
import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.pipeline.lengths import Lengths
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.pipeline.sizes import AUTO, rows_an_update
from llavamed_jax.pipeline.trial import Trial

TWO_IMAGES = np.random.default_rng(0).normal(1250, 30, 150)  # of 576 tokens each: a row of 2,048 holds one sample
ONE_IMAGE = 576 + np.random.default_rng(1).lognormal(3, 0.6, 150)
TEXTS = np.random.default_rng(2).normal(70, 15, 2500).clip(20, 130)


def lengths_of(tokens, images=1):
    tokens = np.asarray(tokens).astype(np.int32)
    return Lengths(tokens, np.full(len(tokens), images, np.int16), [], 0, 0, 0)


@pytest.mark.parametrize("tokens, images, batch_size, shards, row_length", [
    (TWO_IMAGES, 2, 64, 8, 0), (ONE_IMAGE, 1, 64, 8, 0), (TEXTS, 0, 500, 4, 0), (TWO_IMAGES, 2, 64, 8, 2048), (ONE_IMAGE, 1, 64, 8, 4096)])
def test_an_update_is_close_exactly_if_its_rows_hold_the_batch(tokens, images, batch_size, shards, row_length):
    found, stream = lengths_of(tokens, images), Stream((len(tokens),), (len(tokens),), 0, True)
    trial = Trial(stream, found, 9.0)
    made = rows_an_update(batch_size, found.mean, shards, AUTO, row_length, found.longest, trial.samples_a_row)
    rows = Plan(stream, found, Layout(made.row_length, trial.image_slots(made.row_length), made.rows, True)).rows(0)
    samples = made.rows * len(rows.records) / len(rows)
    assert made.samples == pytest.approx(samples, rel=0.03) and made.is_close == (abs(made.samples / batch_size - 1) <= 0.1)
    other = min(abs((made.rows + step * shards) * samples / made.rows - batch_size) for step in (-1, 1))
    assert abs(samples - batch_size) <= other + 0.03 * batch_size  # no other number of rows is nearer
    assert row_length or made.is_close and made.samples * found.mean > 0.8 * made.rows * made.row_length


def test_a_usual_length_that_leaves_rows_empty_gives_way_to_a_fuller_one():
    found, stream = lengths_of(TWO_IMAGES, 2), Stream((150,), (150,), 0, True)
    assert rows_an_update(64, 1250, 8, AUTO, 2048).is_close  # 64 rows of one sample would make the batch
    made = rows_an_update(64, found.mean, 8, AUTO, 0, found.longest, Trial(stream, found, 9.0).samples_a_row)
    assert made.row_length not in (2048, 4096, 8192) and made.rows < 64


@pytest.mark.parametrize("is_packed", [True, False])
def test_an_epoch_that_leaves_out_all_usable_samples_is_one_sentence(is_packed):
    """A damaged source, and so little of a good one that the first epoch takes none, or the second epoch."""
    tokens = np.zeros(40, np.int32)
    tokens[39] = 20
    found = Lengths(tokens, np.ones(40, np.int16), [{"id": 0, "reason": "record 0 is torn"}], 0, 0, 0)
    for seed, epoch in ((0, 1), (0, 2)):
        is_taken = lambda stream, epoch: tokens[stream.order(epoch - 1)].any()
        seed = next(s for s in range(99) if [is_taken(Stream((20, 20), (20, 3), s, True), e) for e in range(1, epoch + 1)]
                    == [*[True] * (epoch - 1), False])
        stream = Stream((20, 20), (20, 3), seed, True)
        with pytest.raises(UserError, match=rf"none of the samples that epoch {epoch} takes can be used \(1 of the 40 samples can, "
                                            r"but the weights of their sources leave them out\); the first: record 0 is torn"):
            if is_packed and epoch == 1:
                Trial(stream, found, 9.0)
            Plan(stream, found, Layout(64, 1, 2, is_packed)).num_updates(2)
        if epoch == 1:
            with pytest.raises(UserError, match="none of the samples that epoch 1 takes"):
                Plan(stream, found, Layout(64, 1, 2, is_packed))
