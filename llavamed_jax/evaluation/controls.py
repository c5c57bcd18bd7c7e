"""Controls: does an answer depend on the image at all?

A model that answers from the question alone scores well on medical VQA. `exchanged_images` gives every question the
image of another, so that what remains is what the text alone gives. `organ_accuracy` asks one fixed question about
every image, so that only the image can tell the answers apart.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from llavamed_jax.data.questions import VqaSample
from llavamed_jax.errors import UserError

ORGAN_QUESTION = "Which organ system is shown in this image?"
"""Asked about every image, in training too. Its answers are derived from VQA-RAD's field `image_organ`."""

ORGAN_ANSWERS = {"HEAD": "Head.", "CHEST": "Chest.", "ABD": "Abdomen."}

# The words by which an answer names an organ; those of VQA-RAD's own answers to "what organ system is pictured?".
ORGAN_WORDS = {
    "HEAD": frozenset("head brain skull cranium cranial intracranial cerebral cns neurological neuro".split()),
    "CHEST": frozenset(
        "chest thorax thoracic lung lungs heart cardiac cardiovascular cardiopulmonary pulmonary respiratory".split()
    ),
    "ABD": frozenset(
        "abd abdomen abdominal gi gastrointestinal liver kidney kidneys spleen pancreas bowel stomach colon pelvis".split()
    ),
}
_ORGAN_OF_WORD = {word: organ for organ, words in ORGAN_WORDS.items() for word in words}


def derangement(images: Sequence[str], seed: int) -> dict[str, str]:
    """Another image for each distinct image: one random cycle through all of them, fixed by the seed.

    Raises UserError for fewer than two distinct images.
    """
    distinct = list(dict.fromkeys(images))
    if len(distinct) < 2:
        raise UserError(f"images can be exchanged among at least two; the questions have {len(distinct)}")
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def exchanged_images(samples: Sequence[VqaSample], seed: int) -> list[str]:
    """For each sample the path of the image that it is shown in the control run. All questions of an image move together."""
    other = derangement([str(sample.image) for sample in samples], seed)
    return [other[str(sample.image)] for sample in samples]


def named_organ(answer: str) -> str | None:
    """HEAD, CHEST or ABD by the first word of the answer that is in `ORGAN_WORDS`; None if none is."""
    words = re.findall(r"[a-z]+", answer.lower())
    return next((_ORGAN_OF_WORD[word] for word in words if word in _ORGAN_OF_WORD), None)


def organ_accuracy(ask: Callable[[Sequence[tuple[str, str]]], Sequence[str]], samples: Sequence[VqaSample]) -> dict:
    """How often the answer to `ORGAN_QUESTION` names the organ that the data set states for the image, in percent.

    The images are put on a ring; in shift s every image's place is taken by the one s places further. Since the
    question is the same text everywhere and decoding is greedy, the answer depends on the image shown only, so all n-1
    shifts follow from n generations.

    Args:
      ask: answers (question, image path) pairs, greedily.
      samples: of which each distinct image counts once, with its field `organ`.
    Returns:
      `n`, `hits`, `accuracy` (with the image), `exchanged` (mean over all shifts) and `shifts` (each one), `majority`
      (always the most frequent organ), and `answers` (image, organ, answer, named organ).
    Raises:
      UserError: fewer than two images, or an image whose organ is not one of `ORGAN_ANSWERS`.
    """
    organs = {str(sample.image): str(sample.organ) for sample in samples}
    strange = {organ for organ in organs.values() if organ not in ORGAN_ANSWERS}
    if strange or len(organs) < 2:
        raise UserError(
            f"the organ question needs at least two images of {', '.join(ORGAN_ANSWERS)};"
            f" {len(organs)} images{' of ' + ', '.join(sorted(strange)) if strange else ''} were given"
        )
    texts = ask([(ORGAN_QUESTION, image) for image in organs])
    gold, named = list(organs.values()), [named_organ(text) for text in texts]
    n = len(gold)
    hits = [sum(named[(i + shift) % n] == gold[i] for i in range(n)) for shift in range(n)]
    answers = [
        {"image": image, "organ": organ, "answer": text, "named": name}
        for (image, organ), text, name in zip(organs.items(), texts, named, strict=True)
    ]
    return {
        "question": ORGAN_QUESTION,
        "n": n,
        "hits": hits[0],
        "accuracy": 100 * hits[0] / n,
        "exchanged": 100 * sum(hits[1:]) / (n * (n - 1)),
        "shifts": [100 * shifted / n for shifted in hits[1:]],
        "majority": 100 * Counter(gold).most_common(1)[0][1] / n,
        "answers": answers,
    }
