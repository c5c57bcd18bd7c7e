"""Removes API keys from a server's texts, so that a key reaches no terminal and no file.

A text is cleaned before it is cut, because a key that a cut shortens is no longer recognised. A key is recognised as
servers and libraries write it: literally, in percent or backslash escapes, as HTML entities, in hexadecimal and in
base64.
"""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

MARK = "[key]"
SHORTEST = 8  # characters; a shorter key is a placeholder ("none", "EMPTY"), and may be a word of any answer
_SHORTEST_WORD = 4  # characters; an even shorter key may be a word of any message
_LEAST_OF_A_KEY = 16  # characters of a key's start that are removed too: a token limit may have cut the key
_ENTITIES = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "(?:apos|#39)"}


class Secrets:
    """Texts that are removed from a server's texts.

    Args:
      values: the keys. Keys with fewer than `SHORTEST` characters are removed from messages, as whole words, but not
        from answers; keys with fewer than four are never removed.
    """

    def __init__(self, values: Iterable[str]):
        found = sorted({value for value in values if value}, key=len, reverse=True)
        self._keys = [_Key(value) for value in found if len(value) >= SHORTEST]
        short = "|".join(re.escape(value) for value in found if _SHORTEST_WORD <= len(value) < SHORTEST)
        self._words = re.compile(rf"(?<![^\W_])(?:{short})(?![^\W_])") if short else None

    def clean(self, text: str) -> str:
        """Returns an answer with each key, or the first sixteen or more characters of one, replaced by `MARK`."""
        for key in self._keys:
            text = key.replaced(text, is_begin_enough=False)
        return text

    def clean_message(self, text: str) -> str:
        """Returns an error message without the keys.

        Short keys and the first eight or more characters of a key are removed too, because a library may have cut the
        message already.
        """
        for key in self._keys:
            text = key.replaced(text, is_begin_enough=True)
        return text if self._words is None else self._words.sub(MARK, text)


class _Key:
    """Finds one key in a text, in each form in which it may be written."""

    def __init__(self, value: str):
        self._length = len(value)
        self._begin = re.compile("".join(_letter(char) for char in value[:SHORTEST]), re.IGNORECASE)
        self._rest = [_compiled(char) for char in value[SHORTEST:]]
        plain = [f"(?i:{re.escape(form)})" for form in (value, value.encode().hex())]
        self._whole = re.compile("|".join([*plain, *map(re.escape, _base64(value))]))

    def replaced(self, text: str, is_begin_enough: bool) -> str:
        """Returns a text with the key replaced by `MARK`; `is_begin_enough` replaces its first characters too."""
        text, parts, kept, at = self._whole.sub(MARK, text), [], 0, 0
        while (found := self._begin.search(text, at)) is not None:
            end, count = self._extended(text, found.end())
            if count == self._length or is_begin_enough or count >= _LEAST_OF_A_KEY:
                parts += [text[kept:found.start()], MARK]
                kept = at = end
            else:
                at = found.start() + 1
        return "".join([*parts, text[kept:]])

    def _extended(self, text: str, at: int) -> tuple[int, int]:
        """Returns where a key ends whose first characters end at `at`, and how many of its characters were found."""
        for count, letter in enumerate(self._rest, SHORTEST):
            found = letter.match(text, at)
            if found is None:
                return at, count
            at = found.end()
        return at, self._length


def _letter(char: str) -> str:
    """Returns a pattern of one character in each of its forms; bounded repetitions keep matching linear in time."""
    code = ord(char)
    forms = [rf"%(?:25){{0,3}}{code:02x}", rf"\\{{1,8}}(?:u00|x){code:02x}",
             rf"&(?:amp;){{0,3}}#(?:0{{0,6}}{code}|x0{{0,6}}{code:x});"]
    if char in _ENTITIES:
        forms.append(f"&(?:amp;){{0,3}}{_ENTITIES[char]};")
    forms.append(rf"\\{{0,8}}{re.escape(char)}" if char in "\"'\\/" else re.escape(char))
    return f"(?:{'|'.join(forms)})"


@functools.cache
def _compiled(char: str) -> re.Pattern:
    return re.compile(_letter(char), re.IGNORECASE)


def _base64(value: str) -> list[str]:
    """Returns a key's forms inside base64, which depend on the number of bytes before it modulo 3."""
    cores, data = [], value.encode()
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            text = encode(b"\0" * before + data).decode()
            core = text[-(-before * 8 // 6):(before + len(data)) * 8 // 6]
            cores.append(core)
    return list(dict.fromkeys(cores))


def proxy_secrets() -> list[str]:
    """Returns the passwords of the environment's proxies, which a client may repeat in an error message."""
    found = []
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for value in filter(None, (os.environ.get(name), os.environ.get(name.upper()))):
            try:
                password = urlsplit(value).password
            except ValueError:
                continue
            found += [password, unquote(password)] if password else []
    return found
