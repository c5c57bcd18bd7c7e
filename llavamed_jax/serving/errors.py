"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}` with an HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from llavamed_jax.errors import LONGEST, without_middle

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
          404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or that failed.

    Args:
      status: the HTTP status, at least 400.
      message: one sentence: what is wrong, where, and what was expected.
      param: the key of the request that is wrong, or None.
      code: a word for programs, such as `context_length_exceeded`, or None.
      headers: more headers of the response, such as `Retry-After`.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, without_middle(message, LONGEST), param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict:
        """The JSON value of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error of a request that cannot be obeyed: status 400."""
    return ApiError(400, message, param, code)


def try_again(status: int, message: str, seconds: float, code: str) -> ApiError:
    """Returns an error after which the same request may succeed, with the seconds to wait as `Retry-After`."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, round(seconds)))})


def of_status(status: int, message: str = "") -> ApiError:
    """Returns the error of a bare HTTP status, such as a route that does not exist."""
    phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else f"status {status}"
    return ApiError(status, message or phrase)
