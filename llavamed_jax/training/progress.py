"""What a run has counted so far, and whether it has learnt anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llavamed_jax.errors import UserError

# Why a run that learns nothing does not: how its sentence ends.
ZERO_GRADIENT = (": no parameter that trainable names has a part in the loss of the samples; a projector or a tower "
                 "has none in samples without an image")
UNMOVED = "; optimizer.learning_rate, eps and clip_norm decide how far an update goes"


@dataclass
class Progress:
    """What a run has counted, which its checkpoints carry."""

    samples: int = 0
    tokens: int = 0  # supervised
    samples_skipped: int = 0  # damaged records, and samples whose image could not be read
    images_skipped: int = 0  # that no marker stands for, or that a cut took away
    samples_truncated: int = 0  # longer than max_length
    samples_unsupervised: int = 0  # that teach nothing, because the original's label arithmetic did not add up
    updates_skipped: int = 0  # whose loss or gradient was not finite
    skipped_in_a_row: int = 0  # of them, since the last update that was
    zero_gradients: int = 0  # updates whose gradient was exactly 0
    zero_gradients_in_a_row: int = 0  # of them, since the last one that was not
    updates_moved: int = 0  # that moved the parameters
    updates_unmoved: int = 0  # that did not, though their learning rate was not 0
    best: dict | None = None  # {"step", "validation_loss"}


def check_something_was_trained(progress: Progress, total_steps: int, say: Callable[[str], None]) -> None:
    """Raises UserError at the end of a run that has learnt nothing. It is not finished and its last step is not saved.

    Args:
      progress: of the whole run.
      total_steps: its updates.
      say: gets a warning where every update was warm-up at a learning rate of 0.
    """
    skipped, zero = progress.updates_skipped, progress.zero_gradients
    if not progress.tokens:
        raise UserError(f"not one of the {progress.samples} samples that were seen has a supervised token, "
                        "so nothing was trained")
    if 2 * skipped >= total_steps:
        raise UserError(f"{skipped} of {total_steps} updates were skipped because loss, gradient or update was not "
                        "finite, so the run is not finished")
    if zero and zero + skipped >= total_steps:
        raise UserError(f"{zero} of {total_steps} updates had a gradient of exactly 0, "
                        f"so nothing was trained{ZERO_GRADIENT}")
    if progress.updates_unmoved and not progress.updates_moved:
        raise UserError(f"not one of {progress.updates_unmoved} updates moved the parameters, "
                        f"so nothing was trained{UNMOVED}")
    if not progress.updates_unmoved and not progress.updates_moved:
        say("warning: the learning rate was 0 in every update, for all of them are warm-up (optimizer.warmup_ratio): "
            "nothing was trained")
