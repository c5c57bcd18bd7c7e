"""What the loader's workers compute in tests, in a file of its own: each worker imports the file of what it computes."""

import logging
import os
import signal
import sys
import time
import warnings

import numpy as np

from llavamed_jax.utils import worker_notes


class Make:
    """Number -> a result, of which some never come: the worker says what it reads and waits."""

    def __init__(self, hanging=(), size=10):
        self.hanging, self.size = hanging, size

    def __call__(self, number):
        worker_notes.reading(f"images/{number}.png")
        time.sleep(60 if number in self.hanging else 0)
        return {"number": number, "array": np.full(self.size, number, np.int32)}


class Dying(Make):
    """Whose worker ends at a number."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __call__(self, number):
        if number == self.at:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(number)


class Printing:
    """Prints a text in each way, and warns."""

    def __init__(self, text):
        self.text = text

    def __call__(self, number):
        print("printed", self.text, file=sys.stderr, flush=True)
        warnings.warn(f"warned {self.text}", stacklevel=1)
        logging.getLogger("tests.worker").warning("logged %s", self.text)
        return {"number": number}
