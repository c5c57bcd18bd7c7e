"""Counts the progress of a run, and checks whether it has learnt anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llavamed_jax.errors import UserError

# The end of the error messages for a run that learns nothing: the likely reason.
ZERO_GRADIENT = (": the loss does not depend on the parameters that trainable names, for example on a projector or a "
                 "tower if the samples have no image")
UNMOVED = "; optimizer.learning_rate, eps and clip_norm determine the size of an update"


@dataclass
class Progress:
    """The counts of a run so far, which its checkpoints carry.

    Attributes:
      samples: samples trained on.
      tokens: supervised tokens trained on.
      samples_skipped: damaged records, and samples with an image that could not be read.
      images_skipped: images without a marker, or removed when the sample was cut.
      samples_truncated: samples longer than max_length.
      samples_unsupervised: samples without a supervised token, because the original's label arithmetic does not add up.
      updates_skipped: updates with a loss, gradient or update that was not finite.
      skipped_in_a_row: consecutive skipped updates up to now.
      zero_gradients: updates with a gradient of exactly 0.
      zero_gradients_in_a_row: consecutive updates with a gradient of exactly 0 up to now.
      updates_moved: updates that moved the parameters.
      updates_unmoved: updates that did not move the parameters, though their learning rate was not 0.
      samples_read: samples that were read, skipped ones included.
      unreadable: samples with an image that could not be read; a record counts in each epoch.
      unreadable_anew: those of them that were not known to lose an image when they were measured.
      best: {"step", "validation_loss"} of the best saved step; None before the first validation.
    """

    samples: int = 0
    tokens: int = 0
    samples_skipped: int = 0
    images_skipped: int = 0
    samples_truncated: int = 0
    samples_unsupervised: int = 0
    updates_skipped: int = 0
    skipped_in_a_row: int = 0
    zero_gradients: int = 0
    zero_gradients_in_a_row: int = 0
    updates_moved: int = 0
    updates_unmoved: int = 0
    samples_read: int = 0
    unreadable: int = 0
    unreadable_anew: int = 0
    best: dict | None = None


def check_something_was_trained(progress: Progress, total_steps: int, say: Callable[[str], None]) -> None:
    """Raises UserError if a whole run has learnt nothing; the run is then not finished and its last step is not saved.

    Args:
      progress: the counts of the whole run.
      total_steps: updates of the run.
      say: gets a warning if the learning rate was 0 in every update.
    """
    skipped, zero = progress.updates_skipped, progress.zero_gradients
    if not progress.tokens:
        raise UserError(f"none of the {progress.samples} samples seen has a supervised token, so nothing was trained")
    if 2 * skipped >= total_steps:
        raise UserError(f"{skipped} of {total_steps} updates were skipped because their loss, gradient or update was "
                        "not finite, so the run is not finished")
    if zero and zero + skipped >= total_steps:
        raise UserError(f"{zero} of {total_steps} updates had a gradient of exactly 0, "
                        f"so nothing was trained{ZERO_GRADIENT}")
    if progress.updates_unmoved and not progress.updates_moved:
        raise UserError(f"none of {progress.updates_unmoved} updates changed the parameters, "
                        f"so nothing was trained{UNMOVED}")
    if not progress.updates_unmoved and not progress.updates_moved:
        say("warning: the learning rate was 0 in every update, because all updates are warm-up "
            "(optimizer.warmup_ratio); nothing was trained")
