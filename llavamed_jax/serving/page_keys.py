"""The page of a server with API keys: it asks for a key once, and a cookie stands for it until the server stops."""

from __future__ import annotations

import html
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, RedirectResponse, Response

from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.service import Service

PATH = "/key"
_COOKIE = "llavamed_page"
_MOST = 10_000  # cookies in use
_SECONDS = 12 * 3600.0
_MOST_BYTES = 4096  # of the form
_FORM = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{model} · LLaVA-Med JAX</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0; color: light-dark(#1d2733, #e6eaee);
background: light-dark(#fbfcfc, #12171b); }}
.notice {{ background: light-dark(#fdf4dc, #33290f); color: light-dark(#6b4a00, #f0d594); font-size: 13px; margin: 0;
padding: 5px 16px; text-align: center; position: sticky; top: 0; }}
form {{ max-width: 340px; margin: 12vh auto 0; padding: 0 20px; display: grid; gap: 10px; }}
h1 {{ font-size: 22px; margin: 0; }} p.model {{ margin: 0 0 10px; color: light-dark(#5b6875, #9aa7b3); }}
input, button {{ font: inherit; padding: 9px 12px; border-radius: 10px; border: 1px solid #8a97a3; }}
button {{ background: #0f6b66; color: #fff; border: 0; cursor: pointer; }}
.alert {{ color: light-dark(#a12a2a, #f0a3a3); margin: 0; }}
</style></head><body><p class="notice" role="note">{notice}</p><form method="post" action="key"><h1>LLaVA-Med JAX</h1>
<p class="model">{model}</p><label for="key">API key of this server</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<p class="alert" role="alert">{alert}</p><button>Continue</button></form></body></html>"""


class Keys:
    """Knows whose cookie is whose.

    Args:
      service: the server's service; without keys everybody is let in.
      notice: the sentence that is always in view.
    """

    def __init__(self, service: Service, notice: str):
        self._service, self._notice = service, notice
        self._names: dict[str, tuple[str, float]] = {}  # cookie -> the key's name and when it ends

    def name(self, headers: Headers) -> str | None:
        """Returns the name of a request's key, empty if the server has no keys; None if its cookie is unknown."""
        if not self._service.keys:
            return ""
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(_COOKIE)
        except CookieError:
            return None
        name, until = self._names.get(morsel.value if morsel is not None else "", (None, 0.0))
        return name if until > time.monotonic() else None

    def form(self, alert: str = "", status: int = 401) -> Response:
        """Returns the page that asks for a key."""
        return HTMLResponse(_FORM.format(model=html.escape(self._service.names[0]), notice=self._notice,
                                         alert=html.escape(alert)), status)

    async def answer(self, receive, headers: Headers) -> Response:
        """Reads a form with a key, and answers with a cookie or with the form again."""
        data = bytearray()
        while True:
            message = await receive()
            data += message.get("body", b"")
            if len(data) > _MOST_BYTES:
                return self.form("The key is too long.", 413)
            if not message.get("more_body"):
                break
        given = parse_qs(data.decode("utf-8", "replace")).get("key", [""])[0]
        try:
            name = self._service.caller_of(f"Bearer {given}")
        except ApiError:
            return self.form("This is not a key of this server.")
        now = time.monotonic()
        self._names = {cookie: each for cookie, each in self._names.items() if each[1] > now}
        while len(self._names) >= _MOST:
            del self._names[next(iter(self._names))]
        cookie = secrets.token_urlsafe(32)
        self._names[cookie] = (name, now + _SECONDS)
        response = RedirectResponse(".", 303)
        is_safe = headers.get("x-forwarded-proto") == "https"
        response.set_cookie(_COOKIE, cookie, httponly=True, samesite="strict", secure=is_safe, path="/")
        return response
