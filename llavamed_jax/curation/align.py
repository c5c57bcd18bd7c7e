"""The command `align`: makes one-turn samples of captions, with which the projector is trained.

    python -m llavamed_jax.curation align --figures figures.jsonl --out alignment.json

As in LLaVA-Med, a short caption is the answer to an instruction that asks for a short description, and a longer one to
an instruction that asks for detail; the paper divides at 30 words. The 11 and 16 instructions are this project's own
(`prompts/align.txt`).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llavamed_jax.curation.conversations import with_marker
from llavamed_jax.curation.figure_file import Figure, FigureFile
from llavamed_jax.curation.json_list import check_place, write_records
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils.files import read_bytes
from llavamed_jax.utils.progress import progress

OWN = Path(__file__).parent / "prompts" / "align.txt"
KINDS = ("concise", "detailed")
_NO_IMAGE, _NO_WORDS = "without an image file", "with a caption that has no words"
_STEP = 1000  # records after which the progress is shown
_HEADING = re.compile(r"^\[\[(.*)\]\][ \t\r]*$", re.MULTILINE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--figures", metavar="FILE", required=True, help="records with pair_id and fig_caption")
    add("--out", metavar="FILE", required=True, help="the training file: JSON lines if it ends in .jsonl, else a list")
    add("--images", metavar="DIR", help="leaves out figures whose image is not in this folder")
    add("--instructions", metavar="FILE", help="sections [[concise]] and [[detailed]], one instruction a line")
    add("--short_words", metavar="N", type=int, default=30, help="a caption of fewer words is short (default 30)")
    add("--seed", metavar="N", type=int, default=0, help="draws instruction and place of the image (default 0)")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
      UsageError: a flag is wrong.
      UserError: a file cannot be read or written, or no sample could be made.
    """
    if args.short_words < 0:
        raise UsageError(f"--short_words is {args.short_words}; at least 0 was expected")
    if args.images is not None and not Path(args.images).is_dir():
        raise UsageError(f"--images is {args.images}, which is not a folder")
    check_place("--out", Path(args.out))
    instructions = read_instructions(Path(args.instructions) if args.instructions else OWN)
    figures, counts = FigureFile(Path(args.figures)), Counter()
    images = Path(args.images) if args.images is not None else None
    made = _made(figures, instructions, args.short_words, args.seed, images, counts)
    first = next(made, None)
    if first is None:
        raise UserError(f"{figures.path} has no figure that can be used: {_reasons(figures, counts)}")
    total = write_records(Path(args.out), itertools.chain([first], made))
    print(f"{args.out}: {total:,} samples, {counts['concise']:,} concise (fewer than {args.short_words} words) and "
          f"{counts['detailed']:,} detailed")
    if reasons := _reasons(figures, counts):
        print(f"not used: {reasons}")


def _reasons(figures: FigureFile, counts: Counter[str]) -> str:
    lost = figures.skipped + Counter({reason: counts[reason] for reason in (_NO_IMAGE, _NO_WORDS)})
    return ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common())


def _made(figures: FigureFile, instructions: Mapping[str, Sequence[str]], short_words: int, seed: int,
          images: Path | None, counts: Counter[str]) -> Iterator[dict]:
    advance, close = progress(len(figures), 0, "captions")
    done = 0
    for number, figure in figures.figures():
        if number - done >= _STEP:
            advance(number - done)
            done = number
        caption = figure.caption.replace(IMAGE_MARKER, "").strip()
        if not any(char.isalnum() for char in caption):
            counts[_NO_WORDS] += 1
        elif images is not None and not os.path.isfile(images / figure.image):
            counts[_NO_IMAGE] += 1
        else:
            kind = KINDS[len(caption.split()) >= short_words]
            counts[kind] += 1
            yield sample(figure, caption, instructions[kind], seed)
    advance(len(figures) - done)
    close()


def sample(figure: Figure, caption: str, instructions: Sequence[str], seed: int) -> dict:
    """Returns the training record of one caption; instruction and side of the image follow from seed and `pair_id`.

    Args:
      figure: the figure.
      caption: the answer.
      instructions: the instructions to draw from.
      seed: the seed.
    """
    rng = random.Random(f"{seed} {figure.pair_id}")
    question = with_marker(rng.choice(instructions), rng)
    record = {"id": figure.pair_id, "image": figure.image}
    record |= {} if figure.domains is None else {"domain": figure.domains}
    record |= {"licence": figure.licence} if figure.licence is not None else {}
    return record | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]}


def read_instructions(path: Path) -> dict[str, list[str]]:
    """Reads the instructions: the sections `[[concise]]` and `[[detailed]]`, with one instruction a line.

    Raises:
      UsageError: the file cannot be read.
      UserError: the file is not UTF-8 text, or has other sections.
    """
    name = f"the instructions {path}"
    try:
        before, *parts = _HEADING.split(read_bytes(path, name, 2**24).decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text") from None
    found = {title: [line.strip() for line in body.splitlines() if line.strip()]
             for title, body in zip(parts[::2], parts[1::2], strict=True)}
    is_marked = any(IMAGE_MARKER in line for lines in found.values() for line in lines)
    if before.strip() or sorted(found) != list(KINDS) or len(parts) != 4 or not all(found.values()) or is_marked:
        raise UserError(f"{name} is not a file of instructions; the sections [[concise]] and [[detailed]], each with "
                        f"at least one instruction and without {IMAGE_MARKER}, were expected")
    return found
