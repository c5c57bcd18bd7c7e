"""`python -m llavamed_jax.curation`: makes training data, from PubMed Central to shards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from llavamed_jax.cli import common

# Name -> module and help. A module has `add_flags(parser)` and `run(args)`, which returns an exit status or None for 0.
# Only the module of the command that was typed is imported.
COMMANDS: dict[str, tuple[str, str]] = {
    "pmc": ("llavamed_jax.curation.pmc", "fetches images of articles from PubMed Central"),
    "figures": ("llavamed_jax.curation.figures", "makes records of figure, caption and mentions from articles or sets"),
    "align": ("llavamed_jax.curation.align", "makes one-turn samples of captions"),
    "records": ("llavamed_jax.curation.records", "writes training records to shards, with resized images and lengths"),
    "inspect": ("llavamed_jax.curation.inspect.command", "writes a page about training data and its leakage"),
    "instruct": ("llavamed_jax.curation.instruct", "makes conversations about figures, written by a language model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m llavamed_jax.curation ARGV` and returns its exit status."""
    return common.command(lambda: program, argv, has="anything was written")


def program(argv: Sequence[str]) -> int | None:
    """Parses the arguments and runs one command.

    Args:
      argv: the arguments, without the program's name.

    Returns:
      The exit status, or None for 0.

    Raises:
      UserError: an argument is wrong, or the command failed.
    """
    parser = common.Parser(prog="python -m llavamed_jax.curation", description=__doc__,
                           epilog="`python -m llavamed_jax.curation COMMAND --help` lists the flags of a command")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, sentence) in COMMANDS.items():
        command = commands.add_parser(name, help=sentence, description=sentence)
        if name in argv[:1]:
            chosen = importlib.import_module(module)
            chosen.add_flags(command)
            command.set_defaults(run=chosen.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
