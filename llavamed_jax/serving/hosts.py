"""Refuses requests under a name that the server is not known by, so that no other site's page reaches it.

A page's name may change its address to this machine's (DNS rebinding): the browser then takes the server for the
page's own site, and `Origin` equals `Host`. The name in `Host` is still the site's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers

from llavamed_jax.errors import UsageError, short
from llavamed_jax.serving.errors import ApiError


class Hosts:
    """The names under which a server may be asked: this machine's loopback, and others.

    Args:
      names: the others, without a port.

    Raises:
      UsageError: a name has a scheme, a port or a path.
    """

    def __init__(self, names: Iterable[str] = ()):
        self._names = {self._plain(name) for name in names}

    @staticmethod
    def _plain(name: str) -> str:
        plain, is_whole = _name(name if name.count(":") < 2 or name.startswith("[") else f"[{name}]")
        if not plain or not is_whole:
            raise UsageError(f"--allowed_hosts has {short(name)}; names such as ward.example.org, without a scheme, a "
                             "port or a path, were expected")
        return plain

    def check(self, headers: Headers) -> None:
        """Raises ApiError 421 if the `Host` header has another name. HTTP/1.0, which no browser speaks, may lack it."""
        host = headers.get("host")
        if host is None:
            return
        name, _ = _name(host)
        if not is_loopback(name) and name not in self._names:
            raise ApiError(421, f"the request is for the host {short(host)}, which is none of this server's; 127.0.0.1 "
                           "or localhost, or a name of its flag --allowed_hosts, was expected", code="wrong_host")


def is_loopback(name: str) -> bool:
    """Returns whether a name or address, without a port, is this machine's loopback."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"


def _name(host: str) -> tuple[str, bool]:
    """Returns the name in `NAME`, `NAME:PORT` or `[ADDRESS]:PORT`, and whether nothing else stands there."""
    host = host.strip().lower()
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
    else:
        name, colon, port = host.partition(":")
        rest = colon + port
    return name.rstrip("."), not rest and not set(name) & set("/@?#[] ")
