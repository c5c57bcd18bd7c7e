"""Fetches images from the hosts that the operator named, and from nowhere else.

A name is resolved once, every address must be public, and the connection goes to the address that was checked: a name
that resolves to another address a moment later (DNS rebinding) changes nothing. Each redirect is checked again from the
beginning. The proxy of the environment is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import Callable, Sequence
from urllib.parse import urljoin, urlsplit

import h11

from llavamed_jax.errors import short
from llavamed_jax.serving.errors import ApiError, invalid
from llavamed_jax.serving.images import too_many_bytes
from llavamed_jax.serving.limits import Limits

MOST_REDIRECTS = 3
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # the only part of IPv6 that is given out for it (RFC 4291, IANA)
# Relays of 6to4, Teredo, and addresses for documentation.
_NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("192.88.99.0/24", "2001::/32", "3fff::/20")]
_CHUNK = 65536
_MAY_PASS = (408, 425, 429)  # statuses below 500 after which the same request may succeed
UNAVAILABLE = "remote_image_unavailable"  # code of a failure that may pass


class Fetcher:
    """Fetches images.

    Args:
      hosts: `name`, `name:port`, or `*.name` for all hosts below a name; empty refuses every address.
      limits: the server's limits.
      resolve: host, port -> addresses as texts; for tests.
      is_public: whether an address may be connected to; for tests.
      context: of TLS; for tests.
    """

    def __init__(self, hosts: Sequence[str], limits: Limits, resolve: Callable | None = None,
                 is_public: Callable[[str], bool] | None = None, context: ssl.SSLContext | None = None):
        self._hosts, self._limits = [host.lower().strip() for host in hosts], limits
        self._resolve, self._is_public = resolve or _resolve, is_public or is_public_address
        self._context = context

    async def fetch(self, url: str, where: str) -> bytes:
        """Fetches one image.

        Args:
          url: its address.
          where: the image's name in errors.

        Returns:
          Its bytes.

        Raises:
          ApiError: 400, the address may not be fetched, or what is there cannot be.
        """
        if not self._hosts:
            raise invalid(f"{where} is a web address, and this server fetches none; a data: URL was expected "
                          "(--allow_remote_images names the hosts that a server fetches from)", "messages",
                          "remote_images_disabled")
        try:
            async with asyncio.timeout(self._limits.fetch_timeout):
                for _ in range(MOST_REDIRECTS + 1):
                    found = await self._get(url, where)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
        except TimeoutError:
            raise _unavailable(f"{where} did not arrive within {self._limits.fetch_timeout:g} s") from None
        except (OSError, h11.RemoteProtocolError) as error:  # also of TLS and of the name's look-up
            raise _unavailable(f"{where} could not be fetched: {type(error).__name__}") from None
        except ValueError as error:
            raise _failed(f"{where} could not be fetched: {type(error).__name__}") from None
        raise _failed(f"{where} was redirected more than {MOST_REDIRECTS} times")

    async def _get(self, url: str, where: str) -> bytes | str:
        """Fetches one address; returns the bytes, or the address of a redirect."""
        scheme, host, port, target, authority = self._checked(url, where)
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(self._is_public, addresses)):
            raise _refused(f"{where}: {short(host)} is not at public addresses only")
        context = None if scheme == "http" else self._context or ssl.create_default_context()
        reader, writer = await self._connected(addresses, port, context, host)
        try:
            return await self._exchange(reader, writer, target, authority, where)
        finally:
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                writer.transport.abort()

    async def _connected(self, addresses: Sequence[str], port: int, context: ssl.SSLContext | None, host: str):
        """Connects to the first of the checked addresses that answers; each has its part of the time."""
        for address in addresses:
            try:
                async with asyncio.timeout(self._limits.fetch_timeout / len(addresses)):
                    return await asyncio.open_connection(address, port, ssl=context, limit=_CHUNK,
                                                         server_hostname=host if context else None)
            except (OSError, TimeoutError):
                if address == addresses[-1]:
                    raise

    def _checked(self, url: str, where: str) -> tuple[str, str, int, str, str]:
        """Splits an address into scheme, host, port, target and authority, if its host is one of the named ones."""
        try:
            parts = urlsplit(url)
            scheme, port = parts.scheme.lower(), parts.port
            host = (parts.hostname or "").encode("idna").decode().rstrip(".").lower()
        except (ValueError, UnicodeError):
            raise _refused(f"{where} is an invalid web address") from None
        if scheme not in ("http", "https") or not host or parts.username is not None or parts.password is not None:
            raise _refused(f"{where} is not an http or https address without a user's name")
        port = port or (443 if scheme == "https" else 80)
        if not any(_matches(host, port, scheme, allowed) for allowed in self._hosts):
            raise _refused(f"{where} is at the host {short(host)}, from which this server fetches no images")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = "".join(c if 33 <= ord(c) < 127 else "".join(f"%{b:02X}" for b in c.encode()) for c in path)
        name = f"[{host}]" if ":" in host else host
        return scheme, host, port, target, name if port in (80, 443) else f"{name}:{port}"

    async def _exchange(self, reader, writer, target: str, authority: str, where: str) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        request = h11.Request(method="GET", target=target, headers=[
            ("Host", authority), ("Accept", "image/*"), ("User-Agent", "llavamed-jax"), ("Connection", "close")])
        writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
        await writer.drain()
        data = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                headers = {bytes(name): bytes(value).decode("latin-1") for name, value in event.headers}
                if event.status_code in (301, 302, 303, 307, 308) and b"location" in headers:
                    return headers[b"location"]
                if event.status_code != 200:
                    may_pass = event.status_code >= 500 or event.status_code in _MAY_PASS
                    raise (_unavailable if may_pass else _failed)(
                        f"{where} could not be fetched: its server answered {event.status_code}")
            elif isinstance(event, h11.Data):
                data += event.data
                if len(data) > self._limits.max_image_bytes:
                    raise too_many_bytes(where, self._limits)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(data)
            elif isinstance(event, h11.ConnectionClosed):
                raise _unavailable(f"{where} could not be fetched: the connection was closed")


def _matches(host: str, port: int, scheme: str, allowed: str) -> bool:
    name, _, wanted = allowed.rpartition(":") if allowed.rpartition(":")[2].isdigit() else (allowed, "", "")
    if (port != int(wanted) if wanted else port != (443 if scheme == "https" else 80)):
        return False
    return host.endswith(name[1:]) and host != name[2:] if name.startswith("*.") else host == name


def is_public_address(address: str) -> bool:
    """Returns whether an IP address is one of the public internet: not private, loopback, link-local or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if inner is None and ip.version == 6 and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
        inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    if inner is not None:  # an IPv4 address in an IPv6 one
        return is_public_address(str(inner))
    if any(ip.version == network.version and ip in network for network in _NOT_PUBLIC):
        return False
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback
                                 or ip.is_link_local or ip.is_private)


async def _resolve(host: str, port: int) -> list[str]:
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return list(dict.fromkeys(each[4][0] for each in found))


def _refused(sentence: str) -> ApiError:
    return invalid(sentence, "messages", "remote_image_refused")


def _failed(sentence: str) -> ApiError:
    return invalid(sentence, "messages", "remote_image_failed")


def _unavailable(sentence: str) -> ApiError:
    return invalid(sentence, "messages", UNAVAILABLE)
