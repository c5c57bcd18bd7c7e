"""Fifty updates of the whole model beside torch (benchmarks/yardstick.py has all stages, rates and mistakes)."""

import pytest

pytest.importorskip("torch", reason="torch's CPU build is not installed")

from benchmarks import yardstick
from tests.support import hf


@pytest.fixture(scope="module")
def stage_2():
    """(how far apart, torch's training) of decoder and projector at 1e-3."""
    (_, _, found, theirs), = yardstick.yardstick(("2",), (yardstick.HIGH_RATE,))
    return found, theirs


def test_fifty_updates_are_torchs(stage_2, measured):
    found, theirs = stage_2
    assert max(theirs.losses) - min(theirs.losses) > 1, "the losses must move for their agreement to say something"
    assert found.smallest_change > 1e-3, "and so must every tensor"
    assert found.frozen_is_identical and found.change <= yardstick.CHANGE_TOLERANCE
    measured(found.loss, 0, yardstick.LOSS_TOLERANCE)


@pytest.mark.parametrize("mistake", ["b2 of 0.99", *(
    pytest.param(m, marks=pytest.mark.slow) for m in yardstick.MISTAKES if m != "b2 of 0.99")])
def test_a_mistake_fails(stage_2, mistake):
    assert not yardstick.with_mistake(mistake, stage_2[1], yardstick.HIGH_RATE, hf.llava()[1]).passes


@pytest.fixture(scope="module")
def by_sample():
    """HF's rule with one sample a micro-batch, in torch."""
    return yardstick.by_sample()


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "packed" else pytest.mark.slow) for name in yardstick.WEIGHTED])
def test_fifty_updates_by_sample_are_those_of_hfs_trainer(by_sample, name, measured):
    """`loss_weighting=sample`, with samples that have no supervised token among them; weighed by token the losses are far off."""
    found = yardstick.weighted_here(*by_sample, **yardstick.WEIGHTED[name])
    if yardstick.WEIGHTED[name].get("weighting") == "token":
        assert found.loss > 0.1 and found.change > 0.1
        return
    assert found.frozen_is_identical and found.smallest_change > 1e-3 and found.change <= 1e-4
    measured(found.loss, 0, yardstick.LOSS_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["stage", yardstick.HIGH_RATE])
def test_the_stages_one_after_the_other_are_torchs(rate):
    for stage, _, found, _ in yardstick.yardstick(rates=(rate,)):
        assert found.passes, (stage, found)
