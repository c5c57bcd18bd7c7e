"""Compares two checkpoints: settings, tensors, tokenizer, template, logits and greedy tokens.

Tensors are read one by one from both checkpoints; for logits, one model is in memory at a time. Axis letters: T
positions, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from llavamed_jax.assistant import LlavaMed
from llavamed_jax.checkpoints.assemble.image_tokens import TABLES
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.soundness import is_finite, what_is_not_finite
from llavamed_jax.config import IMAGE_TOKEN, PAD_TOKEN, LlavaConfig, projector_depth
from llavamed_jax.errors import some
from llavamed_jax.processor import Processor
from llavamed_jax.text.image_positions import expand_images
from llavamed_jax.text.tokenizer import TOKENIZERS

NEW_TOKENS = 16
# Settings of how images and prompts are prepared; logits are computed from prepared ones.
_OF_PROMPTS = ("image_aspect_ratio", "use_start_end")
TEXTS = ("What is shown in this image?", "Is there a pleural effusion?\nAnswer: no, 3.5 cm.",
         "naïve – “quoted”, 心臓, x²\n\n  two blanks")

Progress = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      what: the compared quantity.
      found: the result in words.
      is_equal: whether the quantity is equal.
      difference: largest absolute difference, divided by the largest magnitude of the quantity; None for quantities
        that can only be equal or not.
      divergence: for logits, the largest KL divergence of a position, in nats.
      counts: whether models that differ in it are not the same.
    """

    what: str
    found: str
    is_equal: bool
    difference: float | None = None
    divergence: float | None = None
    counts: bool = True


def compare(a: Checkpoint, b: Checkpoint, tolerance: float = 1e-4, tensors_only: bool = False, dtype=np.float32,
            progress: Progress = iter) -> list[Row]:
    """Compares two checkpoints.

    Args:
      a: the first checkpoint.
      b: the second checkpoint.
      tolerance: largest difference of the values of a tensor or of the logits, relative to their largest magnitude.
      tensors_only: leaves out logits and greedy tokens, so that no model is run.
      dtype: dtype in which logits are computed.
      progress: wraps the names of the tensors to show progress.

    Returns:
      The rows of the table. Logits and greedy tokens are left out if settings that they depend on or shapes differ,
      or weights are not finite.
    """
    differing = _differing(a.config, b.config)
    tensors = _tensors(a, b, tolerance, progress)
    rows = [_settings(a.config, differing), *tensors, *_texts(a, b)]
    if (tensors_only or not differing.keys() <= set(_OF_PROMPTS)
            or any(row.difference in (None, np.inf) and not row.is_equal for row in tensors)):
        return rows
    return rows + _outputs(a, b, tolerance, dtype)


def _differing(a: LlavaConfig, b: LlavaConfig) -> dict[str, str]:
    """Returns the settings that differ, name -> both values in words."""
    ours, theirs = _compared(a), _compared(b)
    if _has_added_rows(a, b) or _has_added_rows(b, a):
        ours.pop("decoder.vocab_size"), theirs.pop("decoder.vocab_size")
    return {key: f"{key} is {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]}


def _settings(config: LlavaConfig, differing: dict[str, str]) -> Row:
    return Row("settings", "; ".join(differing.values()) or f"{len(_compared(config))} equal", not differing)


def _compared(cfg: LlavaConfig) -> dict:
    """Returns the settings that answers depend on."""
    names = ("projector_type", "projector_bias", "feature_layer", "feature_select", *_OF_PROMPTS)
    out = ({f"vision.{key}": value for key, value in asdict(cfg.vision).items()}
           | {name: getattr(cfg, name) for name in names})
    out |= {f"decoder.{key}": value for key, value in asdict(cfg.decoder).items()}
    out["feature_layer"] = cfg.num_vision_layers_used  # -2 and 23 of 24 are the same layer
    # A single layer has no activation.
    out["projector_act"] = cfg.projector_act if projector_depth(cfg.projector_type) > 1 else None
    # Names and limits do not change the arithmetic.
    for key in ("architecture", "max_position_embeddings", "bos_token_id", "pad_token_id"):
        out.pop(f"decoder.{key}")
    return out


def _has_added_rows(longer: LlavaConfig, shorter: LlavaConfig) -> bool:
    """Returns whether `longer` is transformers' conversion of `shorter`.

    The conversion (`convert_llava_weights_to_hf.py`) adds `<image>` and padding rows at the end of the vocabulary.
    """
    rows = shorter.decoder.vocab_size
    return shorter.image_token_id is None and (longer.image_token_id or -1) >= rows and longer.decoder.vocab_size > rows


def _tensors(a: Checkpoint, b: Checkpoint, tolerance: float, progress: Progress) -> list[Row]:
    """Compares the tensors; returns a row for each part of the model, with names and shapes that do not match."""
    parts: dict[str, list[str]] = {}
    unused = set(a.unused) | set(b.unused)
    for name in [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]:
        parts.setdefault("beyond the feature layer" if name in unused else name.split("/")[0], []).append(name)
    rows = []
    on_their_way = iter(progress([name for members in parts.values() for name in members]))
    for part, members in parts.items():
        worst, where, identical, problems = 0.0, "", 0, []
        for name, _ in zip(members, on_their_way):
            if name not in a.tensors or name not in b.tensors:
                problems.append(f"{name} is only in {'the second' if name in b.tensors else 'the first'}")
                continue
            shapes = _common_shapes(name, a, b)
            if shapes is None:
                problems.append(f"{name} is {list(a.tensors[name].shape)} and {list(b.tensors[name].shape)}")
                continue
            ours, theirs = a.read(name)[shapes], b.read(name)[shapes]
            same, difference = compare_arrays(ours, theirs)
            identical += same
            if difference > worst:
                worst, where = difference, name + _not_finite(ours, theirs)
        found = f"{identical} of {len(members)} bit for bit" + (f", most in {where}" if where else "")
        if problems:
            rows.append(Row(f"tensors: {part}", some(problems, 4, "; "), False))
        else:
            rows.append(Row(f"tensors: {part}", found, worst <= tolerance, worst))
    for _ in on_their_way:  # lets the progress bar finish
        pass
    return rows


def _not_finite(*arrays: np.ndarray) -> str:
    """Describes the values of the two arrays that are not finite, for the table."""
    found = [f"{what_is_not_finite(array)} in the {word}" for array, word in zip(arrays, ("first", "second"))
             if not is_finite(array)]
    return f" ({', '.join(found)})" if found else ""


def _common_shapes(name: str, a: Checkpoint, b: Checkpoint) -> tuple[slice, ...] | None:
    """Returns the slices of a tensor that both checkpoints have; None if the shapes do not match.

    This is the complete tensor, or the tokens of the shorter vocabulary.
    """
    ours, theirs = a.tensors[name].shape, b.tensors[name].shape
    if ours == theirs:
        return tuple(slice(None) for _ in ours)
    axis = TABLES.get(name)
    if axis is None or not (_has_added_rows(a.config, b.config) or _has_added_rows(b.config, a.config)):
        return None
    least = tuple(map(min, ours, theirs))
    others = [i for i in range(len(ours)) if i != axis]
    return tuple(map(slice, least)) if all(ours[i] == theirs[i] for i in others) else None


def compare_arrays(a: np.ndarray, b: np.ndarray) -> tuple[bool, float]:
    """Compares two arrays of the same shape.

    Returns:
      Whether dtypes and bits are identical, and the largest absolute difference divided by the largest magnitude. The
      difference is infinite if any value is NaN or infinite, even if the bits are identical.
    """
    is_identical = a.dtype == b.dtype and np.array_equal(
        np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))
    if not (is_finite(a) and is_finite(b)):
        return is_identical, np.inf
    if is_identical or not a.size:
        return is_identical, 0.0
    wide = np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32
    a, b = a.astype(wide), b.astype(wide)
    scale = np.maximum(np.abs(a).max(), np.abs(b).max())
    with np.errstate(over="ignore"):
        return False, float(np.abs(a - b).max() / scale) if scale else 0.0


def _texts(a: Checkpoint, b: Checkpoint) -> list[Row]:
    """Compares tokenizers, and templates if they differ."""
    sources = [next((c.files[name] for name in TOKENIZERS if name in c.files), None) for c in (a, b)]
    processors = [Processor.from_checkpoint(checkpoint, tokenizer=source)
                  for checkpoint, source in zip((a, b), sources)]
    return [_tokenizers(a, b, sources, processors), *_templates(*processors)]


def _templates(a: Processor, b: Processor) -> list[Row]:
    """Returns a row that does not count if the templates differ; no row for equal ones."""
    ours, theirs = ((p.template_name, p.chat_template and p.chat_template.source) for p in (a, b))
    if ours == theirs:
        return []
    return [Row("template", f"{a.template_words} and {b.template_words}; not counted", False, counts=False)]


def _tokenizers(a: Checkpoint, b: Checkpoint, sources: Sequence, processors: Sequence[Processor]) -> Row:
    """Compares the ids of a few texts. If a checkpoint has no tokenizer, the row says so and counts as equal."""
    absent = [word for word, source in zip(("first", "second"), sources) if source is None]
    if absent:
        found = "neither has a tokenizer" if len(absent) == 2 else f"the {absent[0]} has no tokenizer"
        return Row("tokenizer", found, True)
    texts, name = list(TEXTS), a.config.template
    if name is not None and name == b.config.template:  # other pairs may have two names for one template
        texts += [processors[0].prompt([{"role": "user", "content": text}]) for text in TEXTS[:2]]
    for text in texts:
        ours, theirs = (processor.encode(text) for processor in processors)
        if ours != theirs:
            return Row("tokenizer", f"{text!r} is encoded as {ours[:6]}… and {theirs[:6]}…", False)
    return Row("tokenizer", f"the same ids for {len(texts)} texts", True)


def prompts(cfg: LlavaConfig, vocab_size: int) -> dict[str, tuple[list[int], list[np.ndarray]]]:
    """Returns the prompts for both models, with random ids so that no tokenizer is needed.

    Args:
      cfg: the config of the first model.
      vocab_size: size of the vocabulary that both models have.

    Returns:
      Name of a prompt -> its ids and its images, float32 [H,W,C].
    """
    rng = np.random.default_rng(0)

    def words(n):
        return rng.integers(3, vocab_size, n).tolist()

    bos, size = cfg.decoder.bos_token_id, cfg.vision.image_size
    images = [rng.standard_normal((size, size, cfg.vision.num_channels), np.float32) for _ in range(2)]
    return {"text": ([bos, *words(31)], []),
            "an image": ([bos, *words(4), IMAGE_TOKEN, *words(12)], images[:1]),
            "two images": ([bos, IMAGE_TOKEN, *words(6), IMAGE_TOKEN, *words(8)], images)}


def _outputs(a: Checkpoint, b: Checkpoint, tolerance: float, dtype) -> list[Row]:
    """Compares logits and greedy tokens of both models on each prompt."""
    vocab_size = min(c.config.decoder.vocab_size for c in (a, b))
    asked = prompts(a.config, vocab_size)
    (logits, tokens), (other_logits, other_tokens) = (_run(checkpoint, asked, dtype) for checkpoint in (a, b))
    rows = []
    for name in asked:
        ours, theirs = logits[name][:, :vocab_size], other_logits[name][:, :vocab_size]
        broken = [word for word, values in (("first", ours), ("second", theirs)) if not np.isfinite(values).all()]
        if broken:  # NaN is not equal to anything, even if the bits are identical
            rows.append(Row(f"logits: {name}", f"not finite in the {' and the '.join(broken)}", False))
            continue
        _, difference = compare_arrays(ours, theirs)
        found = f"{len(ours)} positions"
        rows.append(Row(f"logits: {name}", found, difference <= tolerance, difference, kl_divergence(ours, theirs)))
    for name in asked:
        ours, theirs = tokens[name], other_tokens[name]
        same = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
        found = f"{len(ours)} equal" if ours == theirs else f"different after {same} of {len(ours)}"
        rows.append(Row(f"greedy tokens: {name}", found, ours == theirs))
    return rows


def _run(checkpoint: Checkpoint, asked: dict, dtype) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Returns logits [T,V] and greedy tokens of each prompt, and frees the model."""
    model = LlavaMed(checkpoint.config, load_params(checkpoint, dtype), Processor.from_checkpoint(checkpoint), dtype)
    ids, images = zip(*asked.values())
    rows = [expand_images(row, checkpoint.config.tokens_per_image) for row in ids]
    longest = max(map(len, rows))
    padded = model.logits([row + [PAD_TOKEN] * (longest - len(row)) for row in rows],
                          [image for each in images for image in each])
    logits = {name: values[: len(row)] for name, row, values in zip(asked, rows, padded)}
    tokens = dict(zip(asked, model.generate_tokens(ids, images, max_new_tokens=NEW_TOKENS)))
    del model
    gc.collect()  # engine and compiled programs form a reference cycle; without this, both models would be in memory
    return logits, tokens


def kl_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest KL(a || b) over the positions of logits [T,V], in nats; NaN if a logit is NaN."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), axis=-1, keepdims=True) for x in (a, b))
    return float(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1).max()))  # rounding may give -1e-17 for 0


def table(rows: Sequence[Row]) -> str:
    """Formats the comparison as a plain text table."""
    number = lambda value: "" if value is None else f"{value:.2g}"
    lines = [("", "difference", "KL", "", "found")]
    lines += [(row.what, number(row.difference), number(row.divergence),
               "equal" if row.is_equal else "DIFFERS" if row.counts else "differs", row.found) for row in rows]
    columns = [column for column in zip(*lines) if any(column[1:])]  # without logits, some columns are empty
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(line).rstrip() for line in zip(*padded))
