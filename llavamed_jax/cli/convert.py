"""The entry point of `python -m convert`, which listens to signals before it imports the converters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llavamed_jax.cli import common


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m convert ARGV` and returns its exit status."""
    return common.command(_program, argv, has="anything was written")


def _program() -> Callable[[list[str]], int | None]:
    from llavamed_jax.cli import convert_program
    return convert_program.program
