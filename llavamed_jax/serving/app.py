"""The HTTP routes: OpenAI's API under `/v1` and without it, health, version and metrics; errors are always JSON."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import ModuleType

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from llavamed_jax.serving import chat_completions, responses
from llavamed_jax.serving.errors import ApiError, of_status
from llavamed_jax.serving.http_io import (
    ClientGone,
    EventStream,
    HeaderLimit,
    check_asked,
    read_json,
    request_id,
    unless_gone,
)
from llavamed_jax.serving.service import Answer, Caller, Service


def create(service: Service, page: Callable[[FastAPI, Service], FastAPI] | None = None) -> FastAPI:
    """Makes the application.

    Args:
      service: the model behind it.
      page: mounts a page at `/` behind the routes of the API, and returns the application to run; None for no page.

    Returns:
      The ASGI application.
    """
    # No pages of documentation: theirs load scripts from another machine.
    app = FastAPI(title="llavamed-jax", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                  dependencies=[Depends(_own_name)])
    app.add_middleware(HeaderLimit)
    app.state.service = service
    _add_errors(app, service)
    _add_state(app, service)
    for prefix in ("/v1", ""):
        _add_api(app, service, prefix)
    return app if page is None else page(app, service)


async def _own_name(request: Request) -> None:
    check_asked(request.headers, request.app.state.service.hosts)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health():
        return _health(service)

    @app.get("/health/live")
    async def live():
        return {"status": "alive"}

    @app.get("/health/ready")
    async def ready():
        return _health(service)

    @app.get("/version")
    async def version():
        return {"version": service.version}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _health(service: Service) -> JSONResponse:
    """200 if requests are answered; else 503. Both say how far loading is."""
    loading = service.loading
    status = "ready" if service.is_ready else "stopping" if service.is_stopping else (
        "failed" if loading.error is not None or service.scheduler is not None else "loading")
    seconds = loading.seconds if loading.seconds is not None else round(time.monotonic() - loading.started, 3)
    body = {"status": status, "stage": loading.stage, "seconds": seconds}
    return JSONResponse(body, 200 if service.is_ready else 503)


def _add_api(app: FastAPI, service: Service, prefix: str) -> None:
    @app.get(f"{prefix}/models")
    async def models(request: Request):
        _caller(request, service)
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @app.get(f"{prefix}/models/{{name:path}}")
    async def model(name: str, request: Request):
        _caller(request, service)
        service.check_model(name)
        return _model(service, name)

    @app.post(f"{prefix}/chat/completions")
    async def chat(request: Request):
        return await _answered(request, service, chat_completions)

    @app.post(f"{prefix}/responses")
    async def response(request: Request):
        return await _answered(request, service, responses)


def _model(service: Service, name: str) -> dict:
    most = service.most_prompt + 1 if service.model is not None else None
    return {"id": name, "object": "model", "created": service.created, "owned_by": "llavamed-jax",
            "root": service.names[0], "max_model_len": most}


def _caller(request: Request, service: Service) -> Caller:
    request.state.key = service.caller_of(request.headers.get("authorization"))
    return Caller(request.state.key, request_id(request))


async def _answered(request: Request, service: Service, api: ModuleType):
    """Runs one request of the API: its key, its place among those under way, its body, its answer."""
    caller = _caller(request, service)
    scope = contextlib.ExitStack()
    scope.enter_context(service.counting(caller.key))
    try:
        service.check_ready()
        body = await read_json(request, service.limits)
        response = await _respond(request, service, caller, api, body, scope)
    except ClientGone:
        scope.close()
        return PlainTextResponse("", 499)
    except BaseException:
        scope.close()
        raise
    response.headers["X-Request-Id"] = caller.request_id
    if not isinstance(response, EventStream):  # which ends later
        scope.close()
    return response


async def _respond(request: Request, service: Service, caller: Caller, api: ModuleType, body,
                   scope: contextlib.ExitStack):
    chat = api.read(body, service)
    if chat.ignored:
        service.log.ignored(request.url.path, chat.ignored)
    answer = await unless_gone(request, service.ask(chat, caller))
    noted = Noted(service, request.url.path, caller, answer, chat)
    if chat.is_streamed:
        return EventStream(api.events(answer, chat), service.limits.send_timeout, noted.gone,
                           lambda: (noted(200), scope.close()))
    try:
        return JSONResponse(await unless_gone(request, api.complete(answer, chat)))
    except ClientGone:
        noted.gone()
        raise
    finally:
        noted(200)


class Noted:
    """Writes the log's line of an answer, once, and counts it.

    Args:
      service: the service.
      route: the path of the request.
      caller: who asked.
      answer: the answer.
      chat: the request.
    """

    def __init__(self, service: Service, route: str, caller: Caller, answer: Answer, chat):
        self._service, self._route, self._caller, self._answer, self._chat = service, route, caller, answer, chat
        self._is_gone = self._is_done = False

    def gone(self) -> None:
        """Notes that the client hung up."""
        self._is_gone = True
        self._service.metrics.gone.inc()

    def __call__(self, status: int) -> None:
        """Writes the line."""
        self._answer.close()
        if self._is_done:
            return
        self._is_done, answer, chat = True, self._answer, self._chat
        end, usage = answer.end, answer.usage
        error = end.error if end is not None else None
        if error is not None and not chat.is_streamed:  # the error's own response is counted
            return
        status = error.status if error is not None else 499 if self._is_gone else status
        self._service.metrics.requests.labels(self._route, status).inc()
        content = {"messages": [{"role": message.role, "texts": [part for part in message.parts
                                                                 if isinstance(part, str)]}
                                for message in chat.messages],
                   "answer": end.completion.text if end is not None and end.completion is not None else None}
        self._service.log.event(
            "answer", content, request=self._caller.request_id, route=self._route, key=self._caller.key, status=status,
            stream=chat.is_streamed, prompt_tokens=usage.prompt, image_tokens=usage.image, cached_tokens=usage.cached,
            completion_tokens=usage.completion, **answer.times,
            finish_reason=end.completion.finish_reason if end is not None and end.completion is not None else None,
            code=error.code if error is not None else None)


def _add_errors(app: FastAPI, service: Service) -> None:
    """Makes every error one of OpenAI's, whoever raises it."""
    def response(request: Request, error: ApiError) -> JSONResponse:
        # The message may quote the request, and with it a patient's words; code and key say enough for the log.
        route = getattr(request.scope.get("route"), "path", "unknown")
        service.metrics.requests.labels(route, error.status).inc()
        service.log.event("refused", {"message": error.message}, request=request_id(request), route=route,
                          key=getattr(request.state, "key", None), status=error.status, code=error.code,
                          param=error.param)
        return JSONResponse(error.body, error.status, {**error.headers, "X-Request-Id": request_id(request)})

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError):
        return response(request, error)

    @app.exception_handler(HTTPException)
    async def bare(request: Request, error: HTTPException):
        return response(request, of_status(error.status_code))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception):
        return response(request, of_status(500))
