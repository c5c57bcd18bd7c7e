"""`python -m llavamed_jax.serving.batch IN.jsonl OUT.jsonl --checkpoint PATH`: answers a file of requests, no server.

Exit statuses are those of `cli.common.run`, and `signals.EXIT_SAVED`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.cli import common
from llavamed_jax.errors import UsageError, count_of
from llavamed_jax.serving.batch_file import Results, requests_of
from llavamed_jax.serving.extra import check_installed
from llavamed_jax.utils import signals

_GRACE_S = 10


def program(argv: Sequence[str]) -> int:
    """Answers the requests that have no result yet; returns the exit status."""
    parser = common.Parser(prog="python -m llavamed_jax.serving.batch", epilog=common.MODEL_FLAGS,
                           description="Answers a file of OpenAI batch requests. The same command continues a stopped "
                           "run. Research use only.")
    parser.add_argument("requests", metavar="IN.jsonl", help="requests, one a line: custom_id, method, url, body")
    parser.add_argument("results", metavar="OUT.jsonl", help="results, one a line, in the order in which they finish")
    parser.add_argument("--checkpoint", required=True, metavar="PATH",
                        help="a checkpoint in any layout, or a run's workdir")
    parser.add_argument("--batch_size", type=int, default=16, metavar="N",
                        help="rows that are generated together (default 16)")
    parser.add_argument("--allow_remote_images", default="", metavar="NAME[,NAME]",
                        help="hosts from which images may be fetched (default: none)")
    common.add_model_flags(parser, is_listed=False)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UsageError(f"--batch_size is {args.batch_size}; at least 1 was expected")
    check_installed()
    path = Path(args.requests)
    names = {request.custom_id for request in requests_of(path)}  # every line is read before the model is
    if Path(args.results).exists() and Path(args.results).samefile(path):
        raise UsageError(f"{path} is both IN.jsonl and OUT.jsonl; two files were expected")
    results = Results(Path(args.results))
    results.check(names)
    kept = len(results.done)
    sentence = lambda: (f"stopped; {len(results.done)} of {len(names)} results are in {args.results}: run again to "
                        "continue")
    if kept < len(names):
        signals.enter(signals.Phase(sentence, signals.EXIT_SAVED, grace=_GRACE_S, raises=True))
        try:
            from llavamed_jax.serving.batch_run import answer  # with the packages of the extra, and jax

            model = common.load_assistant(args)
            model.engine.batch_size = -(-args.batch_size // model.engine.shards) * model.engine.shards
            hosts = [host.strip() for host in args.allow_remote_images.split(",") if host.strip()]
            statuses = asyncio.run(answer(model, path, results, len(names), hosts))
        except KeyboardInterrupt:
            statuses = None
        finally:
            results.close()
        if statuses is None:
            print(sentence(), file=sys.stderr)
            return signals.EXIT_SAVED
        failed = sum(count for status, count in statuses.items() if status != 200)
        print(f"{count_of(sum(statuses.values()), 'request')} answered, {failed} of them with an error"
              + (f"; {kept} had a result before" if kept else ""))
    else:
        print(f"every request has a result in {args.results}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return common.command(lambda: program, argv, has="any request was answered")


if __name__ == "__main__":
    sys.exit(main())
