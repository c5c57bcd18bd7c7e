"""A model that answers questions: weights, processor and generation engine behind a few calls.

Axis letters: B rows, T positions, I images, P positions of an image, V vocabulary, H and W height and width.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from llavamed_jax.adapters.open import open_model
from llavamed_jax.checkpoints.generation_file import not_applied, sampling_of
from llavamed_jax.checkpoints.identity import Origin, origin
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.config import IMAGE_TOKEN, KV_CACHES, PAD_TOKEN, LlavaConfig
from llavamed_jax.errors import UserError, short, warn
from llavamed_jax.generation.beam import BeamSearch
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.many import answer_each
from llavamed_jax.generation.requests import Request, check_image, check_settings, name_of, whole_numbers
from llavamed_jax.generation.sampling import row_seeds
from llavamed_jax.generation.text_stream import Completion, TextStream, completion
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh
from llavamed_jax.processor import Processor
from llavamed_jax.quantized.rounding import ROUNDINGS
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.text.image_positions import expand_images
from llavamed_jax.text.messages import read_messages

log = logging.getLogger(__name__)


def load(path: str | Path, dtype=None, quantize=None, mesh: Mesh | str | None = None, adapter=None,
         vision_tower: str | Path | None = None, tokenizer: str | Path | None = None,
         template: str | None = None, kv_cache: str | None = None) -> "LlavaMed":
    """Loads a checkpoint of any layout that `checkpoints.open.open_checkpoint` reads.

    Args:
      path: a directory in a PyTorch layout, this project's own tree (a run's workdir), which may also be at
        `gs://BUCKET/KEY` or `s3://BUCKET/KEY`, `owner/name[@revision]` of a hub, or `preset:NAME` (random weights).
      dtype: of weights and computation; None is bfloat16 on GPU and TPU, float32 on a CPU. `"float32"` also sets JAX's
        matmul precision to `highest`, which GPUs and TPUs otherwise lower.
      quantize: rounds the kernels of the decoder's layers while they are loaded: `"int8"` (a scale for each output),
        `"int4"` (groups of 128, 64 or 32 inputs) or `"nf4"` (groups of 64). Products stay in `dtype`. None rounds
        nothing; an export of few bits stays as it is, and cannot be rounded again.
      mesh: a Mesh with the axes data, fsdp and tp, or text such as `"data=1,tp=2"` over the devices of this process;
        None is one device.
      adapter: the directory of a LoRA adapter in PEFT's or LLaVA's layout, put onto the checkpoint without merging;
        None for none. A path that is such a directory itself is put onto the base that it names.
      vision_tower: a directory of a tower that replaces the checkpoint's own tower (quirk Q1 of the original).
      tokenizer: a tokenizer's file or directory that replaces the checkpoint's own.
      template: the name of a prompt template that replaces the checkpoint's own.
      kv_cache: `"int8"` stores the keys and values of positions that were read in half of bfloat16's bytes, each with
        a scale; None stores them in `dtype`.

    Returns:
      The model with its processor.

    Raises:
      UserError: the checkpoint or an argument is wrong; one sentence says what.
    """
    if quantize is not None and (not isinstance(quantize, str) or quantize not in ROUNDINGS):
        raise UserError(f"quantize is {short(quantize)}; {', '.join(ROUNDINGS)} or None was expected")
    if kv_cache is not None and kv_cache not in KV_CACHES:
        raise UserError(f"kv_cache is {short(kv_cache)}; {' or '.join(KV_CACHES)} or None was expected")
    checkpoint = open_model(path, vision_tower, adapter)
    if sentence := not_applied(checkpoint.config, checkpoint.files):
        warn(f"{path}: {sentence}")
    processor = Processor.from_checkpoint(checkpoint, tokenizer=tokenizer, template=template)
    if processor.eos_ids != checkpoint.config.decoder.eos_ids:
        named = checkpoint.config.decoder.eos_ids
        more = [f"{short(processor.tokenizer.token_of(i))} ({i})" for i in processor.eos_ids if i not in named]
        warn(f"{path}: {' and '.join(more)} of the tokenizer or the template also end an answer; the configs name only "
             f"{list(named)}")
    mesh = make_mesh(mesh, jax.local_devices()) if isinstance(mesh, str) else mesh
    dtype = computation_dtype(dtype)
    model = LlavaMed(checkpoint.config, load_params(checkpoint, dtype, quantize=quantize, as_stored=True), processor,
                     dtype, mesh, Path(adapter or path).name, checkpoint.tower, origin(path, checkpoint, tokenizer),
                     quantize or checkpoint.few_bits, kv_cache)
    model.defaults = sampling_of(checkpoint.files)
    log.info("%s", model)
    return model


def computation_dtype(dtype) -> np.dtype:
    """Returns the dtype of a model's weights and computation; an explicit float32 also sets the matmul precision.

    Args:
      dtype: as of `load`.

    Raises:
      UserError: the dtype is not one of floating point that models have.
    """
    found = _numpy_dtype(dtype)
    if dtype is not None and found == np.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    return found


def _numpy_dtype(dtype):
    if dtype is None:
        return np.dtype(np.float32 if jax.default_backend() == "cpu" else ml_dtypes.bfloat16)
    known = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
    try:
        return known[np.dtype(dtype).name]
    except (KeyError, TypeError):
        raise UserError(f"the dtype is {dtype!r}; float32, bfloat16 or float16 was expected") from None


class LlavaMed:
    """A model with its processor. `load` makes one from a checkpoint; the constructor takes what is already in memory.

    Args:
      config: the model's shapes.
      params: the unrolled parameter tree, in the dtype of the computation.
      processor: text and images; may lack a tokenizer.
      dtype: of the computation.
      mesh: a Mesh with the axes data, fsdp and tp; None is one device.
      name: what predictions call this model.
      tower: a description of the vision tower.
      origin: the files that the model was loaded from.
      quantize: how the kernels in `params` were rounded, for the record; None if they were not.
      kv_cache: `int8`, or None for a cache in `dtype`.

    Attributes:
      defaults: what the checkpoint's `generation_config.json` asks for; only a server applies it.
    """

    def __init__(self, config: LlavaConfig, params, processor: Processor, dtype=jnp.float32, mesh: Mesh | None = None,
                 name: str = "llavamed", tower: str = "", origin: Origin | None = None,
                 quantize: str | None = None, kv_cache: str | None = None):
        self.config, self.processor, self.dtype, self.mesh, self.name, self.tower = (
            config, processor, dtype, mesh, name, tower)
        self.origin, self.quantize, self.kv_cache, self.defaults = origin, quantize, kv_cache, {}
        self.engine = Engine(config.ending_with(processor.eos_ids), params, dtype, mesh,
                             cache_dtype=None if kv_cache is None else np.dtype(kv_cache))
        self._beams = BeamSearch(self.engine)
        self._forward = jax.jit(Llava(config, dtype).apply)

    def describe(self) -> dict[str, object]:
        """Describes the model in JSON values, and says which part was taken where several could have been.

        Returns:
          `checkpoint` (the PATH; None for a model that was made in memory), `step` (of a run), `template`, `tower`,
          `tokenizer`, `dtype`, `mesh` (axis -> devices, None for one device), `quantize`, `kv_cache` and `adapter`
          (the directory of an adapter that was put onto the checkpoint).
        """
        p, mesh = (self.processor,
                   None if self.mesh is None else {name: int(size) for name, size in self.mesh.shape.items()})
        return {
            "checkpoint": self.origin.path if self.origin else None, "step": self.origin.step if self.origin else None,
            "template": p.template_words, "tower": self.tower or None, "tokenizer": p.tokenizer_words,
            "dtype": np.dtype(self.dtype).name, "mesh": mesh, "quantize": self.quantize,
            "kv_cache": self.kv_cache,
            "adapter": self.origin.adapter if self.origin else None,
        }  # fmt: skip

    def __repr__(self) -> str:
        said = {name: value for name, value in self.describe().items() if value is not None}
        return f"{self.name}: {', '.join(f'{name} {value}' for name, value in said.items())}"

    def logits(self, input_ids, pixel_values=None) -> np.ndarray:
        """Computes the logits of whole rows.

        Args:
          input_ids: int32 [B,T]. The P positions of an image each hold IMAGE_TOKEN; -1 pads a short row on the right.
          pixel_values: [I,H,W,3] in order of appearance over the rows, float32 as `processor.images` returns it or
            uint8 as `processor.images_uint8` does, or None.

        Returns:
          float32 [B,T,V]; unspecified at padded positions.

        Raises:
          UserError: (a ValueError) images and image positions do not fit, with both numbers, or an id is outside the
            vocabulary.
        """
        ids = whole_numbers(input_ids, "input_ids")
        if ids.ndim != 2 or not ids.size:
            raise UserError(f"input_ids has the shape {ids.shape}; [B,T] was expected")
        wrong = ids[(ids >= self.config.decoder.vocab_size) | ((ids < 0) & (ids != IMAGE_TOKEN) & (ids != PAD_TOKEN))]
        if wrong.size:
            raise UserError(f"input_ids holds {wrong[0]}; ids below {self.config.decoder.vocab_size}, {IMAGE_TOKEN} or "
                            f"{PAD_TOKEN} were expected")
        held = ids != PAD_TOKEN
        apart = np.flatnonzero((np.diff(held, axis=1) & held[:, 1:]).sum(1) + held[:, 0] > 1)
        if len(apart):
            raise UserError(f"row {apart[0]} of input_ids has {PAD_TOKEN} between its tokens; padding was expected "
                            "only on the right")
        slots, ids = self._slots(ids, pixel_values), ids.astype(np.int32)
        segments = (ids != PAD_TOKEN).astype(np.int32)
        if self.mesh is None:
            return np.asarray(self._forward({"params": self.engine.params}, ids, slots, segment_ids=segments))
        batch, rows = (ids, slots, segments), len(ids)
        shards = batch_shards(self.mesh)
        batch = jax.tree.map(lambda x: np.concatenate([x, np.zeros((-rows % shards, *x.shape[1:]), x.dtype)]), batch)
        with jax.set_mesh(self.mesh):
            ids, slots, segments = jax.device_put(batch, batch_sharding(self.mesh))
            return np.asarray(self._forward({"params": self.engine.params}, ids, slots, segment_ids=segments))[:rows]

    def _slots(self, ids, pixel_values):
        """Assigns images [I,H,W,3] to the rows that hold their positions: [B,slots,H,W,3], or None without images."""
        P = self.config.tokens_per_image
        positions = (ids == IMAGE_TOKEN).sum(axis=1)
        images = np.zeros((0,)) if pixel_values is None else np.atleast_1d(np.asarray(pixel_values))
        if (positions % P).any() or positions.sum() != P * len(images):
            raise UserError(f"the rows have {positions.tolist()} image positions for {len(images)} images; {P} "
                            "positions per image were expected")
        for image in images:
            check_image(self.config, image, "pixel_values")
        if not len(images):
            return None
        counts = positions // P
        slots = np.zeros((len(ids), counts.max(), *images.shape[1:]),
                         np.uint8 if images.dtype == np.uint8 else np.float32)
        taken = iter(images)
        for row, count in enumerate(counts):
            for slot in range(count):
                slots[row, slot] = next(taken)
        return slots

    def generate_tokens(self, rows: Sequence[Sequence[int]], images: Sequence[Sequence[np.ndarray]] | None = None,
                        max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
                        num_beams: int = 1, seed: int = 0) -> list[list[int]]:
        """Generates token ids for rows of token ids.

        Args:
          rows: token ids; an image is one IMAGE_TOKEN or a run of P.
          images: the images of each row, float32 or uint8 [H,W,3] as in `logits`.
          max_new_tokens: as in `generate`.
          temperature: as in `generate`.
          top_p: as in `generate`.
          top_k: as in `generate`.
          num_beams: as in `generate`.
          seed: as in `generate`.

        Returns:
          The new token ids of each row, including the end-of-sequence id.

        Raises:
          UserError: (a ValueError) images do not fit their markers, a row is too long, or a setting is out of range.
        """
        images = [[] for _ in rows] if images is None else images
        if len(images) != len(rows):
            raise UserError(f"{len(images)} lists of images were given for {len(rows)} rows; one per row was expected")
        rows = [self._expand(row, len(own), name_of(i, len(rows))) for i, (row, own) in enumerate(zip(rows, images))]
        requests = self._requests(rows, images, max_new_tokens, temperature, top_p, top_k, num_beams, seed)
        return self._beams.generate(requests, num_beams) if num_beams > 1 else self.engine.generate(requests)

    def _expand(self, row: Sequence[int], num_images: int, name: str) -> list[int]:
        """Expands each image of a row to P positions.

        Raises UserError, which counts the tokens as the caller gave them.
        """
        P, ids = self.config.tokens_per_image, whole_numbers(row, name).tolist()
        expanded = expand_images(ids, P)
        if expanded.count(IMAGE_TOKEN) != P * num_images:
            raise UserError(f"{name} has {ids.count(IMAGE_TOKEN)} image tokens and {num_images} images; one token, or "
                            f"{P} in a run, per image were expected")
        return expanded

    def generate(self, conversations: Sequence[Sequence[dict]], max_new_tokens: int = 256, temperature: float = 0.0,
                 top_p: float = 1.0, top_k: int = 0, num_beams: int = 1, seed: int = 0,
                 stop: Sequence[str] = ()) -> list[Completion]:
        """Answers conversations, each a list of OpenAI chat messages.

        Args:
          conversations: lists of messages; every conversation ends with a question of the user.
          max_new_tokens: the most new tokens of a conversation.
          temperature: 0 is greedy; above 0, tokens are drawn after the filters temperature, top_k and top_p, in this
            order.
          top_p: the probability mass to keep, above 0 and at most 1; 1 keeps all tokens.
          top_k: the number of most likely tokens to keep; 0 keeps all.
          num_beams: above 1, beam search as in transformers with its default settings; beam search draws nothing.
          seed: a conversation draws the same tokens with the same seed, whatever other conversations are in the call;
            equal conversations of one call draw different tokens.
          stop: texts that end an answer and are not part of it; an empty one is ignored. Beam search cuts its answers
            at them when the search is over.

        Returns:
          One Completion a conversation, in order.

        Raises:
          UserError: (a ValueError) messages cannot be read, images do not fit, a prompt is too long, or a setting is
            out of range.
        """
        prompts, images = zip(*map(self._encode, conversations)) if conversations else ((), ())
        requests = self._requests(prompts, images, max_new_tokens, temperature, top_p, top_k, num_beams, seed)
        new_stream = self._text_streams(stop)
        streams = [new_stream() for _ in requests]
        found = enumerate(self._beams.generate(requests, num_beams)) if num_beams > 1 else self.engine.stream(requests)
        for i, ids in found:
            streams[i].push(ids)
            requests[i].cancelled = streams[i].is_stopped
        return [completion(s, self.engine.eos) for s in streams]

    def stream(self, messages: Sequence[dict], max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
               top_k: int = 0, seed: int = 0, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yields the answer to one conversation in pieces of whole characters.

        Arguments and errors are those of `generate`.
        """
        ids, images = self._encode(messages)
        requests = self._requests([ids], [images], max_new_tokens, temperature, top_p, top_k, 1, seed)
        stream = self._text_streams(stop)()
        for _, new in self.engine.stream(requests):
            if piece := stream.push(new):
                yield piece
            requests[0].cancelled = stream.is_stopped
        if rest := stream.finish():
            yield rest

    def answer_each(self, prompts: Iterable[tuple[Sequence[int], Sequence[np.ndarray], int]], max_new_tokens: int = 256,
                    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0,
                    stop: Sequence[str] = ()) -> Iterator[tuple[int, Completion | UserError]]:
        """Answers any number of prompts; yields (index of a prompt, its answer) in the order in which answers finish.

        If a prompt cannot be run, or the model fails on it, its error is yielded and the other prompts continue.
        Prompts that are unanswered when this iterator is closed are cancelled.

        Args:
          prompts: for each prompt its ids with each image as P times IMAGE_TOKEN, its images as in `logits`, and the
            number of equal prompts before it, which makes equal prompts draw different tokens. A prompt is taken when a
            row is about to be free for it; prompts about one image should follow each other.
          max_new_tokens: as in `generate`.
          temperature: as in `generate`.
          top_p: as in `generate`.
          top_k: as in `generate`.
          seed: as in `generate`.
          stop: as in `generate`.

        Returns:
          An iterator over pairs of an index and a Completion or a UserError.

        Raises:
          UserError: (a ValueError) a setting is out of range.
        """
        check_settings(max_new_tokens, temperature, top_p, top_k, 1, seed)
        return answer_each(self.engine, prompts, (max_new_tokens, temperature, top_k, top_p), seed,
                           self._text_streams(stop))

    def request(self, messages: Sequence[dict], max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
                top_k: int = 0, seed: int = 0, logprobs: bool = False,
                pixels: Sequence[np.ndarray] | None = None) -> Request:
        """Makes the engine's request of one conversation, for a server, which runs the engine itself.

        Arguments and errors are those of `generate`; `logprobs` asks for the log probabilities of the tokens. `pixels`
        are the messages' images as `processor.images_uint8` makes them, uint8 [H,W,3] each; then the images in the
        messages only hold their places.
        """
        ids, images = self._encode(messages, pixels)
        (request,) = self._requests([ids], [images], max_new_tokens, temperature, top_p, top_k, 1, seed)
        request.logprobs = logprobs
        self.engine.check(request, "the prompt")
        return request

    def text_stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Begins the text of an answer; `stop` is as in `generate`."""
        return self._text_streams(stop)()

    def _encode(self, messages, pixels=None):
        images = read_messages(messages).images
        ids = self.processor.expand(self.processor.encode(self.processor.prompt(messages)))
        markers = ids.count(IMAGE_TOKEN) // self.config.tokens_per_image
        if markers != len(images):  # the text itself contains a marker
            raise UserError(f"the messages have {len(images)} images for {markers} {IMAGE_MARKER} markers")
        return ids, list(self.processor.images_uint8(images) if pixels is None else pixels)

    def _requests(self, prompts, images, max_new_tokens, temperature, top_p, top_k, num_beams, seed):
        check_settings(max_new_tokens, temperature, top_p, top_k, num_beams, seed)
        seeds = row_seeds(seed, prompts, images) if temperature else [0] * len(prompts)
        return [Request(list(ids), list(pixels), max_new_tokens, temperature, top_k, top_p, s)
                for ids, pixels, s in zip(prompts, images, seeds)]

    def _text_streams(self, stop) -> Callable[[], TextStream]:
        """Returns a function that begins the text of an answer."""
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
            raise UserError(f"stop is {short(stop)}; a text or a list of texts was expected")
        p, stop = self.processor, [*stop, *self.processor.stop]
        single = [ids[0] for ids in (p.tokenizer.encode(text, bos=False) for text in stop) if len(ids) == 1]
        decode = p.text_tokenizer.decode
        return functools.partial(TextStream, decode, stop, stop_ids=[i for i in single if not decode([i])])
