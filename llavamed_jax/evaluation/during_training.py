"""Generation during training: closed accuracy on the validation questions, and sample answers for the log."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llavamed_jax.assistant import LlavaMed
from llavamed_jax.datasets import training
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring.strict import is_strictly_right
from llavamed_jax.models.llava import param_axes
from llavamed_jax.models.stacking import unstack
from llavamed_jax.parallel import distributed
from llavamed_jax.parallel.mesh import local_view, param_shardings
from llavamed_jax.processor import Processor
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.training.callbacks import Snapshot
from llavamed_jax.training.log import Sample
from llavamed_jax.training.state import dtype_of
from llavamed_jax.utils import signals, terminal

SHOWN = 4  # sample questions; the same ones are asked every time
MAX_NEW_TOKENS = {"sample": 64, "closed": 16}


@dataclass(frozen=True)
class Question:
    """The first turn of a training record.

    Attributes:
      name: the id of the record.
      images: the paths of the images that the markers of the turn stand for.
      text: the question; with its markers if several images stand at their places in it, else without markers.
      wanted: the answer in the record.
      is_closed: whether the question is closed.
      lost: how many images the record names beyond its number of markers.
    """

    name: str
    images: Sequence[str]
    text: str
    wanted: str
    is_closed: bool
    lost: int = 0


def first_turn(record: Mapping) -> Question | None:
    """Returns the question of a training record; None if the record has no answer."""
    turns = record["conversations"][record["conversations"][0]["from"] == "gpt":]
    if len(turns) < 2:
        return None
    wanted = turns[1]["value"]
    kind = record.get("answer_type")  # VQA sets state it; in other sets a question answered by yes or no is closed
    is_closed = (str(kind).strip().upper() == "CLOSED" if kind
                 else metrics.normalize_word(wanted.lower()) in ("yes", "no"))
    markers = [turn["value"].count(IMAGE_MARKER) for turn in turns]
    # If the numbers of markers and images differ, all markers of a turn stand for one image.
    count = markers[0] if sum(markers) == len(record["image"]) else bool(markers[0])
    text = turns[0]["value"]
    return Question(str(record["id"]), record["image"][:count],
                    text if count > 1 else text.replace(IMAGE_MARKER, "").strip(), wanted, is_closed,
                    record.get("surplus", 0))


def _questions(records: Iterable[Mapping]) -> Iterator[Question]:
    return (question for question in map(first_turn, records) if question is not None)


class TrainedModel:
    """Answers questions with the model of a training run.

    The programs are compiled once; each call of `ask` uses the weights of its snapshot.
    """

    def __init__(self):
        self._model: LlavaMed | None = None
        self._captioner: Processor | None = None  # set for a template without roles
        self._refused: dict[str, str] = {}  # question -> the reason why it is not asked

    def ask(self, snapshot: Snapshot, questions: Sequence[Question], max_new_tokens: int) -> list[str | None]:
        """Returns greedy answers.

        Args:
          snapshot: the weights, and the run's data and program.
          questions: the questions.
          max_new_tokens: the longest answer, in tokens.

        Returns:
          One answer for each question; None if the question cannot be asked. The reason is printed once.

        Raises:
          Stopped: process 0, which answers for all, was asked to stop; raised in all processes.
        """
        with self._loaded(snapshot) as model:
            known = len(self._refused)
            rows = [self._row(model, question) for question in questions]
            self._say(list(self._refused.items())[known:])
            answers = distributed.from_first(lambda: self._answers(model, rows, max_new_tokens))
            if answers is None:
                raise signals.Stopped("stopped while the model answered")
            return answers

    def _answers(self, model: LlavaMed, rows: Sequence[tuple | None], max_new_tokens: int) -> list[str | None] | None:
        """Returns an answer for each row, None for rows that are not asked; None in all if the run is to stop."""
        asked = [row for row in rows if row is not None]
        try:
            with signals.raising():
                answers = iter(model.generate_tokens([ids for ids, _ in asked], [pixels for _, pixels in asked],
                                                     max_new_tokens))
        except signals.Stopped:
            return None
        return [None if row is None else self._text(model, next(answers)) for row in rows]

    def _row(self, model: LlavaMed, question: Question) -> tuple[list[int], list[np.ndarray]] | None:
        """Returns token ids and pixels. A caption's prompt is the image alone, as in training without roles."""
        processor = model.processor
        try:
            if question.lost:
                raise UserError(f"its record names {question.lost} more images than it has {IMAGE_MARKER} markers")
            if self._captioner is not None:
                ids = processor.expand(self._captioner.encode(self._captioner.image_marker))
            else:
                ids = processor.expand(processor.encode(processor.question(question.text, question.images)))
            if len(ids) > model.engine.max_prompt:
                raise UserError(f"its prompt is {len(ids)} tokens long; "
                                f"at most {model.engine.max_prompt} were expected")
            return ids, list(processor.images_uint8(question.images)) if question.images else []
        except UserError as error:
            self._refused.setdefault(question.name, str(error))
            return None

    @staticmethod
    def _say(refused: Sequence[tuple[str, str]]) -> None:
        for name, why in refused[:SHOWN]:
            print(terminal.sentence(f"question {name} is not asked: {why}"), flush=True)
        if len(refused) > SHOWN:
            print(f"{len(refused) - SHOWN} more questions are not asked for similar reasons", flush=True)

    def _text(self, model: LlavaMed, ids: Sequence[int]) -> str:
        text = model.processor.decode(ids)
        return min((text.split(end)[0] for end in model.processor.stop), key=len, default=text).strip()

    @contextlib.contextmanager
    def _loaded(self, snapshot: Snapshot) -> Iterator[LlavaMed]:
        """Yields the model with a snapshot's weights; frees them afterwards, because training needs the memory."""
        program = snapshot.program
        params, mesh = _unrolled(snapshot)
        if self._model is None:
            processor = snapshot.data.processor
            if processor.template.is_for_training_only:  # ask with the template of inference; captions are an exception
                self._captioner = processor if processor.template.labels == "plain" else None
                processor = Processor(processor.config, processor.tokenizer)
            self._model = LlavaMed(program.model.cfg, params, processor, program.model.dtype, mesh)
        self._model.engine.params = params
        try:
            yield self._model
        finally:
            self._model.engine.params = None


def _unrolled(snapshot: Snapshot) -> tuple[Mapping, Mesh]:
    """Returns a snapshot's parameters as the engine takes them, and the mesh that they lie on.

    The layers are unstacked (one array a layer), and the dtype is that of the computation. The engine generates on the
    devices of one process, so with several processes each of them gets a complete copy on its own devices.
    """
    program = snapshot.program
    rules = param_axes(program.model.cfg)
    unroll = _unroll(program.model.dtype)
    shapes = jax.eval_shape(unroll, snapshot.params)
    params = jax.jit(unroll, out_shardings=param_shardings(shapes, rules, program.mesh))(snapshot.params)
    if distributed.process_count() == 1:
        return params, program.mesh
    everywhere, here = local_view(program.mesh)
    copies = jax.device_put(params, param_shardings(shapes, rules, everywhere))
    local = lambda x, sharding: jax.make_array_from_single_device_arrays(x.shape, sharding,
                                                                         [part.data for part in x.addressable_shards])
    return jax.tree.map(local, copies, param_shardings(shapes, rules, here)), here


@functools.cache  # jax compiles a function object once
def _unroll(dtype: jax.typing.DTypeLike) -> Callable[[Mapping], Mapping]:
    """Returns the function that unstacks parameters and casts them to the dtype of a computation."""
    def unroll(params: Mapping) -> Mapping:
        flat = unstack(flatten_dict(params, sep="/"))
        return unflatten_dict({name: x if isinstance(x, Kernel) else x.astype(dtype_of(name, dtype))
                               for name, x in flat.items()}, sep="/")

    return unroll


class ClosedAccuracy:
    """An evaluator: the share of closed validation questions that is answered right (`strict.is_strictly_right`)."""

    def __init__(self, model: TrainedModel):
        self._model = model

    def __call__(self, snapshot: Snapshot) -> dict[str, float]:
        """Returns accuracy (a fraction) and number of questions; nothing if there are no closed questions."""
        if snapshot.data.validation is None:
            return {}
        closed = [q for q in _questions(snapshot.data.validation.readable()) if q.is_closed]
        answers = self._model.ask(snapshot, closed, MAX_NEW_TOKENS["closed"]) if closed else []
        right = [is_strictly_right(answer, q.wanted) for q, answer in zip(closed, answers) if answer is not None]
        return {"validation_closed_accuracy": sum(right) / len(right), "validation_closed": len(right)} if right else {}


class Samples:
    """A sampler: answers the first few questions with an image of `data.samples`, or of validation or training data."""

    def __init__(self, model: TrainedModel):
        self._model = model
        self._has_said = False

    def __call__(self, snapshot: Snapshot) -> list[Sample]:
        """Returns the same questions at every call, with the answers of the snapshot."""
        cfg, data = snapshot.data.cfg, snapshot.data
        fixed = (training.read_training(cfg.data.samples, cfg.data.images) if cfg.data.samples
                 else data.validation or data.train)
        with_image = (q for q in _questions(fixed.readable()) if q.images)
        questions = list(itertools.islice(with_image, SHOWN))
        if not questions and not self._has_said:
            print("samples_every has no effect: no question of the data has both an image and an answer", flush=True)
            self._has_said = True
        answers = self._model.ask(snapshot, questions, MAX_NEW_TOKENS["sample"]) if questions else []
        return [Sample(q.name, data.processor.images_uint8(q.images), q.text, answer, q.wanted)
                for q, answer in zip(questions, answers) if answer is not None]
