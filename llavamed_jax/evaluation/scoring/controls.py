"""Controls: test whether answers depend on the image at all.

A model that answers from the question alone scores well on medical VQA. `exchanged_images` shows every question the
image of another question, and `noise_images` shows a picture of noise. The scores that remain come from the text alone;
with another image, the model may still use what the images of a data set have in common. `organ_accuracy` asks one
fixed question about every image, so that the answers can only differ because of the images.
"""

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llavamed_jax.datasets.sample import Shown, VqaSample, own_images
from llavamed_jax.errors import UserError, count_of
from llavamed_jax.utils import signals

ORGAN_QUESTION = "Which organ system is shown in this image?"
"""Asked about every image, in training too. Its answers are derived from VQA-RAD's field `image_organ`."""

ORGAN_ANSWERS = {"HEAD": "Head.", "CHEST": "Chest.", "ABD": "Abdomen."}

# Words that name an organ, from VQA-RAD's answers to "what organ system is pictured?".
ORGAN_WORDS = {
    "HEAD": frozenset("head brain skull cranium cranial intracranial cerebral cns neurological neuro".split()),
    "CHEST": frozenset(
        "chest thorax thoracic lung lungs heart cardiac cardiovascular cardiopulmonary pulmonary respiratory".split()
    ),
    "ABD": frozenset(
        "abd abdomen abdominal gi gastrointestinal liver kidney kidneys spleen pancreas bowel stomach colon "
        "pelvis".split()
    ),
}
_ORGAN_OF_WORD = {word: organ for organ, words in ORGAN_WORDS.items() for word in words}


def derangement(images: Sequence[str], seed: int) -> dict[str, str]:
    """Maps each distinct image to another one, along one random cycle through all of them.

    Args:
      images: paths of images, with repetitions.
      seed: determines the cycle.

    Raises:
      UserError: there are fewer than two distinct images.
    """
    distinct = list(dict.fromkeys(images))
    if len(distinct) < 2:
        raise UserError(f"the questions have {count_of(len(distinct), 'image')}; at least 2 were expected, so that "
                        "images can be exchanged")
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def exchanged_images(samples: Sequence[VqaSample], seed: int) -> list[Shown]:
    """Returns what each sample is shown in the control: the paths of as many images as it has.

    All questions about an image are shown the same other image.
    """
    own = own_images(samples)
    other = derangement([image for images in own for image in images], seed)
    return [tuple(other[image] for image in images) for images in own]


NOISE_SIZE = 336
"""Width and height of a noise picture: LLaVA-Med v1.5's tower then sees each pixel as it was drawn."""


@contextlib.contextmanager
def noise_images(samples: Sequence[VqaSample], folder: Path, seed: int) -> Iterator[list[Shown]]:
    """Writes one picture of noise for each distinct image, and deletes them at the end of the context.

    The picture for the i-th distinct image, in order of appearance, has independent uniform RGB values drawn from
    (seed, i).

    Args:
      samples: the questions.
      folder: the folder for the PNG files. Its earlier contents are deleted, and it is deleted at the end.
      seed: seed of the noise.

    Yields:
      For each sample, the paths of its pictures of noise.

    Raises:
      UserError: the disk has too little room, or the folder cannot be written to.
    """
    own = own_images(samples)
    order = {image: place for place, image in enumerate(dict.fromkeys(image for images in own for image in images))}
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
    with contextlib.ExitStack() as stack:
        remove = lambda: shutil.rmtree(folder, ignore_errors=True)
        stack.callback(remove)
        stack.enter_context(signals.undone_by(remove))
        paths = {image: str(folder / f"noise_{place:05}.png") for image, place in order.items()}
        _write_noise(list(paths.values()), folder, seed)
        yield [tuple(paths[image] for image in images) for images in own]


def check_room(count: int, folder: Path) -> None:
    """Raises UserError if the disk of a folder has no room for `count` pictures of noise."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    needed, free = count * NOISE_SIZE**2 * 3, shutil.disk_usage(there).free  # noise cannot be compressed
    if free < needed:
        raise UserError(f"{count} pictures of noise need {needed / 1e6:.0f} MB; the disk of {folder} has "
                        f"{free / 1e6:.0f} MB free")


def _write_noise(paths: Sequence[str], folder: Path, seed: int) -> None:
    try:
        folder.mkdir(parents=True)
        check_room(len(paths), folder)
        for place, path in enumerate(signals.checked(paths)):
            pixels = np.random.default_rng((seed, place)).integers(0, 256, (NOISE_SIZE, NOISE_SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, compress_level=0)
    except OSError as error:
        raise UserError(f"the pictures of noise cannot be written to {folder}: {error.strerror or error}") from error


_READ = {"closed_accuracy": "closed accuracy", "open_f1": "open F1", "choice_accuracy": "accuracy of choices",
         "rouge_l": "ROUGE-L"}
_LEVEL = 0.05  # significance level of the test behind a sentence


def reading(difference: Mapping, instead: str) -> str:
    """Puts the difference between the answers about the own images and those of a control into a sentence.

    A number with a sign is own image minus control, as in every table.

    Args:
      difference: the result of `score.difference`.
      instead: what the control showed, such as "noise".
    """
    names = [name for name in _READ if difference.get(name) is not None]
    seen = [name for name in names if difference[f"{name}_p"] < _LEVEL and difference[name] > 0]
    worse = [name for name in names if difference[f"{name}_p"] < _LEVEL and difference[name] < 0]
    blind = [name for name in names if name not in seen + worse]
    parts = []
    if seen:
        parts.append(f"the model loses {_points(difference, seen, '.1f')}: these answers depend on the image")
    if worse:
        parts.append(f"the model gains {_points(difference, worse, '.1f')}: the right image misleads it, or something "
                     "is wrong")
    if blind:
        verb = "differences of {} are" if len(blind) > 1 else "a difference of {} is"
        parts.append(f"{verb.format(_points(difference, blind, '+.1f'))} within chance: no evidence that these "
                     "answers depend on the image")
    return f"With {instead} in place of the image: {'; '.join(parts)}." if parts else ""


def _points(difference: Mapping, names: Sequence[str], form: str) -> str:
    """Formats differences, with a sign only if `form` has one; else the verb of the sentence says loss or gain."""
    shown = {name: difference[name] if "+" in form else abs(difference[name]) for name in names}
    return " and ".join(f"{round(shown[name], 1) + 0.0:{form}} points of {_READ[name]} (p "
                        f"{_p(difference[f'{name}_p'])})"
                        for name in names)


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "< 0.001"


def named_organ(answer: str) -> str | None:
    """Returns HEAD, CHEST or ABD, by the first word of the answer that is in `ORGAN_WORDS`; None if there is none."""
    words = re.findall(r"[a-z]+", answer.lower())
    return next((_ORGAN_OF_WORD[word] for word in words if word in _ORGAN_OF_WORD), None)


def check_organs(samples: Sequence[VqaSample]) -> None:
    """Raises UserError if there are fewer than two images or an image has an organ that is not in `ORGAN_ANSWERS`."""
    organs = {str(sample.image): str(sample.organ) for sample in samples}
    strange = {organ for organ in organs.values() if organ not in ORGAN_ANSWERS}
    if strange or len(organs) < 2:
        raise UserError(
            f"the organ question needs at least two images of {', '.join(ORGAN_ANSWERS)};"
            f" {len(organs)} images{' of ' + ', '.join(sorted(strange)) if strange else ''} were given"
        )


def organ_accuracy(ask: Callable[[Sequence[tuple[str, Shown]]], Sequence[str]], samples: Sequence[VqaSample]) -> dict:
    """Measures how often the answer to `ORGAN_QUESTION` names the organ that the data set states, in percent.

    The n images form a ring; in shift s, every image is replaced by the one s places further. The question is always
    the same text and decoding is greedy, so an answer depends only on the image that is shown. Hence the results of all
    n-1 shifts follow from n generations.

    Args:
      ask: answers (question, paths of its images) pairs, greedily.
      samples: the questions. Each distinct image counts once, with its field `organ`.

    Returns:
      `question`, `n`, `hits`, `accuracy` (with the own image), `exchanged` (mean over all shifts), `shifts` (the
      accuracy of each shift), `majority` (accuracy of always naming the most frequent organ), and `answers` (image,
      organ, answer, named organ).

    Raises:
      UserError: there are fewer than two images, or an image has an organ that is not in `ORGAN_ANSWERS`.
    """
    check_organs(samples)
    organs = {str(sample.image): str(sample.organ) for sample in samples}
    texts = ask([(ORGAN_QUESTION, (image,)) for image in organs])
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
