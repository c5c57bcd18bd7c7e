"""Answers the requests of a batch file on one engine, as the server does, without HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.serving import chat_completions, responses
from llavamed_jax.serving.batch_file import BatchRequest, Results, requests_of
from llavamed_jax.serving.errors import ApiError, of_status
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.service import Service
from llavamed_jax.utils import progress, signals

_FOREVER = 1e9  # seconds


async def answer(model, path: Path, results: Results, total: int, hosts: Sequence[str] = ()) -> Counter[int]:
    """Answers the requests of a file that have no result yet, a few more at once than the engine has rows.

    Args:
      model: the LlavaMed.
      path: the request file.
      results: takes the results.
      total: requests in the file.
      hosts: hosts from which images may be fetched.

    Returns:
      Status -> number of requests.

    Raises:
      UserError: the results cannot be written.
      KeyboardInterrupt: a signal came.
    """
    at_once = 2 * model.engine.batch_size
    limits = Limits(timeout=_FOREVER, max_queue=2 * at_once, max_requests=2 * at_once)
    service = Service([model.name], limits, remote_hosts=hosts, log=Log(file=_Nowhere()))
    service.serve(model)
    statuses, running = Counter(), set()
    step, close = progress.progress(total, len(results.done), "requests")

    async def one(request: BatchRequest) -> None:
        status, body = await _result(service, request)
        results.add(request.custom_id, status, body)
        statuses[status] += 1
        step(1)

    async def ended(most: int) -> None:
        """Waits until at most so many requests run; raises the error of one that failed to be written."""
        while len(running) > most:
            done, _ = await asyncio.wait(running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            running.difference_update(done)
            for task in done:
                task.result()
            signals.check()

    try:
        for request in requests_of(path):
            if request.custom_id not in results.done:
                running.add(asyncio.create_task(one(request)))
                await ended(at_once - 1)
        await ended(0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.to_thread(service.scheduler.close, 0)
        close()
    return statuses


async def _result(service: Service, request: BatchRequest) -> tuple[int, dict]:
    api = responses if request.url.endswith("/responses") else chat_completions
    try:
        if request.body.get("stream"):
            raise ApiError(400, "stream is true; a batch has no streams", "stream", "unsupported_parameter")
        chat = api.read({**request.body, "model": None}, service)  # files name the model that they were written for
        return 200, await api.complete(await service.ask(chat), chat)
    except ApiError as error:
        return error.status, error.body
    except Exception as error:  # one line ends no batch; a later run asks it again
        error = of_status(500, f"the request failed: {type(error).__name__}: {' '.join(str(error).split())}")
        return error.status, error.body


class _Nowhere:
    def write(self, text: str) -> None:
        """Takes what nobody reads."""

    flush = lambda self: None
