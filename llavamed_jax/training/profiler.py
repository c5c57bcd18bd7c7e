"""Traces a few updates of a run with JAX's profiler."""

from __future__ import annotations

from collections.abc import Callable

import jax

from llavamed_jax.training.log import MetricsWriter
from llavamed_jax.training.place import Place


class Profiler:
    """Traces updates into the run's TensorBoard directory. As a context manager it ends an open trace.

    Args:
      span: the first and the last update; None for no trace.
      place: the run's directory.
      log: gets a line when the trace ends.
    """

    def __init__(self, span: tuple[int, int] | None, place: Place, log: MetricsWriter):
        self._first, self._last = span or (0, 0)
        self._place, self._log = place, log
        self._is_on = self._is_done = False

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int, drain: Callable[[], None]) -> None:
        """Begins the trace before its first update. `drain` waits for earlier updates, which are not traced."""
        if self._first <= step <= self._last and not self._is_on:
            drain()
            if jax.process_index() == 0:
                jax.profiler.start_trace(str(self._place.workdir / "tensorboard"))
            self._is_on = True

    def after(self, step: int, drain: Callable[[], None]) -> None:
        """Ends the trace after its last update was dispatched. `drain` waits for that update."""
        if self._is_on and step >= self._last:
            drain()
            self._end()

    def __exit__(self, *_) -> None:
        if self._is_on:
            self._end()
        elif self._last and not self._is_done:
            self._log.say(f"updates {self._first} to {self._last} did not run, so nothing was profiled")

    def _end(self) -> None:
        if jax.process_index() == 0:
            jax.profiler.stop_trace()
        self._is_on, self._is_done = False, True
        self._log.say(f"the trace of updates {self._first} to {self._last} is in "
                      f"{self._place.name}/tensorboard/plugins/profile")
