"""Makes the texts of `configs/smol.py` from the training rows of VQA-RAD and SLAKE.

    python samples/smol_texts.py --source data/vqa_rad --source data/slake --out runs/smol/texts

writes three files in LLaVA's own layout. A caption (`captions.json`) is one sentence of what the rows state about an image:
modality, plane and organ. A conversation (`conversations.json`) asks for the caption and then some of an image's questions,
and answers in sentences where a rule below makes one; no person and no model wrote them. `questions.json` has every
question with the set's own answer, several of an image in one conversation as in LLaVA-1.5's training mixture: image and
system text are then computed once for them all, a third of the tokens of a question a sample.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llavamed_jax.datasets.detect import layout_of  # noqa: E402
from llavamed_jax.datasets.registry import SETS, Selection  # noqa: E402
from llavamed_jax.datasets.sample import VqaSample  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.utils.files import write_text  # noqa: E402
from samples.make_vqa_rad import MODALITIES, PLANES, record  # noqa: E402

REQUESTS = ("Describe the image.", "What does this image show?", "Give a short description of the image.")
TURNS = 3  # questions of a conversation, besides the request
QUESTIONS = 6  # questions of a record of questions.json, at most
# As the sets name organs: VQA-RAD's three, and SLAKE's places that a caption says otherwise.
ORGANS = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen", "Brain_Tissue": "brain", "Brain_Face": "face",
          "Chest_lung": "chest", "Chest_heart": "chest", "Chest_mediastinal": "chest", "Lung": "lungs"}
_YES_NO = {"yes": True, "no": False}
# (question, sentence for the answer): {0} is the answer, {1} what the question names.
_OPEN = tuple((re.compile(question, re.I), sentence) for question, sentence in (
    (r"what (?:imaging )?modality|which modality|type of imaging", "This is an image taken by {0}."),
    (r"part of the body|what organ system|which organ system|organ system is", "The image shows the {0}."),
    (r"what is the (largest|main|biggest) organ", "The {1} organ in the image is the {0}."),
    (r"scanning plane|what plane|which plane", "The image is in the {0}."),
    (r"mr weighting", "The image is {0}-weighted."),
    (r"where is/are the abnormality", "The abnormality is located in this place: {0}."),
    (r"(?:what|which) diseases", "The image shows these diseases: {0}."),
    (r"how many (\w+)", "The number of {1} in the image is {0}."),
    (r"where (?:is|are) the ([\w ]+?)(?: located| in (?:this|the) \w+)?\?", "The {1} is located in this place: {0}."),
))  # fmt: skip
_CLOSED = tuple((re.compile(question, re.I), yes, no) for question, yes, no in (
    (r"does the picture contain ([\w ]+)\?", "Yes, the picture contains the {0}.", "No, the picture does not contain the {0}."),
    (r"is the ([\w ]+) healthy\?", "Yes, the {0} is healthy.", "No, the {0} is not healthy."),
    (r"are there (?:any )?abnormalities", "Yes, there are abnormalities in the image.", "No, the image shows no abnormality."),
    (r"(?:does|is) this image (?:look )?abnormal", "Yes, the image looks abnormal.", "No, the image looks normal."),
))  # fmt: skip


def sentence(question: str, answer: str) -> str:
    """Returns an answer as a sentence, if a rule makes one of it; else the answer itself."""
    answer = answer.strip().rstrip(".")
    if (is_yes := _YES_NO.get(answer.lower())) is not None:
        for pattern, yes, no in _CLOSED:
            if found := pattern.search(question):
                return (yes if is_yes else no).format(*(group.lower() for group in found.groups()))
        return f"{answer.capitalize()}."
    for pattern, form in _OPEN:
        if found := pattern.search(question):
            inside = answer if re.search(r"[A-Z]{2}|X-|T[12]", answer) else answer.lower()
            return form.format(inside, *(group.lower() for group in found.groups()))
    return f"{answer[:1].upper()}{answer[1:]}."


def _stated(samples: Sequence[VqaSample], patterns: dict[str, str]) -> str | None:
    """Returns what most open answers, and most questions answered yes, say of `patterns`; the first of several."""
    votes = collections.Counter()
    for sample in samples:
        text = sample.question if sample.answer.strip().lower() == "yes" else sample.answer
        votes.update(name for name, pattern in patterns.items() if re.search(pattern, text, re.I))
    return min(votes, key=lambda name: (-votes[name], name)) if votes else None


def caption(samples: Sequence[VqaSample]) -> str:
    """Returns one sentence about an image from its training rows: modality, plane and organ, as far as they are stated."""
    of_type = lambda kind: [sample for sample in samples if kind in (sample.question_type or "").upper()]
    modality = (samples[0].modality or "").replace("Ray", "ray") or _stated(of_type("MODALITY"), MODALITIES)
    plane = _stated(of_type("PLANE"), PLANES)
    organ = samples[0].organ and ORGANS.get(samples[0].organ, samples[0].organ.lower().replace("_", " "))
    words = " ".join(filter(None, (plane, modality, "image")))
    article = "an" if re.match(r"[aeio]|MR|X|AP", words) else "a"
    return f"This is {article} {words}{f' of the {organ}' if organ else ''}."


def texts(samples: Iterable[VqaSample], seed: int = 0) -> dict[str, list[dict]]:
    """Returns the records of each file, by its name, in the order in which images first occur.

    Args:
      samples: the questions.
      seed: decides which of an image's questions stand together, and in which order.
    """
    by_image: dict[str, list[VqaSample]] = {}
    for sample in samples:
        by_image.setdefault(str(sample.image), []).append(sample)
    captions, conversations, questions, drawn = [], [], [], random.Random(seed)
    for number, ((image, rows), request) in enumerate(zip(by_image.items(), itertools.cycle(REQUESTS))):
        said = caption(rows)
        turns = [(row.question.strip(), sentence(row.question, row.answer)) for row in rows]
        captions.append(record(f"{number}-caption", image, [(request, said)]))
        conversations.append(record(f"{number}-conversation", image, [(request, said), *turns[:TURNS]]))
        asked = [(row.question.strip(), row.answer.strip()) for row in rows if row.answer.strip()]
        for part, group in enumerate(_groups(drawn.sample(asked, len(asked)))):
            questions.append(record(f"{number}-questions-{part}", image, group))
    return {"captions.json": captions, "conversations.json": conversations, "questions.json": questions}


def _groups(items: list) -> list[list]:
    """Splits a list into as few parts of at most QUESTIONS as can be, alike in length to one."""
    parts = -(-len(items) // QUESTIONS)
    return [items[len(items) * n // parts:len(items) * (n + 1) // parts] for n in range(parts)]


def read(source: Path) -> list[VqaSample]:
    """Returns the training rows of a folder with VQA-RAD or SLAKE."""
    name = layout_of(source)
    if name not in ("vqa_rad", "slake"):
        raise UserError(f"the folder {source} holds neither VQA-RAD nor SLAKE{f' but {SETS[name].label}' if name else ''}")
    return SETS[name].read(Selection(source, "train", "clean"))


def write(sources: Sequence[Path], out: Path, held_out: Iterable[str] = (), seed: int = 0) -> dict[str, int]:
    """Writes the files.

    Args:
      sources: the folders with VQA-RAD or SLAKE.
      out: the folder of the files; made if it does not exist.
      held_out: names of images of which nothing is written.
      seed: of `texts`.

    Returns:
      The number of records in each file.
    """
    left_out = set(held_out)
    # A relative image would be looked for beside the file that names it.
    samples = [sample for source in sources for sample in read(source.absolute()) if sample.image.name not in left_out]
    files = texts(samples, seed)
    out.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        write_text(out / name, json.dumps(records, indent=1, ensure_ascii=False) + "\n")
    return {name: len(records) for name, records in files.items()}


def main() -> int:
    """Runs the command."""
    from llavamed_jax.utils.paths import local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=local, action="append", required=True, help="a folder with VQA-RAD or SLAKE")
    parser.add_argument("--out", type=local, required=True)
    parser.add_argument("--seed", type=int, default=0, help="another one joins other questions of an image")
    flags = parser.parse_args()
    try:
        found = write(flags.source, flags.out, seed=flags.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} records in {flags.out / name}" for name, count in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
