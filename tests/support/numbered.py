"""What the loader's workers compute in tests, in a file of its own: each worker imports the file of what it computes."""

import os
import signal
import time

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
    """Whose worker ends at number 1."""

    def __call__(self, number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(number)
