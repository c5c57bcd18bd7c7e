"""The generation engine: takes requests and returns tokens.

A fixed number of rows is decoded together, up to `steps` tokens on the device before the host reads them. When a
request finishes, the next waiting one takes its row (continuous batching). A prefix that two prompts share, above all
an image, is computed once and copied. The answer to a request does not depend on its row, its batch, the order of
requests or sharing.

Axis letters: R rows, B prompts of one prefill, T prompt positions, I images a prompt.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UserError
from llavamed_jax.generation.image_features import Features
from llavamed_jax.generation.programs import ALTERNATIVES, NO_TOKEN, Made, Programs, Prompts
from llavamed_jax.generation.requests import NO_NUMBER, Job, Request, check, name_of
from llavamed_jax.generation.rows import Placed, Rows, batch_size, bucket, power_of_two
from llavamed_jax.generation.sampling import Sampling
from llavamed_jax.generation.weights import placed
from llavamed_jax.models.llava import check_heads
from llavamed_jax.parallel.mesh import batch_shards
from llavamed_jax.utils import signals

# The length of rows and of a prefill's cache is a multiple of this; above eight times this, a multiple of twice this.
LENGTHS = 128
STEPS = 16  # tokens that are decoded on the device before the host reads them
# New tokens that a row has room for at first: most answers are shorter than their limit, and XLA's attention reads all
# of the room.
_ROOM = 64


class Engine:
    """Generates for one model.

    Calls may be nested (a stream while another is open) and may come from several threads; they share the rows and take
    turns.

    Args:
      cfg: the model's shapes.
      params: its unrolled parameter tree, which is placed on the devices (`weights.placed`).
      dtype: of the computation.
      mesh: rows are sharded over data and fsdp, heads over tp; None is one device.
      batch_size: the most rows that are decoded together.
      steps: tokens decoded on the device before the host reads them.
      share: whether prompts with a common prefix share its keys and values.
      programs: the compiled programs of another engine with the same shapes, dtype and mesh; their `steps` and
        `cache_dtype` are used.
      cache_dtype: of keys and values in the cache, such as int8; None is `dtype`.
    """

    def __init__(self, cfg: LlavaConfig, params, dtype=np.float32, mesh: Mesh | None = None, batch_size: int = 16,
                 steps: int = STEPS, share: bool = True, programs: Programs | None = None,
                 cache_dtype=None):
        self.cfg, self.dtype, self.mesh, self.batch_size = cfg, dtype, mesh, batch_size
        self._params = placed(params, cfg, mesh)
        self.shards = batch_shards(mesh)
        if mesh is not None:
            check_heads(cfg, mesh)
        self.programs = programs or Programs(cfg, dtype, mesh, steps, cache_dtype)
        self.steps = self.programs.steps
        self.eos, self._max_positions = cfg.decoder.eos_ids, cfg.decoder.max_positions
        self._share = share
        self._waiting: collections.deque[Job] = collections.deque()
        self._turn = threading.RLock()
        self._begin()

    def _begin(self) -> None:
        """Resets the engine: no rows, no cached features and no unread output."""
        self._features = Features(self.cfg, self.programs, self.shards)
        self._slots, self._rows = self.programs.empty_slots(), Rows(self._share, self.shards)
        self._length = 0  # positions of a row
        self._unread: collections.deque[tuple[Made, list[tuple[int, int, Job]]]] = collections.deque()

    @property
    def params(self):
        """The unrolled parameter tree.

        Setting it to other weights of the same shapes frees everything computed with the old ones; requests in progress
        end with an error.
        """
        return self._params

    @params.setter
    def params(self, params) -> None:
        """Replaces the weights and ends the requests in progress with an error."""
        with self._turn:
            self._params = params
            self._give_up("a change of its weights")

    @property
    def max_prompt(self) -> int:
        """The longest prompt, in positions with images expanded, that leaves room for a token."""
        return min(self.cfg.max_length or self._max_positions, self._max_positions - 1)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Returns the new token ids of each request, including the end-of-sequence id. Raises as `stream` does."""
        out: list[list[int]] = [[] for _ in requests]
        for index, tokens in self.stream(requests):
            out[index] += tokens
        return out

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        """Yields (index of the request, its next tokens) as they are generated.

        Args:
          requests: the prompts with their settings.

        Yields:
          The index of a request, and its next tokens.

        Raises:
          UserError: (a ValueError) before anything runs, if the images of a request do not fit its markers or it is too
            long; after all other requests have finished, if the model failed on one.
        """
        for i, request in enumerate(requests):
            self.check(request, name_of(i, len(requests)))
        error = None
        for job in self.feed(requests):
            tokens = job.take()
            if tokens and not job.request.cancelled:
                yield job.index, tokens
            if job.error is not None and error is None:
                error = UserError(f"{name_of(job.index, len(requests))}: {job.error}")
        if error is not None:
            raise error

    def feed(self, requests: Iterable[Request]) -> Iterator[Job]:
        """Yields a job each time it has new tokens, and a last time when it is finished.

        Requests are taken from the iterable when they are about to be needed, and must have been checked. Requests
        about one image should follow each other. When this iterator is closed, its requests are cancelled.

        Args:
          requests: checked requests.

        Yields:
          A job with new tokens, or a finished one.
        """
        requests, mine, index = iter(requests), [], 0
        try:
            while True:
                signals.check()
                while requests is not None and len(self._waiting) < 2 * self.batch_size:
                    request = next(requests, None)
                    if request is None:
                        requests = None
                        break
                    mine.append(self.add(request, index))
                    index += 1
                if requests is None and not mine:  # until then, other calls' requests may fill the queue
                    return
                self.advance()
                changed = [job for job in mine if job.is_finished or len(job.tokens) > job.taken]
                mine = [job for job in mine if not job.is_finished]
                yield from changed
        finally:
            for job in mine:
                job.request.cancelled = True

    def add(self, request: Request, index: int = 0) -> Job:
        """Queues a checked request; `advance` works on it."""
        job = Job(request, index)
        with self._turn:
            self._waiting.append(job)
        return job

    def check(self, request: Request, name: str) -> None:
        """Raises UserError, with a sentence that begins with `name`, if a request cannot be run."""
        check(request, self.cfg, self.max_prompt, name)

    def advance(self) -> None:
        """Runs one round: cancelled requests leave, waiting ones enter, all rows generate, and the host reads tokens.

        If no request waits for a row, the host reads one round late, so that the device never waits for the host.
        """
        with self._turn:
            try:
                self._advance()
            except BaseException as error:
                # Ctrl-C may come after a program has taken the donated rows and before it returns: the rows are lost.
                self._give_up(type(error).__name__)
                raise

    def _give_up(self, why: str) -> None:
        """Ends all requests with an error and resets the engine."""
        for job in [*self._rows.running.values(), *self._waiting]:
            job.is_finished = True
            job.error = UserError(f"the engine was stopped by {why}")
        self._waiting.clear()
        self._begin()

    def _advance(self) -> None:
        self._drop_cancelled()
        self._admit()
        running = self._rows.running
        if running:
            ahead = self._ahead
            longest = max(self._length_of(job, ahead) for job in running.values())
            if longest > self._length:  # grow by at least a quarter, since each length compiles its own programs
                self._resize(len(self._rows.rows),
                             min(max(longest, self._length * 5 // 4), max(map(self._longest, running.values()))))
            # If requests wait, the loop ends when a quarter of the rows has become free.
            leave_at = len(running) - max(1, len(running) // 4) if self._waiting else 0
            self._slots, made = self.programs.decode(self.params, self._slots, np.int32(leave_at),
                                                     **_wanted(running.values()))
            self._unread.append((made, [(r, r, job) for r, job in running.items()]))
        while self._unread and (self._waiting or len(self._unread) > 1 or not self._rows.running):
            self._read(*self._unread.popleft())

    def _admit(self) -> None:
        """Puts waiting requests into free rows, prefill by prefill."""
        while self._waiting:
            self._make_room()
            placed = self._rows.choose(self._waiting)
            if not placed:
                return
            for each in placed:
                self._waiting.remove(each.job)
            self._prefill(placed)

    def _make_room(self) -> None:
        """Resizes the rows to the number and the length that running and waiting requests need."""
        running, held = self._rows.running.values(), len(self._rows.rows)
        rows = min(self.batch_size, power_of_two(len(running) + len(self._waiting)))
        rows = -(-rows // self.shards) * self.shards
        if rows > held or not running and (held >= 4 * rows or held > self.batch_size >= rows):
            self._resize(rows, self._length)
        ahead = self._ahead
        length = cache_length(max(self._length_of(job, ahead) for job in [*running, *self._waiting]))
        if length > self._length or 2 * length <= self._length:
            self._resize(len(self._rows.rows), length)

    @property
    def _ahead(self) -> int:
        """The tokens that a row may have at the end of the next loop beyond those that the host has read."""
        return self.steps + sum(made.tokens.shape[1] for made, _ in self._unread)

    def _length_of(self, job: Job, ahead: int) -> int:
        """Returns the positions that a job needs at present."""
        return min(len(job.key) + max(_ROOM, len(job.tokens) + ahead), self._longest(job))

    def _longest(self, job: Job) -> int:
        return len(job.key) + self.limit(job.request)

    def _resize(self, rows: int, length: int) -> None:
        length = cache_length(length)
        if (rows, length) != (len(self._rows.rows), self._length):
            self._slots = self.programs.resize(self._slots, rows=rows, length=length)
            self._rows.resize(rows, length)
            self._length = length

    def limit(self, request: Request) -> int:
        """Returns the most new tokens that a request can have."""
        return min(request.max_new_tokens, self._max_positions - len(request.ids))

    def _prefill(self, placed: list[Placed]) -> None:
        B, T = batch_size(len(placed), placed[0].length, self.shards), bucket(placed[0].length)
        width = cache_length(max(each.start + T for each in placed))
        self._resize(len(self._rows.rows), max(self._length, width))
        prompts, features = self._prompts(placed, B, T)
        self._slots, made = self.programs.prefill(self.params, self._slots, features, prompts, width=width,
                                                  **_wanted(each.job for each in placed))
        for each in placed:
            each.job.shared = each.start
        self._unread.append((made, [(b, each.target, each.job) for b, each in enumerate(placed)]))

    def _prompts(self, placed: list[Placed], B: int, T: int) -> tuple[Prompts, jax.Array | None]:
        """Returns the arrays of a prefill, and the features of its images."""
        def column(values, fill):
            return np.array([*values, *[fill] * (B - len(placed))], np.int32)

        jobs = [each.job for each in placed]
        ids = np.zeros((B, T), np.int32)
        for b, each in enumerate(placed):
            ids[b, : each.length] = each.job.request.ids[each.start :]
        shown = [slice(each.job.images_before[each.start], None) for each in placed]  # images behind the shared prefix
        keys = [job.image_keys[part] for job, part in zip(jobs, shown)]
        images = features = None
        if any(keys):
            pixels = [image for job, part in zip(jobs, shown) for image in job.images[part]]
            soon = [pair for job in self._waiting for pair in zip(job.image_keys, job.images)]
            places = self._features.places(self.params, sum(keys, []), pixels, soon)
            images, features = np.zeros((B, power_of_two(max(map(len, keys)))), np.int32), self._features.array
            for b, row in enumerate(keys):
                images[b, : len(row)] = [places[key] for key in row]
        settings = [(r.temperature, r.top_k, r.top_p, r.seed)
                    for r in (job.request for job in jobs)] + [(0, 0, 1, 0)] * (B - len(jobs))
        return Prompts(
            ids, images, start=column((each.start for each in placed), 0),
            length=column((each.length for each in placed), 1),
            source=column((each.source for each in placed), 0),
            target=column((each.target for each in placed), len(self._rows.rows)),
            limit=column((self.limit(job.request) for job in jobs), 1), sampling=Sampling.of(*zip(*settings))), features

    def _read(self, made: Made, jobs: list[tuple[int, int, Job]]) -> None:
        """Gives a program's output to its jobs: (place in the output, row, job)."""
        made = jax.device_get(made)
        failed = np.zeros(len(self._rows.rows), bool)
        for place, r, job in jobs:
            if self._rows.rows[r].job is not job:  # the job has left the row since
                continue
            failed[r] = made.is_failed[place]
            if not failed[r]:
                job.tokens += [int(token) for token in made.tokens[place] if token != NO_TOKEN]
                if job.request.logprobs:
                    all_of_row = jax.tree.map(lambda x: x[place], made.logprobs)  # noqa: B023  (called at once)
                    new = zip(all_of_row.chosen.tolist(), all_of_row.ids, all_of_row.values)
                    job.logprobs += itertools.islice(new, len(job.tokens) - len(job.logprobs))
            elif not job.tokens and self._rows.rows[r].start:
                # The row that it was copied from may have failed before the host read so: a NaN spreads even if masked.
                job.is_alone = True
                self._waiting.appendleft(job)
                self._rows.finish(r)
                continue
            else:
                job.error = UserError(NO_NUMBER)
            if made.is_done[place]:
                job.is_finished = True
                self._rows.finish(r)
        if failed.any():
            self._slots = self.programs.scrub(self._slots, failed)
            self._rows.forget(np.flatnonzero(failed))

    def _drop_cancelled(self) -> None:
        """Frees the rows of cancelled requests."""
        for job in [job for job in self._waiting if job.request.cancelled]:
            self._waiting.remove(job)
            job.is_finished = True
        if any(job.request.cancelled for job in self._rows.running.values()):
            while self._unread:  # a cancelled request may have failed: its row is scrubbed of NaN before the next use
                self._read(*self._unread.popleft())
        left = [r for r, job in self._rows.running.items() if job.request.cancelled]
        if left:
            is_done = self.programs.release(self._slots.is_done, np.isin(np.arange(len(self._rows.rows)), left))
            self._slots = self._slots.replace(is_done=is_done)
            for r in left:
                self._rows.rows[r].job.is_finished = True
                self._rows.finish(r)


def _wanted(jobs: Iterable[Job]) -> dict[str, int]:
    """Returns what the programs are asked for besides tokens; without log probabilities, another program runs."""
    return {"top": ALTERNATIVES} if any(job.request.logprobs for job in jobs) else {}


def cache_length(length: int) -> int:
    """Rounds a number of cache positions up to one that is compiled."""
    step = LENGTHS if length <= 8 * LENGTHS else 2 * LENGTHS  # coarser steps halve a long chat's compilations
    return -(-length // step) * step
