"""Verifies a released checkpoint: fetches and hashes it, compares its tower with stock CLIP, and scores its answers.

Each step returns the lines of its section of `docs/verification.md`; a check that fails raises. Numbers of other
projects are printed below ours; MedEvalKit's is a check if the evaluation follows that protocol.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from llavamed_jax.assistant import LlavaMed, load
from llavamed_jax.checkpoints import hub, names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.soundness import is_finite
from llavamed_jax.config import PRESETS
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import published, run
from llavamed_jax.evaluation.answering.local import LocalModel, model_name
from llavamed_jax.evaluation.report.summary import summary
from llavamed_jax.models.llava import Llava
from llavamed_jax.processor import Processor
from llavamed_jax.utils.files import read_json
from llavamed_jax.utils.hashes import sha256_of
from llavamed_jax.verification.compare import Progress, Row, compare_arrays, table

STOCK_TOWER = "openai/clip-vit-large-patch14-336"
# Image in samples/vqa_rad, question, answer of the annotators.
QUESTIONS = (("synpic17738.jpg", "Where is the abnormal mass located with respect to the lungs?", "Right upper lobe"),
             ("synpic60254.jpg", "What type of imaging modality is used to acquire the above image?",
              "MRI - T2 weighted"),
             ("synpic57317.jpg", "What is the condition in which the ventricles are enlarged as seen in this image?",
              "Hydrocephalus"),
             ("synpic24967.jpg", "Are gallstones identifiable?", "Yes"))
# Published scores on VQA-RAD of LLaVA-Med v1.5 without fine-tuning: source, percent, how it was measured.
OTHERS = (("MedEvalKit (Lingshu's table)", published.MEDEVALKIT["vqa_rad"][0],
           "all questions; open answers judged by GPT-4.1"),
          ("HuatuoGPT-Vision's README", 51.4, "all questions; its own prompts and scorer"),
          ("Hulu-Med's README", 46.6, "all questions; its own prompts and scorer"))


@dataclass
class Release:
    """A checkpoint to verify, and the files that are needed for it.

    Attributes:
      model: `owner/name[@revision]`, or a directory; a directory is not fetched.
      images: the folder with the images of `QUESTIONS`.
      workdir: the folder for predictions, metrics and report of VQA-RAD.
      evaluation: the eval config (`configs/eval/vqa_rad.py`) with its data root.
      stock_tower: path of the stock CLIP tower (quirk Q1); None uses the one that the checkpoint's config names.
      dtype: dtype of the computation; None uses the default of `load`.
      progress: wraps a list of names to show progress.
    """

    model: str
    images: Path
    workdir: Path
    evaluation: ConfigDict
    stock_tower: str | None = None
    dtype: str | None = None
    progress: Progress = field(default=iter, repr=False)

    @functools.cached_property
    def directory(self) -> Path:
        """The folder of the checkpoint, which is fetched if necessary."""
        return hub.local(self.model)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, with the tower that it ships."""
        return open_checkpoint(self.directory)

    @functools.cached_property
    def stock_name(self) -> str:
        """Name or path of the stock tower."""
        return str(self.stock_tower or read_json(self.directory / "config.json").get("mm_vision_tower") or STOCK_TOWER)

    @functools.cached_property
    def stock(self) -> Checkpoint:
        """The checkpoint with the stock tower instead of the shipped one."""
        return open_checkpoint(self.directory, self.stock_name)

    @functools.cached_property
    def assistant(self) -> LlavaMed:
        """The loaded model."""
        return load(self.directory, dtype=self.dtype)


def fetch(release: Release) -> list[str]:
    """Fetches the checkpoint and compares every file with the hash that the hub states.

    Raises:
      UserError: a file has another size or hash.
    """
    if not hub.is_hub_name(release.model) or Path(release.model).exists():
        files = sorted(p for p in release.directory.rglob("*") if p.is_file())
        return [f"`{release.model}` is a directory: nothing was fetched, and there are no stated hashes to compare "
                "with.", "",
                *_file_table([(p.relative_to(release.directory), p.stat().st_size, sha256_of(p), "") for p in files])]
    stated = _stated(release.model)
    rows = []
    present = {name: release.directory / name for name in stated if (release.directory / name).is_file()}
    for name, _ in zip(present, release.progress(list(present))):
        path, (size, algorithm, digest) = present[name], stated[name]
        found = sha256_of(path) if algorithm == "sha256" else _git_blob(path)
        if path.stat().st_size != size or found != digest:
            raise UserError(f"{name} of {release.model} has {path.stat().st_size} bytes and the {algorithm} {found}; "
                            f"the hub states {size} bytes and {digest}")
        rows.append((name, size, digest, f"{algorithm} as stated"))
    return [f"`{release.model}`, commit `{release.directory.name}`: {len(rows)} of the repository's {len(stated)} "
            f"files, {sum(row[1] for row in rows):,} bytes, each with the hash that the hub states.", "",
            *_file_table(rows)]


def _stated(model: str) -> dict[str, tuple[int, str, str]]:
    """Asks the hub for sizes and hashes of all files, without fetching them.

    Returns:
      Name -> (bytes, `sha256` for a large file or `git blob` for a small one, digest).
    """
    import huggingface_hub
    name, _, revision = model.partition("@")
    with hub.asking(model):
        info = huggingface_hub.HfApi().model_info(name, revision=revision or None, files_metadata=True)
    return {s.rfilename: (s.size, "sha256", s.lfs.sha256) if s.lfs else (s.size, "git blob", s.blob_id)
            for s in info.siblings}


def _file_table(rows: Sequence[tuple]) -> list[str]:
    head = ["| file | bytes | hash | |", "|---|---:|---|---|"]
    return head + [f"| {name} | {size:,} | `{digest}` | {note} |" for name, size, digest, note in rows]


def _git_blob(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def tensors(release: Release) -> list[str]:
    """Counts tensors and parameters, checks that all values are finite, and compares the tower with the stock tower.

    Raises:
      UserError: a value is not finite.
    """
    checkpoint = release.checkpoint
    counted: dict[str, list[int]] = {}
    on_their_way = iter(release.progress(list(checkpoint.tensors)))
    for (name, tensor), _ in zip(checkpoint.tensors.items(), on_their_way):
        part = "projector" if name.startswith("projector") else name.split("/")[0]
        if not is_finite(checkpoint.read(name)):
            raise UserError(f"{name} of {release.model} holds values that are not finite")
        count = counted.setdefault(part, [0, 0])
        count[0] += 1
        count[1] += int(np.prod(tensor.shape))
    for _ in on_their_way:
        pass
    wanted = len(names.specs(checkpoint.config))
    total = [sum(column) for column in zip(*counted.values())]
    assert total[0] == wanted, "open_checkpoint raises if a tensor is missing"
    dtypes = ", ".join(sorted({t.dtype.name for t in checkpoint.tensors.values()}))
    lines = [f"All tensors that the config requires exist, and no others; all values are finite; {dtypes}. "
             f"Vision tower: {checkpoint.tower}.", "", "| part | tensors | parameters |", "|---|---:|---:|",
             *(f"| {part} | {n} | {size:,} |" for part, (n, size) in counted.items()),
             f"| all | {total[0]} | {total[1]:,} |", "", _settings(checkpoint), "",
             "**The shipped tower beside the stock one** (quirk Q1: the original's loader drops the shipped one).", ""]
    try:
        return lines + _tower_tensors(release)
    except UserError as error:
        return lines + [f"Not compared: {error}."]


def _settings(checkpoint: Checkpoint) -> str:
    """Returns a sentence about the settings that differ from those of v1.5 in the specification."""
    expected, cfg = PRESETS["v15-7b"], checkpoint.config
    pairs = [(f"{part}.{key}", getattr(getattr(cfg, part), key), value)
             for part in ("vision", "decoder") for key, value in vars(getattr(expected, part)).items()]
    pairs += [(key, getattr(cfg, key), getattr(expected, key))
              for key in ("projector_type", "feature_layer", "feature_select", "image_aspect_ratio", "max_length",
                          "use_start_end")]
    differing = [f"{key} is {found} (expected {value})" for key, found, value in pairs if found != value]
    return "Settings: " + (f"different from LLaVA-Med v1.5: {', '.join(differing)}." if differing
                           else "all equal to those of LLaVA-Med v1.5.")


def _tower_tensors(release: Release) -> list[str]:
    shipped, stock = release.checkpoint, release.stock
    if shipped.config.vision != stock.config.vision:
        raise UserError(f"the stock tower has another shape: {stock.config.vision}")
    unused, groups = set(shipped.unused), {}
    for name in (n for n in shipped.tensors if n.startswith("vision_tower/")):
        layer = re.match(r"vision_tower/layers_(\d+)/", name)
        group = ("beyond the feature layer" if name in unused
                 else f"layer {int(layer[1]) + 1}" if layer else "embeddings")
        same, difference = compare_arrays(shipped.read(name), stock.read(name))
        entry = groups.setdefault(group, [0, 0, 0.0])
        groups[group] = [entry[0] + 1, entry[1] + same, max(entry[2], difference)]
    tensors_, identical = (sum(entry[i] for entry in groups.values()) for i in (0, 1))
    rows = [Row(group, f"{same} of {n} bit for bit", same == n, worst) for group, (n, same, worst) in groups.items()]
    return [f"{identical} of {tensors_} tensors are bit-identical to {release.stock_name}'s. Differences are relative "
            "to the largest magnitude of the tensor.", "", "```", table(rows), "```"]


def tower(release: Release) -> list[str]:
    """Compares the projected features of one image from the shipped and the stock tower."""
    image = release.images / QUESTIONS[0][0]
    features = []
    for checkpoint in (release.checkpoint, release.stock):
        pixels = Processor.from_checkpoint(checkpoint).images([image])
        wanted = [n for n in names.expected_shapes(checkpoint.config) if n.startswith(("vision_tower/", "projector/"))]
        params = unflatten_dict({name: checkpoint.read(name).astype(np.float32) for name in wanted}, sep="/")
        encode = jax.jit(functools.partial(Llava(checkpoint.config).apply, method="encode_images"))
        features.append(np.asarray(encode({"params": params}, pixels[None]))[0, 0])
    _, difference = compare_arrays(*features)
    a, b = (f / np.linalg.norm(f, axis=-1, keepdims=True) for f in features)
    cosine = (a * b).sum(-1)
    return [f"Projected features of {image.name} through the shipped and the stock tower, float32: largest difference "
            f"{difference:.3g} of the largest magnitude; cosine per position between {cosine.min():.6f} and "
            f"{cosine.max():.6f}, mean {cosine.mean():.6f}. `load(PATH)` uses the shipped tower, `vision_tower=PATH` "
            "another."]


def answers(release: Release) -> list[str]:
    """Answers the four fixed questions greedily."""
    asked = [[{"role": "user", "content": [{"type": "image", "image": str(release.images / image)},
                                           {"type": "text", "text": question}]}]
             for image, question, _ in QUESTIONS]
    new = release.evaluation.generation.max_new_tokens
    completions = release.assistant.generate(asked, max_new_tokens=new)
    lines = [f"Greedy, at most {new} tokens, {release.assistant.dtype.name}. Annotators' answers in brackets.", ""]
    for (image, question, gold), completion in zip(QUESTIONS, completions):
        lines += [f"- {image}: {question} ({gold})", f"  > {completion.text or '(nothing)'}".replace("\n", "\n  > ")]
    return lines


def vqa_rad(release: Release) -> list[str]:
    """Evaluates the model zero-shot on the 451 test questions of VQA-RAD, with the code of `eval.py`."""
    evaluation = run.open_evaluation(release.evaluation, release.workdir)
    what = evaluation.scorer.describe()
    print(what, flush=True)
    metrics = run.evaluate(evaluation, LocalModel(release.assistant, model_name(release.model)),
                           {"checkpoint": release.model})
    others = [f"| {source} | {value} | {how} |" for source, value, how in OTHERS]
    return [f"{what}.", "", "```", summary(metrics), "```", "",
            _by_medevalkit(metrics.get("medevalkit")), "",
            "What others reported for this checkpoint; their prompts and scorers differ:", "",
            "| source | VQA-RAD | of |", "|---|---:|---|", *others, "",
            f"Predictions, metrics and report: `{release.workdir}`."]


def _by_medevalkit(table: Mapping | None) -> str:
    """Returns a sentence that compares with MedEvalKit's table, or says how to compare."""
    if table is None:
        return ("MedEvalKit's row is a check with --config.scoring=medevalkit, --config.judge.model=NAME and "
                "--config.generation.max_new_tokens=8192.")
    beside = table["published"]
    if "reason" in beside:
        return beside["reason"]
    verb = "agrees with" if beside["low"] <= table["accuracy"] <= beside["high"] else "DIFFERS from"
    return (f"By MedEvalKit's protocol {table['accuracy']:.1f} of 100 are right, which {verb} the published "
            f"{beside['accuracy']} ({beside['low']:.1f} to {beside['high']:.1f}).")


STEPS: dict[str, tuple[str, Callable[[Release], list[str]]]] = {
    "fetch": ("Fetched and hashed", fetch), "tensors": ("Tensors", tensors), "tower": ("The tower's features", tower),
    "answers": ("Four answers", answers), "vqa_rad": ("VQA-RAD, zero-shot", vqa_rad)}


def check_disk(release: Release) -> None:
    """Raises UserError if the disk has too little room for the files that are still to be fetched."""
    if not hub.is_hub_name(release.model) or Path(release.model).exists():
        return
    from huggingface_hub import constants
    stated = _stated(release.model)
    suffix = ".safetensors" if any(name.endswith(".safetensors") for name in stated) else ".bin"
    cache = Path(constants.HF_HUB_CACHE)
    present = cache / f"models--{release.model.partition('@')[0].replace('/', '--')}" / "blobs"
    missing = sum(size for name, (size, _, digest) in stated.items() if name.endswith(suffix)
                  and not (present / digest).exists())
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if missing > free:
        raise UserError(f"{cache} has {free / 1e9:.1f} GB free; {release.model} needs {missing / 1e9:.1f} GB")


def document(release: Release, done: dict[str, list[str]], facts: dict[str, object]) -> str:
    """Returns the text of `docs/verification.md` for the steps that were done.

    Args:
      release: the checkpoint.
      done: name of a step -> the lines of its section.
      facts: facts about the run, such as versions.
    """
    left = [step for step in STEPS if step not in done]
    lines = [f"# Verification of {release.model}", "",
             "Written by `make verify-release`. For research use only, never for clinical decisions.", "",
             f"Steps: {', '.join(done)}" + (f"; not done: {', '.join(left)}" if left else ""), "",
             *(f"- {key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in facts.items())]
    for step, section in done.items():
        lines += ["", f"## {STEPS[step][0]}", "", *section]
    return "\n".join(lines) + "\n"
