"""Ends a run of which too many samples turn out to have an image that cannot be read (`data.skip_limit`)."""

from __future__ import annotations

import math

from llavamed_jax.errors import UserError
from llavamed_jax.pipeline.packing import Plan

_EARLY = 1000  # the share of unreadable images is judged on at least so many samples, if the data has them


class SkipLimit:
    """The limit for a plan's samples.

    Args:
      plan: the rows, with the lengths of all records.
      limit: the share of samples that may be skipped.
    """

    def __init__(self, plan: Plan, limit: float):
        self._limit, self._samples, self._weights = limit, len(plan.stream), plan.stream.weights()
        self._is_known = (plan.lengths.tokens == 0) | plan.lengths.is_lossy  # damaged, or losing an image
        self._known = float(self._weights[self._is_known].sum())
        self._usable = float(self._weights[plan.lengths.tokens > 0].sum())  # samples that an epoch reads

    def is_known(self, record: int) -> bool:
        """Returns whether a record was known to be damaged or to lose an image when it was measured."""
        return bool(self._is_known[record])

    def refuse(self, records: set[int], seen: int, reason: str) -> None:
        """Raises UserError if too many records cannot be read, alone or together with those that were known before.

        Args:
          records: numbers of the records with an unreadable image.
          seen: samples that were read.
          reason: why the last one cannot be read.
        """
        anew = [record for record in records if not self._is_known[record]]
        self._refuse(len(records), float(self._weights[anew].sum()) if anew else 0.0, seen, reason)

    def refuse_counts(self, unreadable: int, anew: int, seen: int, reason: str) -> None:
        """Does the same by counts of a whole run, in which a record counts once an epoch.

        Args:
          unreadable: samples with an unreadable image so far, over all epochs.
          anew: those of them that were not known to lose an image.
          seen: samples that were read so far.
          reason: why the last one cannot be read.
        """
        # A part of an epoch counts as one, so that its share is too small and never too large. Damaged records are not
        # read; the sum of the weights is rounded, because it may be inexact.
        epochs = max(1, math.ceil(round(seen / max(self._usable, 1), 6)))
        self._refuse(unreadable / epochs, anew / epochs, seen, reason)

    def _refuse(self, unreadable: float, anew: float, seen: int, reason: str) -> None:
        if not unreadable:
            return
        samples = self._samples
        if unreadable > self._limit * min(samples, max(seen, _EARLY)):
            raise UserError(f"{unreadable:.0f} of the first {min(samples, seen)} samples have an unreadable image, "
                            f"more than the allowed {self._limit:.0%} (data.skip_limit); the last: {reason}")
        if self._known + anew > self._limit * samples:
            raise UserError(f"{self._known + anew:.0f} of the {samples} samples cannot be used or lose an image "
                            f"({unreadable:.0f} have an unreadable image), more than the allowed {self._limit:.0%} "
                            f"(data.skip_limit); the last: {reason}")
