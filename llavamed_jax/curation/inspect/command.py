"""The command `inspect`: writes one page about a training file.

    python -m llavamed_jax.curation inspect --data conversations.json --images images --out page.html

With `--against` the page says what of an evaluation's questions occurs in the training data.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from llavamed_jax.curation.inspect import leakage, near, page, plots
from llavamed_jax.curation.inspect.gather import Findings, Row, Source, gather, quantiles
from llavamed_jax.curation.inspect.pictures import MISSING, Pictures, distinct, read_pictures
from llavamed_jax.curation.inspect.verbs import VERBS
from llavamed_jax.curation.json_list import check_place
from llavamed_jax.datasets import detect
from llavamed_jax.datasets.registry import SETS, SPLITS, Selection
from llavamed_jax.datasets.sample import VqaSample, all_images, one_name_each
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.utils.files import write_text
from llavamed_jax.utils.hashes import sha256_of_files
from llavamed_jax.utils.progress import progress

_TITLES = {"record": "All turns of a record", "question": "Question", "answer": "Answer"}
_MOST_PAIRS, _MOST_MATCHES, _MOST_GROUPS, _MOST_OF_A_GROUP, _MOST_PROBLEMS = 6, 12, 12, 7, 12


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--data", metavar="PATH", required=True, help="a LLaVA file, a file of figures, or a data set in its layout")
    add("--images", metavar="DIR", help="the folder of the images; default: the file's own")
    add("--out", metavar="FILE", required=True, help="the page, one HTML file that opens offline")
    add("--json", metavar="FILE", help="the page's numbers")
    add("--tokenizer", metavar="PATH", help="counts tokens instead of words")
    add("--against", metavar="PATH", help="an evaluation's questions: a data set in its layout, or a file")
    add("--against_images", metavar="DIR", help="the folder of its images; default: that of the layout")
    add("--against_split", metavar="NAME", choices=SPLITS, default="test", help="train, validation or test (default)")
    add("--workers", metavar="N", type=int, help="processes that read images; default: one a core, at most 16")
    add("--gallery", metavar="N", type=int, default=24, help="examples on the page (default 24)")
    add("--seed", metavar="N", type=int, default=0, help="draws the examples (default 0)")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
      UsageError: a flag is wrong.
      UserError: a file cannot be read or written, or no record can be read.
    """
    workers = args.workers if args.workers is not None else min(16, len(os.sched_getaffinity(0)) if hasattr(
        os, "sched_getaffinity") else os.cpu_count() or 1)
    for flag, value, least in (("--workers", workers, 1), ("--gallery", args.gallery, 0)):
        if value < least:
            raise UsageError(f"{flag} is {value}; at least {least} was expected")
    if args.against is None and args.against_images is not None:
        raise UsageError("--against_images names the images of --against, which is missing")
    for flag, file in (("--out", args.out), ("--json", args.json)):
        if file is not None:
            check_place(flag, Path(file))
    length, unit = _length(args.tokenizer)
    source = Source(Path(args.data), Path(args.images) if args.images else None)
    tested = _tested(args) if args.against is not None else []
    texts = leakage.Texts(tested)
    advance, close = progress(len(source), 0, source.kind)
    findings = gather(source, length, lambda _, row: texts.see(row), advance)
    close()
    if not findings.records:
        raise UserError(f"{args.data} has no usable record: {findings.sentences[0] if findings.sentences else 'none'}")
    training = _read(list(findings.images), workers, "images")
    copies = near.groups(training)
    counts = _counts(findings, training, copies)
    values = {"counts": counts, "leakage": None, "matches": [], "num_matches": 0, "tested_path": "", "tested_name": ""}
    if args.against is not None:
        pictures = _read(distinct(map(str, all_images(tested)))[0], workers, "tested images")
        values["leakage"], found = leakage.compare(texts, pictures, training)
        values |= {"tested_path": args.against, "tested_name": Path(args.against).name, "num_matches": len(found),
                   "matches": [_match(match) for match in found[:_MOST_MATCHES]]}
    lengths = {name: quantiles(each) for name, each in findings.lengths.items()}
    values |= _values(args, source, findings, training, copies, unit, lengths)
    if args.json:
        numbers = {"counts": counts, "unit": unit, "lengths": lengths, "domains": findings.domains,
                   "licences": findings.licences, "leakage": values["leakage"]}
        write_text(Path(args.json), json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    write_text(Path(args.out), page.render(**values))
    print(_summary(counts, values["leakage"], source.kind))
    print(f"page: {args.out}")


def _length(tokenizer: str | None) -> tuple[Callable[[str], int], str]:
    """Returns the function that measures a text, and its unit."""
    if tokenizer is None:
        return lambda text: len(text.split()), "words"
    from llavamed_jax.text.tokenizer import Tokenizer  # imports the libraries of tokenizers

    loaded = Tokenizer.load(tokenizer)
    return lambda text: len(loaded.encode(text, bos=False)), "tokens"


def _tested(args: argparse.Namespace) -> list[VqaSample]:
    """Reads the questions of the evaluation."""
    path = Path(args.against)
    if not path.exists():
        raise UserError(f"the evaluation {path} does not exist")
    name = detect.layout_of(path)
    if name is None:
        raise UserError(f"{path} holds none of the known data sets: {', '.join(each.title for each in SETS.values())}")
    images = args.against_images
    samples = SETS[name].questions(Selection(path, args.against_split, images=images))
    if not samples:
        raise UserError(f"{path} holds no questions in the split {args.against_split}")
    return one_name_each(samples)[0]


def _read(paths: list[str], workers: int, title: str) -> Pictures:
    advance, close = progress(len(paths), 0, title) if paths else (lambda _: None, lambda: None)
    found = read_pictures(paths, workers, advance)
    close()
    return found


def _counts(findings: Findings, training: Pictures, copies: near.Groups) -> dict[str, int]:
    missing = sum(state == MISSING for state in training.states)
    return {
        "records": findings.records, "damaged": findings.damaged, "without_image": findings.without_image,
        "pairs": findings.pairs, "questions": findings.questions, "repeated_pairs": findings.repeated,
        "images": len(training), "images_missing": missing,
        "images_not_readable": sum(map(bool, training.states)) - missing,
        "duplicate_groups": len(copies.groups), "images_surplus": copies.num_surplus,
        "images_same_file": copies.same_file, "images_blank": copies.num_blank,
        "images_not_all_compared": copies.num_uncompared,
    }  # fmt: skip


def _values(args: argparse.Namespace, source: Source, findings: Findings, training: Pictures, copies: near.Groups,
            unit: str, lengths: dict) -> dict:
    """Returns the template's values that do not concern an evaluation."""
    path, rng = Path(args.data), random.Random(args.seed)
    numbers = rng.sample(range(len(source)), min(len(source), 4 * args.gallery))
    drawn = list(_readable(source, numbers))
    groups = [{"size": len(group), "images": [page.figure(training.paths[i], []) for i in group[:_MOST_OF_A_GROUP]]}
              for group in copies.groups[:_MOST_GROUPS]]
    missing = [(state, training.paths[i]) for i, state in enumerate(training.states) if state][:_MOST_PROBLEMS]
    lengths = {_TITLES[name]: each for name, each in lengths.items() if each}
    return {
        "name": path.name, "path": args.data, "kind": source.kind,
        "sha256": sha256_of_files({"data": path})["data"] if path.is_file() else "of a folder, not computed",
        "unit": unit, "is_tokens": unit == "tokens", "lengths": lengths,
        "quantile_names": list(next(iter(lengths.values()), {})),
        "histograms": {_TITLES[name]: plots.histogram(each, unit) for name, each in findings.lengths.items()
                       if len(each) and name != "record"},
        "domains": plots.bars(findings.domains, findings.records),
        "licences": plots.bars(findings.licences, findings.records),
        "verbs": plots.verb_nouns(findings.verbs), "num_verbs": findings.verbs.total(), "num_listed": len(VERBS),
        "most_verbs": plots.MOST_VERBS, "most_bits": near.MOST_BITS, "least_correlation": near.LEAST_CORRELATION,
        "duplicates": groups,
        "problems": [("damaged record", sentence) for sentence in findings.sentences[:_MOST_PROBLEMS]]
        + [(f"image {state}", name) for state, name in missing],
        "gallery": [_example(row) for row in drawn[:args.gallery]], "seed": args.seed, "most_pairs": _MOST_PAIRS,
    }  # fmt: skip


def _readable(source: Source, numbers: list[int]):
    for number in numbers:
        try:
            yield source[number]
        except UserError:
            continue


def _example(row: Row) -> dict:
    image = row.images[0] if row.images else ""
    return page.figure(image, [Path(image).name, row.domain, row.licence], row.pairs[:_MOST_PAIRS])


def _match(match: leakage.Match) -> dict:
    how = ("the same file" if match.is_same_file
           else f"{match.bits} of 256 bits differ, correlation {match.correlation:.3f}")
    others = f"; {count_of(match.others, 'further training image')}" if match.others else ""
    says = [f"{how}{others}", f"{count_of(match.questions, 'question')}: {match.asked} asked there too, "
                              f"{match.answered} with the same answer"]
    return {"tested": page.figure(match.tested, []), "training": page.figure(match.training, []), "says": says}


def _summary(counts: dict[str, int], leaked: dict[str, int] | None, kind: str) -> str:
    lines = [f"{counts['records']:,} {kind} ({counts['damaged']:,} damaged), {counts['pairs']:,} pairs "
             f"({counts['repeated_pairs']:,} repeated)",
             f"{counts['images']:,} images: {counts['images_missing']:,} missing, "
             f"{counts['images_not_readable']:,} not readable, {counts['images_surplus']:,} copies of another"]
    if leaked is not None:
        images, answered = leaked["images_same_file"] + leaked["images_same_picture"], leaked[leakage.ANSWERED]
        lines.append(f"leakage: {images:,} of {leaked['images']:,} tested images occur "
                     f"({leaked['images_same_file']:,} as the same file), and {answered:,} of {leaked['questions']:,} "
                     "questions with their answer about the same picture")
    return "\n".join(lines)
