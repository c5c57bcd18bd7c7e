"""`python serve.py` and `llavamed-serve`: an OpenAI-compatible API on one checkpoint.

Exit statuses are those of `cli.common.run`; a server that a signal stopped and that answered everybody exits with 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError, UserError, at, short, warn
from llavamed_jax.utils import signals
from llavamed_jax.utils.files import read_bytes
from llavamed_jax.utils.paths import is_bucket

_EXAMPLE = """\
example: serve.py --checkpoint PATH --port 8000, then
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "What is MRI?"}]}'
For research only, never for clinical decisions. docs/serving.md describes every flag."""
_NAMES = {int: "N", float: "SECONDS"}
_MEANINGS = {
    "max_body_bytes": "most bytes of a request", "max_image_bytes": "most bytes of an image, decoded or fetched",
    "max_image_pixels": "most pixels of an image", "max_images": "most images of a request",
    "max_request_pixels": "most pixels of a request's images together",
    "max_prompt_tokens": "most positions of a prompt, with images", "max_new_tokens": "most tokens of an answer",
    "max_requests": "most requests that are read, queued or answered", "max_queue": "most requests that wait for a row",
    "max_connections": "most open connections", "key_share": "rows and queue for one key while another one waits",
    "timeout": "from a request's arrival to the end of its answer", "header_timeout": "until the headers are complete",
    "body_timeout": "until the body is complete", "send_timeout": "until a client reads a piece of its answer",
    "fetch_timeout": "until a remote image is complete", "drain_timeout": "for running answers after SIGTERM",
}


def _parser() -> common.Parser:
    from llavamed_jax.serving.limits import Limits

    parser = common.Parser(prog="serve.py", description="Serves a checkpoint with OpenAI's API.", epilog=_EXAMPLE)
    parser.add_argument("--checkpoint", required=True, metavar="PATH",
                        help="a checkpoint in any layout, or a run's workdir")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port (default 8000; 0 takes a free one)")
    parser.add_argument("--served_model_name", default="", metavar="NAME[,NAME]",
                        help="names of the model for clients (default: the checkpoint's)")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N",
                        help="rows that are generated together (default 16)")
    parser.add_argument("--api_key", metavar="TEXT", help="the key that clients must send; default: none is needed")
    parser.add_argument("--api_keys", metavar="FILE", help="a file of keys, one a line: KEY, or NAME KEY")
    parser.add_argument("--allow_remote_images", default="", metavar="NAME[,NAME]",
                        help="hosts from which images may be fetched (default: none)")
    parser.add_argument("--allowed_hosts", default="", metavar="NAME[,NAME]",
                        help="names, beside the loopback's, by which clients may reach the server; any if it listens "
                             "elsewhere or needs a key, else none")
    parser.add_argument("--log_content", action="store_true", help="write questions and answers to the log too")
    parser.add_argument("--no_page", action="store_true", help="serve the API without the page at /")
    parser.add_argument("--feedback", metavar="FILE",
                        help="append the page's likes and dislikes to this JSONL file (default: none are asked for)")
    limits = parser.add_argument_group("limits (docs/serving.md)")
    for field in dataclasses.fields(Limits):
        kind = type(field.default) if field.default is not None else int
        shown = "none" if field.default is None else f"{field.default:g}" if kind is float else field.default
        limits.add_argument(f"--{field.name}", type=kind, default=field.default,
                            help=f"{_MEANINGS[field.name]} (default {shown})",
                            metavar="SHARE" if field.name == "key_share" else _NAMES[kind])
    common.add_model_flags(parser)
    return parser


def program(argv: Sequence[str]) -> int:
    """Serves until a signal comes; returns the exit status."""
    args = _parser().parse_args(argv)
    limits, keys = _limits(args), _keys(args)
    common.check_model_flags(args)
    from llavamed_jax.serving.extra import check_installed

    check_installed()
    page = _page(args)
    from llavamed_jax import __version__
    from llavamed_jax.serving import app, server
    from llavamed_jax.serving.hosts import is_loopback
    from llavamed_jax.serving.log import Log
    from llavamed_jax.serving.service import Service

    hosts = _hosts(args, keys)
    if not is_loopback(args.host) and not keys:
        warn(f"--host is {args.host} and no key is needed: whoever reaches this machine may use the model")
    listener = server.listen(args.host, args.port)
    names = _listed(args.served_model_name) or [Path(args.adapter or args.checkpoint).name or args.checkpoint]
    service = Service(names, limits, keys, _listed(args.allow_remote_images),
                      Log(args.log_content), __version__, [args.checkpoint], hosts)
    signals.enter(signals.Phase("stopped before every answer was complete", grace=limits.drain_timeout + 20))
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {names[0]} at http://{host}:{listener.getsockname()[1]}: "
          f"{'no page' if page is None else 'a page'}, API under /v1, /health, /metrics; "
          "research use only, never for clinical decisions", flush=True)
    service.start(lambda stage: _load(args, stage))
    is_whole = server.run(app.create(service, page), service, listener, signals.is_asked)
    if service.loading.error is not None:
        raise service.loading.error
    if not is_whole:
        raise UserError(f"stopped; some answers were not complete after {limits.drain_timeout:g} s")
    return 0


def _page(args: argparse.Namespace):
    """Returns what mounts the page, or None."""
    if args.no_page:
        if args.feedback is not None:
            raise UsageError("--feedback is for the page, which --no_page turns off; one of the two was expected")
        return None
    from llavamed_jax.serving import page
    from llavamed_jax.serving.page_feedback import Feedback

    page.check_installed()
    return page.mounting(Feedback(args.feedback, args.log_content) if args.feedback is not None else None)


def _load(args: argparse.Namespace, stage):
    """Loads the model and runs each kind of request once, so that no client waits for compilations."""
    from llavamed_jax.checkpoints import hub
    from llavamed_jax.cli import compilation_cache
    from llavamed_jax.serving.warm_up import compile_while_loading, warm_up

    compilation_cache.enable()
    place = None
    if is_bucket(args.checkpoint):  # once: the thread that compiles reads the same copy
        stage("copying the checkpoint from the bucket")
        place = str(hub.local(args.checkpoint, may_be_bucket=True))
    ahead = threading.Thread(target=compile_while_loading, daemon=True, args=(
        place or args.checkpoint, args.batch_size, args.dtype, args.tokenizer, args.template, args.kv_cache))
    is_plain = not (args.quantize or args.adapter or args.mesh or args.vision_tower)  # else the shapes are other ones
    stage(f"loading the weights{' and compiling the programs' if is_plain else ''}")
    if is_plain:
        ahead.start()
    model = common.load_assistant(args, place)
    if is_plain:
        stage("compiling the programs; the weights are loaded")
        ahead.join()
    model.engine.batch_size = -(-args.batch_size // model.engine.shards) * model.engine.shards
    warm_up(model, stage)
    return model


def _limits(args: argparse.Namespace):
    from llavamed_jax.serving.limits import Limits

    if not 0 <= args.port < 65536:
        raise UsageError(f"--port is {args.port}; 0 to 65535 was expected")
    if args.batch_size < 1:
        raise UsageError(f"--batch_size is {args.batch_size}; at least 1 was expected")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)}
    for name, value in values.items():
        least = 0 if name in ("drain_timeout", "max_images") else 1 if isinstance(value, int) else 1e-3
        most = 1 if name == "key_share" else float("inf")
        if value is not None and not (least <= value <= most and value < float("inf")):
            raise UsageError(f"--{name} is {value}; " + (f"{least:g} to 1" if most == 1 else f"at least {least:g}")
                             + " was expected")
    return Limits(**values)


def _keys(args: argparse.Namespace) -> dict[str, str]:
    """Returns name -> key. Raises UsageError for an empty key and for two keys of one name; no error quotes a key."""
    keys = {}
    if args.api_key is not None:
        if not args.api_key.strip():
            raise UsageError("--api_key is empty; a key was expected")
        keys["api_key"] = args.api_key.strip()
    if args.api_keys is not None:
        try:
            lines = read_bytes(args.api_keys, f"--api_keys {short(args.api_keys)}").decode().splitlines()
        except FileNotFoundError:
            raise UsageError(f"--api_keys is {short(args.api_keys)}, which does not exist; a file was expected"
                             ) from None
        except UnicodeDecodeError:
            raise at(args.api_keys, f"--api_keys {short(args.api_keys)} is not UTF-8") from None
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or line.startswith("#"):
                continue
            name = words[0] if len(words) == 2 else f"line {number}"
            if len(words) > 2 or name in keys:
                raise UserError(f"--api_keys {short(args.api_keys)}, line {number}: KEY, or NAME KEY with a NAME "
                                "that no other line has, was expected")
            keys[name] = words[-1]
        if not keys:
            raise UserError(f"--api_keys {short(args.api_keys)} holds no key; at least one was expected")
    return keys


def _hosts(args: argparse.Namespace, keys: dict[str, str]):
    """Returns the names by which the server may be asked; None for any. Raises UsageError for what is no name."""
    from llavamed_jax.serving.hosts import Hosts, is_loopback

    named = _listed(args.allowed_hosts)
    return Hosts(named) if named or is_loopback(args.host) and not keys else None


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `serve.py` or `llavamed-serve` and returns its exit status."""
    return common.command(lambda: program, argv, has="the server had begun")


if __name__ == "__main__":
    sys.exit(main())
