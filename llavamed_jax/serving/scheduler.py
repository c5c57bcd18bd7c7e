"""The one thread that runs the engine: a queue with a fair order, rows in progress, and what they deliver.

A request that arrives joins the running rows at the next decode loop. A cancelled one leaves its row at the next loop.
Requests run in the order of their arrival; while several keys wait, none of them gets more than its share of the rows.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Job, Request
from llavamed_jax.generation.text_stream import Completion, TextStream, completion
from llavamed_jax.serving.errors import ApiError, try_again
from llavamed_jax.serving.limits import Limits


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token, and its likeliest alternatives: (id, log probability), the best first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """New text of an answer, whole characters only, and the log probabilities of its tokens if they are wanted."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """The end of an answer: its completion, or the error that ended it."""

    completion: Completion | None = None
    error: ApiError | None = None


class Ticket:
    """One request on its way through queue and engine. `deliver` is called in the engine's thread.

    Args:
      request: the engine's request, checked.
      text: the text of its answer.
      alternatives: log probabilities a token beside its own; None for none.
      key: whose request it is, for the shares.
      deadline: when the answer must be complete, by `time.monotonic`.
      deliver: takes each Piece and at last the End.

    Attributes:
      arrived: when the request was submitted, by `time.monotonic`.
      first_token: when its first token had come; None before.
      is_over: whether its End was delivered, or its client has gone.
      job: the engine's job; None while it waits.
    """

    def __init__(self, request: Request, text: TextStream, alternatives: int | None, key: str, deadline: float,
                 deliver: Callable[[Piece | End], None]):
        self.request, self.text, self.alternatives, self.key = request, text, alternatives, key
        self.deadline, self.deliver = deadline, deliver
        self.arrived, self.first_token = time.monotonic(), None
        self.is_over, self.job = False, None
        self._held: list[TokenLogprob] = []  # of tokens that have not completed a character yet

    @property
    def cached(self) -> int:
        """Positions of the prompt whose keys and values were already there."""
        return (self.job.shared or 0) if self.job is not None else 0

    def push(self, eos: tuple[int, ...], special: Callable[[int], bool]) -> None:
        """Delivers what the job has generated since the last call, and the End if it is complete."""
        job, text = self.job, self.text
        new, before = job.take(), len(text.token_ids)
        if new and self.first_token is None:
            self.first_token = time.monotonic()
        piece = text.push(new)
        is_last = text.is_stopped or job.is_finished
        if is_last and job.error is None:
            piece += text.finish()
        if self.alternatives is not None:
            self._held += [
                TokenLogprob(job.tokens[n], job.logprobs[n][0], _top(job.logprobs[n], self.alternatives))
                for n in range(before, len(text.token_ids))
                if job.tokens[n] not in eos and not special(job.tokens[n])]
        if piece or is_last and self._held and job.error is None:
            held, self._held = self._held, []
            self.deliver(Piece(piece, held))
        if is_last:
            self.request.cancelled = True  # a row that was stopped by a text is still running
            self.end(End(completion(text, eos)) if job.error is None else End(error=_failed(job)))

    def end(self, end: End) -> None:
        """Delivers the End, once."""
        if not self.is_over:
            self.is_over = True
            self.deliver(end)


def _top(found, number: int) -> list[tuple[int, float]]:
    _, ids, values = found
    return list(zip(ids[:number].tolist(), values[:number].tolist()))


def _failed(job: Job) -> ApiError:
    return ApiError(500, f"the answer could not be generated: {job.error}", code="generation_failed")


class Scheduler:
    """Runs tickets on one engine, in a thread of its own.

    Args:
      engine: the engine, which this thread owns from now on.
      limits: the server's limits.
      is_special: whether a token has no text, such as the end of sequence.

    Attributes:
      on_end: called in the engine's thread with each ticket that has ended, for metrics.
      tokens: how many tokens were generated in all.
    """

    def __init__(self, engine: Engine, limits: Limits, is_special: Callable[[int], bool] = lambda _: False):
        self.engine, self.limits, self._is_special = engine, limits, is_special
        self.on_end: Callable[[Ticket], None] = lambda _: None
        self.on_error: Callable[[BaseException], None] = lambda _: None
        self.tokens = 0
        self._changed = threading.Condition()
        self._queues: collections.OrderedDict[str, collections.deque[tuple[int, Ticket]]] = collections.OrderedDict()
        self._arrivals = itertools.count()
        self._active: list[Ticket] = []
        self._is_closing = False
        self._seconds = 1.0  # of a recent answer, smoothed, for Retry-After
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Tickets that wait for a row."""
        return sum(map(len, list(self._queues.values())))

    @property
    def rows(self) -> int:
        """Rows in use."""
        return sum(ticket.job.shared is not None and not ticket.job.is_finished for ticket in list(self._active))

    def check_room(self, key: str) -> None:
        """Raises ApiError 429 if the queue is full, for everybody or for this key."""
        with self._changed:
            self._check_room(key)

    def _check_room(self, key: str) -> None:
        waiting, own = self.waiting, len(self._queues.get(key, ()))
        others = [len(queue) for other, queue in self._queues.items() if other != key]
        share = max(1, int(self.limits.max_queue * self.limits.key_share))
        most = share if any(others) else self.limits.max_queue
        # A queue that another key filled beyond its share, while it waited alone, does not lock this one out.
        is_owed = not own and max(others, default=0) > share
        if not is_owed and (waiting >= self.limits.max_queue or own >= most):
            seconds = min(60.0, self._seconds * (1 + waiting) / self.engine.batch_size)
            raise try_again(429, f"{waiting} requests wait, {own} of them with this key, and more are not taken now; "
                            f"try again in {max(1, round(seconds))} s", seconds, "queue_full")

    def submit(self, ticket: Ticket) -> None:
        """Queues a ticket.

        Raises:
          ApiError: 429, the queue is full; 503, the server is stopping.
        """
        with self._changed:
            if self._is_closing:
                raise try_again(503, "the server is stopping; try again later", 5, "stopping")
            self._check_room(ticket.key)
            self._queues.setdefault(ticket.key, collections.deque()).append((next(self._arrivals), ticket))
            self._changed.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a ticket: it leaves the queue now, or its row at the next loop."""
        ticket.is_over = ticket.request.cancelled = True
        with self._changed:
            queue = self._queues.get(ticket.key, collections.deque())
            for each in [each for each in queue if each[1] is ticket]:
                queue.remove(each)
            self._drop_empty()

    def close(self, seconds: float) -> bool:
        """Takes no more tickets, lets the present ones finish for so many seconds, and ends the others with an error.

        Returns whether all of them could finish.
        """
        until = time.monotonic() + seconds
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if not self._thread.is_alive():
            return True
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        self._end_all(try_again(503, "the server was stopped before the answer was complete", 5, "stopping"))
        self._thread.join(max(5.0, until - time.monotonic()))
        return False

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # a mistake in this file: nobody may wait for ever
            self.on_error(error)
            self._end_all(ApiError(500, "the engine has stopped; the server must be started again",
                                   code="engine_stopped"))
            raise

    def _end_all(self, error: ApiError) -> None:
        """Takes no more tickets, and ends those that are there with an error."""
        with self._changed:
            self._is_closing = True
            left = [*self._active, *(ticket for queue in self._queues.values() for _, ticket in queue)]
            self._queues.clear()
        for ticket in left:
            ticket.request.cancelled = True
            ticket.end(End(error=error))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._active and not self._queues:
                    if self._is_closing:
                        return
                    self._changed.wait()
                self._expire()
                self._admit()
            try:
                self.engine.advance()
            except Exception as error:  # the engine has ended all jobs with it, and goes on with the next ones
                self.on_error(error)
            self._deliver()

    def _expire(self) -> None:
        """Ends tickets whose time is over: those in the queue, and those in a row."""
        now = time.monotonic()
        for queue in self._queues.values():
            for each in [each for each in queue if each[1].deadline <= now]:
                queue.remove(each)
                each[1].end(End(error=try_again(
                    503, f"the request waited {now - each[1].arrived:.0f} s for a free row, its whole time", 5,
                    "queue_timeout")))
        self._drop_empty()
        for ticket in self._active:
            if ticket.deadline <= now and not ticket.is_over:
                ticket.request.cancelled = True
                ticket.end(End(error=ApiError(504, f"the answer was not complete after {now - ticket.arrived:.0f} s",
                                              code="timeout")))

    def _admit(self) -> None:
        """Hands tickets to the engine: as many as rows, and a few more, so that freed rows are filled together."""
        room = self.engine.batch_size + max(1, self.engine.batch_size // 4)
        while self._queues and len(self._active) < room:
            ticket = self._next()
            ticket.job = self.engine.add(ticket.request)
            self._active.append(ticket)

    def _next(self) -> Ticket:
        """Takes the oldest ticket of a key that has not its share of the rows yet; else the oldest of all."""
        oldest = sorted(self._queues, key=lambda key: self._queues[key][0][0])
        if len(oldest) > 1:
            held = collections.Counter(ticket.key for ticket in self._active)
            most = max(1, int(self.engine.batch_size * self.limits.key_share))
            oldest = [key for key in oldest if held[key] < most] or oldest
        _, ticket = self._queues[oldest[0]].popleft()
        self._drop_empty()
        return ticket

    def _drop_empty(self) -> None:
        for key in [key for key, queue in self._queues.items() if not queue]:
            del self._queues[key]

    def _deliver(self) -> None:
        for ticket in self._active:
            before = len(ticket.text.token_ids)
            if not ticket.is_over:
                try:
                    ticket.push(self.engine.eos, self._is_special)
                except Exception as error:  # decoding failed: one answer, not the others
                    ticket.request.cancelled = True
                    ticket.end(End(error=ApiError(500, f"the answer could not be decoded: {error}",
                                                  code="generation_failed")))
                self.tokens += len(ticket.text.token_ids) - before
                if ticket.is_over:
                    self._seconds += 0.2 * (time.monotonic() - ticket.arrived - self._seconds)
        for ticket in [ticket for ticket in self._active if ticket.job.is_finished]:
            self.on_end(ticket)
        self._active = [ticket for ticket in self._active if not ticket.job.is_finished]
