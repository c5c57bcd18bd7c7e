"""Forks of this process, for what needs one of its own: to import JAX anew takes a second.

A fork has none of JAX's threads: it may read, write and start processes, but compute nothing with JAX.
"""

import multiprocessing
import os
import sys
import tempfile
import warnings


class Command:
    """A command in a fork, which can be killed.

    Args:
      main: returns the exit status.
      *closed: file descriptors that the fork lacks.
    """

    def __init__(self, main, *closed):
        self._stderr = tempfile.TemporaryFile("w+")

        def run():
            os.dup2(self._stderr.fileno(), 2)
            for each in closed:
                os.close(each)
            sys.stderr = open(2, "w", closefd=False)
            sys.exit(main())
        self.process = multiprocessing.get_context("fork").Process(target=run)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's, of computing in a fork
            self.process.start()

    def finish(self):
        """Waits for the end, two minutes at most; returns exit status and stderr."""
        self.process.join(120)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        with self._stderr:
            self._stderr.seek(0)
            return self.process.exitcode, self._stderr.read()
