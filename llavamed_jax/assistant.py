"""A model that can be asked: weights, processor and generation engine behind a few calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from llavamed_jax.checkpoints import reader
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.config import IMAGE_TOKEN, PAD_TOKEN, LlavaConfig
from llavamed_jax.data.chat import read_messages
from llavamed_jax.data.processor import Processor, expand_images
from llavamed_jax.errors import UserError
from llavamed_jax.generation.engine import Engine, Request, check_image
from llavamed_jax.generation.text import TextStream
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import batch_sharding, make_mesh


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: without special tokens, stripped, up to a stop string.
      token_ids: all that was generated, the end-of-sequence id included.
      finish_reason: `stop` (end of sequence or a stop string) or `length`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str


def load(path: str | Path, dtype=None, quantize=None, mesh: Mesh | str | None = None, adapter=None,
         vision_tower: str | Path | None = None, tokenizer: str | Path | None = None, template: str | None = None) -> "LlavaMed":
    """Loads a checkpoint of any kind that `checkpoints.reader.open_checkpoint` reads.

    Args:
      path: a directory in a PyTorch layout, this project's own tree (a run's workdir), `owner/name[@revision]` of a hub, or
        `preset:NAME` (random weights).
      dtype: of weights and computation; None is bfloat16 on GPU and TPU, float32 on a CPU. `"float32"` also sets JAX's
        matmul precision to `highest`, which GPUs and TPUs otherwise lower.
      mesh: a Mesh with the axes data, fsdp and tp, or text such as `"data=1,tp=2"`; None: one device.
      vision_tower: a CLIP directory that is taken instead of the checkpoint's own tower (quirk Q1 of the original).
      tokenizer, template: instead of the checkpoint's own.
    Raises:
      UserError: one sentence that says what is wrong with the checkpoint or an argument.
    """
    if quantize is not None or adapter is not None:
        raise UserError("quantize and adapter are not supported yet; None was expected")
    checkpoint = reader.open_checkpoint(path, vision_tower)
    processor = Processor.from_checkpoint(checkpoint, tokenizer=tokenizer, template=template)
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if dtype is not None and _numpy_dtype(dtype) == np.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    dtype = _numpy_dtype(dtype)
    return LlavaMed(checkpoint.config, load_params(checkpoint, dtype), processor, dtype, mesh, Path(path).name, checkpoint.tower)


def _numpy_dtype(dtype):
    if dtype is None:
        return np.dtype(np.float32 if jax.default_backend() == "cpu" else ml_dtypes.bfloat16)
    known = {np.dtype(t).name: np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
    try:
        return known[np.dtype(dtype).name]
    except (KeyError, TypeError):
        raise UserError(f"the dtype is {dtype!r}; float32, bfloat16 or float16 was expected") from None


class LlavaMed:
    """A model with its processor. Made by `load`; the constructor takes what is already in memory.

    Args:
      config: the shapes.
      params: the unrolled parameter tree, in the dtype that it is computed in.
      processor: text and images; may lack a tokenizer.
      dtype: of the computation.
      mesh: None is one device.
      name: what predictions call this model.
      tower: which vision tower this is, in words.
    """

    def __init__(self, config: LlavaConfig, params, processor: Processor, dtype=jnp.float32, mesh: Mesh | None = None,
                 name: str = "llavamed", tower: str = ""):
        self.config, self.processor, self.dtype, self.mesh, self.name, self.tower = config, processor, dtype, mesh, name, tower
        self.engine = Engine(config, jax.device_put(params) if mesh is None else params, dtype, mesh)
        self._forward = jax.jit(Llava(config, dtype).apply)

    def logits(self, input_ids, pixel_values=None) -> np.ndarray:
        """Logits of whole rows.

        Args:
          input_ids: int32 [B,T]. The P positions of an image each hold IMAGE_TOKEN; -1 pads a short row on the right.
          pixel_values: [I,H,W,3] in order of appearance over the rows, float32 as `processor.images` gives them or uint8 as
            `processor.images_uint8` does, or None.
        Returns:
          float32 [B,T,V]; unspecified where a row is padded.
        Raises:
          UserError: (a ValueError) images and image positions that do not fit, with both numbers, or ids outside the vocabulary.
        """
        ids = np.asarray(input_ids, np.int32)
        if ids.ndim != 2:
            raise UserError(f"input_ids has the shape {ids.shape}; [B,T] was expected")
        wrong = ids[(ids >= self.config.decoder.vocab_size) | ((ids < 0) & (ids != IMAGE_TOKEN) & (ids != PAD_TOKEN))]
        if wrong.size:
            raise UserError(f"input_ids holds {wrong[0]}; ids below {self.config.decoder.vocab_size}, {IMAGE_TOKEN} or "
                            f"{PAD_TOKEN} were expected")
        slots = self._slots(ids, pixel_values)
        segments = (ids != PAD_TOKEN).astype(np.int32)
        if self.mesh is None:
            return np.asarray(self._forward({"params": self.engine.params}, ids, slots, segment_ids=segments))
        batch, rows = (ids, slots, segments), len(ids)
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch = jax.tree.map(lambda x: np.concatenate([x, np.zeros((-rows % shards, *x.shape[1:]), x.dtype)]), batch)
        with jax.set_mesh(self.mesh):
            ids, slots, segments = jax.device_put(batch, batch_sharding(self.mesh))
            return np.asarray(self._forward({"params": self.engine.params}, ids, slots, segment_ids=segments))[:rows]

    def _slots(self, ids, pixel_values):
        """Images [I,H,W,3] to the rows that hold their positions: [B,slots,H,W,3], or None without images."""
        P = self.config.tokens_per_image
        positions = (ids == IMAGE_TOKEN).sum(axis=1)
        images = np.zeros((0,)) if pixel_values is None else np.asarray(pixel_values)
        images = images if images.dtype == np.uint8 else images.astype(np.float32)
        if (positions % P).any() or positions.sum() != P * len(images):
            raise UserError(f"the rows have {positions.tolist()} image positions for {len(images)} images; {P} positions an "
                            "image were expected")
        for image in images:
            check_image(self.config, image, "pixel_values")
        if not len(images):
            return None
        counts = positions // P
        slots = np.zeros((len(ids), counts.max(), *images.shape[1:]), images.dtype)
        taken = iter(images)
        for row, count in enumerate(counts):
            for slot in range(count):
                slots[row, slot] = next(taken)
        return slots

    def generate_tokens(self, rows: Sequence[Sequence[int]], images: Sequence[Sequence[np.ndarray]] | None = None,
                        max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
                        num_beams: int = 1, seed: int = 0) -> list[list[int]]:
        """New token ids of each row, the end-of-sequence id included.

        Args:
          rows: token ids; an image is one IMAGE_TOKEN or a run of P.
          images: the images of each row, float32 or uint8 [H,W,3] as of `logits`.
        Raises:
          UserError: (a ValueError) images that do not fit their markers, or a row that is too long.
        """
        images = [[] for _ in rows] if images is None else images
        if len(images) != len(rows):
            raise UserError(f"{len(images)} lists of images were given for {len(rows)} rows; one a row was expected")
        requests = self._requests([expand_images(row, self.config.tokens_per_image) for row in rows], images,
                                  max_new_tokens, temperature, top_p, top_k, num_beams, seed)
        return self.engine.generate(requests)

    def generate(self, conversations: Sequence[Sequence[dict]], max_new_tokens: int = 256, temperature: float = 0.0,
                 top_p: float = 1.0, top_k: int = 0, num_beams: int = 1, seed: int = 0, stop: Sequence[str] = ()) -> list[Completion]:
        """Answers conversations, each a list of OpenAI chat messages.

        Args:
          max_new_tokens: at most so many a conversation.
          temperature: 0 is greedy. With top_p, top_k (0: all) and a seed, an answer can be drawn again.
          stop: texts that end an answer; an empty one is ignored.
        Returns:
          One Completion a conversation, in order.
        Raises:
          UserError: (a ValueError) messages that cannot be read, images that do not fit, or a prompt that is too long.
        """
        prompts, images = zip(*map(self._encode, conversations)) if conversations else ((), ())
        requests = self._requests(prompts, images, max_new_tokens, temperature, top_p, top_k, num_beams, seed)
        streams = [self._text_stream(stop) for _ in requests]
        for i, ids in self.engine.stream(requests):
            streams[i].push(ids)
            requests[i].cancelled = streams[i].is_stopped
        return [completion(s, self.config.decoder.eos_token_id) for s in streams]

    def stream(self, messages: Sequence[dict], max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
               top_k: int = 0, seed: int = 0, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yields the answer to one conversation in pieces, whole characters only. Arguments and errors as of `generate`."""
        ids, images = self._encode(messages)
        requests = self._requests([ids], [images], max_new_tokens, temperature, top_p, top_k, 1, seed)
        stream = self._text_stream(stop)
        for _, new in self.engine.stream(requests):
            if piece := stream.push(new):
                yield piece
            requests[0].cancelled = stream.is_stopped
        if rest := stream.finish():
            yield rest

    def _encode(self, messages):
        images = read_messages(messages).images
        ids = self.processor.expand(self.processor.encode(self.processor.prompt(messages)))
        return ids, list(self.processor.images_uint8(images))

    def _requests(self, prompts, images, max_new_tokens, temperature, top_p, top_k, num_beams, seed):
        if num_beams != 1:
            raise UserError(f"num_beams is {num_beams}; beam search is not supported yet and 1 was expected")
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise UserError(f"temperature {temperature}, top_p {top_p}, top_k {top_k}: temperature >= 0, 0 < top_p <= 1 and "
                            "top_k >= 0 were expected")
        if seed < 0:
            raise UserError(f"the seed is {seed}; 0 or more was expected")
        # Rows of one call draw differently, and the same row of the same call draws the same again.
        seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(len(prompts))]
        return [Request(list(ids), list(pixels), max_new_tokens, temperature, top_k, top_p, s)
                for ids, pixels, s in zip(prompts, images, seeds)]

    def _text_stream(self, stop):
        return TextStream(self.processor.decode, (*([stop] if isinstance(stop, str) else stop), *self.processor.stop))


def completion(stream: TextStream, eos: int) -> Completion:
    """What a finished text stream amounts to; `eos` is the id that ends a sequence."""
    ended = stream.is_stopped or eos in stream.token_ids[-1:]
    return Completion(stream.text, stream.token_ids, "stop" if ended else "length")
