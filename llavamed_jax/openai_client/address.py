"""Parses a server's address: the client's options, the part that may be shown, and the values that must stay secret."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from llavamed_jax.errors import UsageError, short
from llavamed_jax.openai_client.secrets import SHORTEST
from llavamed_jax.utils.hashes import sha256

_LONGEST = 2000  # characters
_KEY_NAME = re.compile("key|token|secret|sig|pass|auth|cred|code", re.IGNORECASE)
_EXPECTED = "http://HOST:PORT/v1 or https://HOST/v1 was expected"


@dataclass(frozen=True)
class Address:
    """A server's address, split into its parts.

    Attributes:
      options: the client's keyword arguments: `base_url`, or Azure's `azure_endpoint`, `api_version`,
        `azure_deployment`.
      shown: the address for display, with the values of the query hidden.
      query: the part after the question mark, which is sent with every request; Azure's `api-version` is not in it,
        since it is an option.
      secrets: the values of the query that a server might repeat.
    """

    options: dict[str, str]
    shown: str
    query: str = field(default="", repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def identity(self) -> str:
        """SHA-256 of the part of the query on which answers may depend; empty if there is no such part.

        Parameters named like a key are left out, since their values may change.
        """
        items = "&".join(item for item in self.query.split("&") if not _KEY_NAME.search(item.partition("=")[0]))
        return sha256(items.encode()) if items else ""

    @property
    def is_azure(self) -> bool:
        """Whether Azure's key should be tried first."""
        return "azure_endpoint" in self.options or bool(
            re.match(r"https?://[^/]+\.azure\.com(:|/|$)", self.options["base_url"], re.I))


def read_address(url: str, azure_version: str | None = None) -> Address:
    """Parses an address.

    Args:
      url: `http(s)://HOST[:PORT][/v1][?NAME=VALUE]`; without a path `/v1` is added. For Azure
        `https://NAME.openai.azure.com`, or the address of a deployment, with `?api-version=VERSION`.
      azure_version: Azure's `api-version`, if the address does not hold it.

    Raises:
      UsageError: the address is not valid. The sentence does not repeat a part that may be a password.
    """
    url = url.strip()
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        parts.hostname and parts.hostname.encode("idna")
    except ValueError:  # UnicodeError is a subclass
        is_address = False
    strange = next((char for char in url if not char.isprintable() or char.isspace()), None)
    reason = ""
    if strange is not None:
        reason = (f"it contains the character {strange.encode('unicode_escape').decode()}"
                  if strange != " " else "it contains a space")
    elif len(url) > _LONGEST:
        reason = f"it has {len(url)} characters"
    elif "@" in url.partition("?")[0]:
        reason = "it contains a user name or a password; keys are read from the environment"
    elif "#" in url:
        reason = "it contains a fragment (#…), which is never sent to a server"
    if reason or not is_address:
        raise UsageError(f"the address {short(shown(url))} is not valid{reason and f': {reason}'}; {_EXPECTED}")
    origin, path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/").removesuffix("/chat/completions")
    named = dict(parse_qsl(parts.query, keep_blank_values=True))
    version = azure_version or named.get("api-version")
    # Azure's newer services take the version in the query, as other servers do.
    if version is None or (not azure_version and re.search(r"/(v1|models)$", path)):
        return _address({"base_url": f"{origin}{path or '/v1'}"}, parts.query)
    before, _, deployment = re.sub(r"/openai$", "", path).partition("/openai/deployments/")
    options = {"azure_endpoint": origin + before, "api_version": version} | (
        {"azure_deployment": deployment} if deployment else {})
    return _address(options, "&".join(item for item in parts.query.split("&")
                                      if item.partition("=")[0] != "api-version"))


def _address(options: dict[str, str], query: str) -> Address:
    secrets = set()
    for name, _, value in (item.partition("=") for item in query.split("&")):
        # A short value under another name may be a word of any sentence.
        if name != "api-version" and (len(value) >= SHORTEST or _KEY_NAME.search(name)):
            secrets |= {value, unquote(value), unquote(value.replace("+", " "))}
    url = options.get("base_url") or options["azure_endpoint"]
    return Address(options, shown(f"{url}?{query}" if query else url), query, tuple(sorted(secrets - {""})))


def shown(url: str) -> str:
    """Returns an address, valid or not, without user name, password and the values of its query.

    The value of `api-version`, which is not secret, is kept.
    """
    # A password may hold any character.
    url = re.sub(r"^([a-zA-Z][a-zA-Z0-9+.-]*:/*)?.*@", r"\1[hidden]@", url, flags=re.DOTALL)
    before, mark, query = url.partition("#")[0].partition("?")
    items = (item.partition("=") for item in query.split("&"))
    return before + mark + "&".join(
        f"{name}{sign}{value if name == 'api-version' or not value else '[hidden]'}" for name, sign, value in items)
