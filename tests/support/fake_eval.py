"""`eval.py` with a model that answers without computing: `python -m tests.support.fake_eval SECONDS [FAILING_PROCESS] -- FLAGS`.

An answer takes SECONDS; in the process FAILING_PROCESS the model fails at its tenth question. A lost process is noticed in HEARTBEAT seconds,
of the environment, or in five.
"""

import os
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

from llavamed_jax.cli import common
from llavamed_jax.cli import eval as cli
from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed


@dataclass
class Completion:
    text: str
    finish_reason: str = "stop"


class Processor:
    """An image's pixels are the number of its path; a prompt is one token."""

    stop = ()

    def __init__(self):
        self.prompts, self.paths = [], []

    def for_evaluation(self):
        return self

    def question(self, text, images):
        return text

    def encode(self, prompt):
        self.prompts.append(prompt)
        return [len(self.prompts) - 1]

    def expand(self, row):
        return row

    def images_uint8(self, paths):
        self.paths += paths
        return [len(self.paths) - 1]


class Model:
    def __init__(self, seconds, fails_in):
        self.processor, self.engine = Processor(), SimpleNamespace(max_prompt=9, eos=(2,))
        self.seconds, self.fails_in, self.answered = seconds, fails_in, 0

    def answer_each(self, prompts, **_):
        for index, (ids, images, nth) in enumerate(prompts):
            time.sleep(self.seconds)
            self.answered += 1
            if self.answered == 10 and distributed.process_index() == self.fails_in:
                raise UserError("the model is tired")
            yield index, Completion(f"{self.processor.prompts[ids[0]]} {self.processor.paths[images[0]].rsplit('/', 1)[-1]} {nth}")


if __name__ == "__main__":
    own, flags = sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]
    distributed.HEARTBEAT_S = int(os.environ.get("HEARTBEAT", 5))
    common.load_assistant = lambda args: Model(float(own[0]), int(own[1]) if own[1:] else -1)
    raise SystemExit(cli.main(flags))
