"""Saves the steps of a run in its workdir, checks that they stay there, and deletes old ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.tree import store
from llavamed_jax.errors import UserError, some
from llavamed_jax.models.stacking import unstack
from llavamed_jax.parallel import distributed
from llavamed_jax.training.place import Place
from llavamed_jax.training.progress import Progress
from llavamed_jax.training.state import TrainState


class Saver:
    """Saves steps in the background, one at a time. All processes call it.

    Args:
      writer: writes the steps.
      place: the run's lock on the workdir.
      keep: `checkpoint` of the recipe.
      progress: names the best step.
      say: gets warnings.
      step: the step that the run resumes from; 0 to begin.

    Attributes:
      saved: the newest step that was given to the writer.
    """

    def __init__(self, writer: store.StepWriter, place: Place, keep: ConfigDict, progress: Progress,
                 say: Callable[[str], None], step: int):
        self._writer, self._place, self._keep, self._progress, self._say = writer, place, keep, progress, say
        self.saved = step
        self._is_unsaved = False  # whether the last save failed or was removed; two in a row end the run

    def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Saves a step, after checking that the step before is saved and that the workdir is the run's own.

        If the step before could not be written, a warning says why, and this one gets a try: what had filled the disk
        may be gone.

        Args:
          state: copied before this returns.
          meta: what the step records; `step` is its number.

        Raises:
          UserError: this step does not fit on the disk, or two saves in a row could not be written; with several
            processes, one.
        """
        self._is_saved()
        self._write(state, meta)

    def finish(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Waits for the newest step, saves it again if it failed or somebody has removed it, and deletes old steps.

        In a bucket the step has to be there, too.

        Args:
          state: the run's state.
          meta: what the step records; `step` is its number.

        Raises:
          UserError: the step could not be written twice, was removed twice, or the bucket lacks it.
        """
        if not self._is_saved():  # the state is still in memory
            self._write(state, meta)
            if not self._is_saved():
                raise UserError(f"step {self.saved} was saved twice, and both times removed from {self._place.workdir}")
        distributed.from_first(self._place.settle)
        if held := self._delete_old():
            self._say(f"other programs are reading the steps {some(list(map(str, held)))}, so these steps are kept; "
                      "delete them later")

    def wait(self) -> None:
        """Waits for the save in progress."""
        self._writer.wait()

    def _write(self, state: TrainState, meta: Mapping[str, Any]) -> None:
        self._writer.save(meta["step"], unstack(state.trainable), state.opt_state, meta)
        self.saved = meta["step"]
        self._delete_old()

    def _is_saved(self) -> bool:
        """Waits for the last save and returns whether it is still in its place; warns if it is not.

        Raises:
          Lost: the workdir no longer belongs to the run.
          UserError: the save before the last one had failed, too; with several processes, which may not all know of a
            failure, the last one failed.
        """
        failed = ""
        try:
            self._writer.wait()
        except UserError as error:
            if jax.process_count() > 1 or self._is_unsaved:
                raise
            failed = str(error)
        self._is_unsaved = bool(failed)
        workdir = self._place.workdir

        def look() -> str:
            self._place.check()
            if not self.saved or failed or self._writer.is_there(self.saved):
                return failed
            return f"{workdir}/checkpoints/{self.saved} was removed after it was saved and is lost"

        if sentence := distributed.from_first(look):
            others = store.steps(workdir)
            self._say(f"warning: {sentence}; the remaining steps: {some(list(map(str, others))) or 'none'}")
        return not sentence

    def _delete_old(self) -> list[int]:
        """Deletes old steps and returns those that readers hold. A step that is being written is kept."""
        best = [self._progress.best["step"]] if self._keep.keep_best and self._progress.best else []
        return self._writer.keep(self._keep.keep, also=best, newest=self.saved)
