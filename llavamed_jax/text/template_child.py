"""The process that renders chat templates. `template_process` runs this file as a script; no module imports it.

transformers' `render_jinja_template` renders: sandboxed, with generation tags, loop controls, `tojson`, `strftime_now`
and `raise_exception`. Tried with transformers 5.0.0, 5.8.0, 5.16.0 and 5.24.0. Its private `_compile_jinja_template`
gives the syntax tree by which vLLM distinguishes templates that take a message's content as a text from those that take
a list of parts; in a version without it, the ways are tried in turn.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

_MEMORY = 1 << 30  # bytes that a template may take beyond the memory of the imports
_LONGEST = 1 << 24  # characters of a prompt
# The roles whose messages are given as parts; messages of other roles are given as texts.
_PARTS, _TEXT, _USERS_PARTS = ("system", "user", "assistant"), (), ("user",)


def main(descriptor: str, seconds: str) -> None:
    """Answers requests until the parent process has exited.

    Args:
      descriptor: the file descriptor of the connection to the parent.
      seconds: processor time that one request may take.
    """
    parent, connection = os.getppid(), Connection(int(descriptor))
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        from transformers.utils import chat_template_utils
        if not chat_template_utils.is_jinja_available():
            raise ImportError("jinja2 is missing")
    except Exception as error:  # a broken installation raises anything
        _send(connection, {"error": f"{type(error).__name__}: {error}"})
        return
    _limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(FileNotFoundError):  # macOS has no /proc, and no such limit
        _limit(resource.RLIMIT_AS, _virtual_memory() + _MEMORY)
    _send(connection, {})
    while os.getppid() == parent:
        if connection.poll(10):
            _limit_time(int(seconds))
            try:
                request = json.loads(connection.recv_bytes())
                _limit_time(request.pop("seconds", int(seconds)))
                reply = render(chat_template_utils, **request)
            except MemoryError:  # the messages alone are too long
                reply = _said([MemoryError()])
            _send(connection, reply)


def _send(connection: Connection, reply: dict) -> None:
    connection.send_bytes(json.dumps(reply).encode())


def _limit(what: int, value: int) -> None:
    """Sets a soft limit, if the system supports it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


def _limit_time(seconds: int) -> None:
    """Limits the processor time of what follows."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)


def _virtual_memory() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def render(machinery, source: str, messages: list[dict], tokens: dict[str, str], marker: str) -> dict:
    """Renders one prompt.

    Args:
      machinery: the module `transformers.utils.chat_template_utils`.
      source: the template.
      messages: `role`, `text` and `parts` of each; the template gets `text` or `parts` as `content`.
      tokens: `bos_token` and the others.
      marker: the text of an image, which the template must write once for each image.

    Returns:
      {"text": …}, or {"verb": …, "error": …}, which say what is wrong with the template.
    """
    images = sum(m["text"].count(marker) for m in messages)
    asked = [part["text"].strip() for part in messages[-1]["parts"] if part["type"] == "text"]
    errors, drafts = [], []
    for takes_parts in _ways(machinery, source):
        given = [{"role": m["role"], "content": m["parts"] if m["role"] in takes_parts else m["text"]}
                 for m in messages]
        try:
            rendered = machinery.render_jinja_template([given], chat_template=source, add_generation_prompt=True,
                                                       **tokens)
            text = rendered[0][0]
        except Exception as error:  # a template can raise anything
            errors.append(error)
            continue
        if len(text) > _LONGEST:
            return {"verb": "cannot be rendered",
                    "error": f"it writes {len(text)} characters; at most {_LONGEST} were expected"}
        if text.count(marker) != images:
            errors.append(_Images(f"it writes {text.count(marker)} {marker} for {images} images"))
        # "{'type': '" is the repr of a list of parts, which a template that takes texts writes.
        elif _has_in_order(text, asked) and "{'type': '" not in text:
            return {"text": text}
        else:
            drafts.append(text)
    if drafts:  # the template changes the text, for example to upper case
        return {"text": drafts[0]}
    return _said(errors)


def _has_in_order(text: str, pieces: list[str]) -> bool:
    """Returns whether a text holds all pieces, one behind the other; the time grows with the text's length alone."""
    place = 0
    for piece in pieces:
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


class _Images(Exception):
    """A template leaves images out, or writes them twice."""


def _said(errors: list[Exception]) -> dict:
    """Returns the reply to one error for each way: the template's own refusal if there is one, else the first error."""
    from jinja2.exceptions import TemplateError
    refusal = next((error for error in errors if type(error) is TemplateError), None)
    if refusal is not None:
        return {"verb": "refuses the messages", "error": str(refusal)}
    error = errors[0]
    if isinstance(error, MemoryError):
        return {"verb": "cannot be rendered", "error": f"it needs more than {_MEMORY >> 20} MiB of memory"}
    name = "" if isinstance(error, _Images) else f"{type(error).__name__}: "
    return {"verb": "cannot be rendered", "error": f"{name}{error}"}


def _ways(machinery, source: str) -> Iterator[tuple[str, ...]]:
    """Yields the roles whose content is given as parts: what the template seems to expect first, then the others."""
    likely = _PARTS if _loops_over_content(machinery, source) else _TEXT
    yield likely
    yield from (way for way in (_PARTS, _USERS_PARTS, _TEXT) if way != likely)


@functools.cache
def _loops_over_content(machinery, source: str) -> bool:
    """Returns whether a template uses a message's content as a list, after vLLM's `_detect_content_format`.

    The syntax tree decides. A template that tests whether a value is a string takes both, perhaps in a macro; it is
    given lists, as by transformers' processors.
    """
    from jinja2 import nodes
    try:
        tree = machinery._compile_jinja_template(source).environment.parse(source)
    except Exception:  # an invalid template, which rendering reports better, or a version without this function
        return True
    names = {"content"}

    def is_content(node) -> bool:
        while isinstance(node, (nodes.Filter, nodes.Test)) and node.node is not None:
            node = node.node
        if isinstance(node, nodes.Name):
            return node.name in names
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        if (isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
                and node.args):
            return isinstance(node.args[0], nodes.Const) and node.args[0].value == "content"
        return False

    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            names.add(assignment.target.name)
    lists = [loop.iter for loop in tree.find_all(nodes.For)]
    lists += [each.node for each in tree.find_all(nodes.Filter) if each.name in ("selectattr", "rejectattr")]
    lists += [item.node for item in tree.find_all(nodes.Getitem)
              if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, int)]
    return any(map(is_content, lists)) or any(test.name == "string" for test in tree.find_all(nodes.Test))


if __name__ == "__main__":
    main(*sys.argv[1:])
