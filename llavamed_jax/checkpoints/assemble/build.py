"""Builds a model for stage 1: joins a plain decoder and a vision tower by a projector, fresh or from a file."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import hub, names
from llavamed_jax.checkpoints.assemble.image_tokens import TABLES, add_image_tokens
from llavamed_jax.checkpoints.assemble.own_template import own_template
from llavamed_jax.checkpoints.assemble.positions import with_image_size
from llavamed_jax.checkpoints.assemble.vision import PREPROCESSOR, tower_of
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.generation_file import with_stop_ids
from llavamed_jax.checkpoints.gguf.directory import read_decoder
from llavamed_jax.checkpoints.gguf.file import is_gguf
from llavamed_jax.checkpoints.model_config import text_files
from llavamed_jax.checkpoints.soundness import Tally
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import read_file, read_weights, refuse_adapter
from llavamed_jax.checkpoints.torch.layout import canonical, from_torch
from llavamed_jax.config import LlavaConfig, projector_depth
from llavamed_jax.config.decoders import DECODERS
from llavamed_jax.config.hf import joined, plain_decoder
from llavamed_jax.errors import UsageError, UserError, at, cut, exists, short, some
from llavamed_jax.text.templates import VICUNA, get_template, language_template, template_of
from llavamed_jax.text.tokenizer import Tokenizer, find_tokenizer
from llavamed_jax.utils.files import read_json

# A tokenizer with more tokens than this beyond the table's rows is another model's; a few may have been added to it.
_MOST_ADDED = 64
# Keys of an original's config.json beside an mm_projector.bin, and the config fields that they set.
_SETTINGS = {"mm_vision_select_layer": "feature_layer", "mm_vision_select_feature": "feature_select",
             "mm_use_im_start_end": "use_start_end"}


def build(decoder: str | Path, vision: str | Path, projector: str, scratch: Path, image_tokens: bool = False,
          seed: int = 0, has_pad: bool = False, image_size: int | None = None) -> tuple[Checkpoint, list[str]]:
    """Joins a decoder, a vision tower and a projector.

    Args:
      decoder: a directory with a language model as transformers writes it (`config.decoders.DECODERS`), its name on a
        hub, or a GGUF file.
      vision: the vision tower, as for `vision.tower_of`.
      projector: a type (`linear`, `mlp2x_gelu`, …), initialised as torch's `nn.Linear` is, or an `mm_projector.bin`.
      scratch: a directory for changed tokenizer files and a GGUF file's; it must outlive the checkpoint.
      image_tokens: adds LLaVA-Med v1.0's tokens (`image_tokens.add_image_tokens`).
      seed: seed of all random weights.
      has_pad: adds `[PAD]` before the image tokens.
      image_size: edge of the tower's input in pixels, to which its position table is interpolated; None for the
        tower's own.

    Returns:
      The checkpoint, and sentences that say what was done.

    Raises:
      UserError: one of the parts is missing or does not fit.
    """
    file, tower = Path(projector), tower_of(vision, seed)
    directory, weights, said = _opened(decoder, scratch)
    raw = _decoder_config(directory)
    is_file = exists(file) and file.is_file()
    if not is_file:
        if file.suffix:
            raise at(file, f"the projector {file} does not exist; a file or a type such as mlp2x_gelu was expected")
        try:
            projector_depth(projector)  # refuses a type that does not exist
        except UserError as error:
            raise UsageError(str(error)) from None
    try:
        config = joined(with_stop_ids(plain_decoder(raw), directory), tower.config,
                        "linear" if is_file else projector, tower.name, image_tokens, tower.feature_layer,
                        tower.feature_select)
    except UserError as error:
        raise UserError(f"{decoder}: {error}") from None
    config, template = _with_language_template(config, decoder, directory)
    tensors = canonical(Path(decoder), weights(), config, "decoder") | _fresh_projector(config, seed)
    tensors |= tower.tensors(config)
    if image_size not in (None, tower.config.image_size):
        config, tensors = with_image_size(config, tensors, image_size)
    checkpoint = Checkpoint(config, "built", None, tensors, _files(directory, tower.preprocessor),
                            f"{tower.source}, as asked for")
    said = [*said, f"decoder: {decoder}", f"vision tower: {tower.source}", template]
    if (tower.feature_layer, tower.feature_select) != (-2, "patch"):
        said.append(f"features: hidden state {tower.feature_layer} of the tower, {tower.feature_select}, as in "
                    f"{tower.source}")
    if config.vision.image_size != tower.config.image_size:
        said.append(f"image size: {config.vision.image_size}, for which the position table of "
                    f"{tower.config.image_size} pixels is interpolated")
    if image_tokens:
        deviation = raw.get("initializer_range", 0.02)
        if not isinstance(deviation, (int, float)) or not 0 <= deviation < 1:
            raise UserError(f"{decoder}: config.json has initializer_range {short(deviation)}; a number from 0 to 1 "
                            "was expected")
        checkpoint, new = add_image_tokens(checkpoint, scratch, deviation, seed, has_pad)
        said.append(f"image tokens: added {', '.join(new)}" if new else "image tokens: already present")
    if is_file:
        checkpoint, sentence = with_projector(checkpoint, file)
    else:
        sentence = f"projector: {projector}, drawn from seed {seed}"
    return checkpoint, [*said, sentence]


def _opened(decoder: str | Path, scratch: Path) -> tuple[Path, Callable[[], Mapping[str, Tensor]], list[str]]:
    """Returns a decoder's directory, what reads its weights, and sentences about it.

    The directory of a GGUF file is made in `scratch` and lacks the weights.
    """
    if not is_gguf(decoder):
        directory = hub.local(decoder)
        return directory, lambda: read_weights(directory), []
    found, directory = read_decoder(decoder), scratch / "decoder"
    directory.mkdir()
    found.write_files(directory)
    return directory, lambda: found.tensors, found.sentences()


def _decoder_config(directory: Path) -> dict:
    refuse_adapter(directory)
    if not (directory / "config.json").is_file():
        inside = next((file for file in sorted(directory.glob("*.gguf")) if directory.is_dir()), None)
        raise at(directory, f"the decoder {directory} holds no config.json; a language model's directory was expected"
                            f"{f', or the file {inside}' if inside else ''}")
    raw = read_json(directory / "config.json")
    if raw.get("model_type") not in [*DECODERS]:
        raise UserError(f"the decoder {directory} has model_type {short(raw.get('model_type'))}; "
                        f"one of {', '.join(DECODERS)} was expected")
    return raw


def _with_language_template(config: LlavaConfig, decoder: str | Path, directory: Path) -> tuple[LlavaConfig, str]:
    """Names the language model's own template, whose end token ends an answer too.

    It is the one that writes the prompts of the model's chat template. A model without a chat template has the one
    whose special tokens its tokenizer has. Any other model has that of the model type.

    Args:
      config: the model's config.
      decoder: the decoder as the user named it.
      directory: the directory with its tokenizer files, if it has any.

    Returns:
      The config, and a sentence with the template's name and the reason.

    Raises:
      UserError: the tokenizer is not the decoder's.
    """
    default = template_of(config)
    if find_tokenizer(directory) is None:
        return config, f"template: {default}, by model type, because the decoder has no tokenizer"
    tokenizer, rows = Tokenizer.load(directory), config.decoder.vocab_size
    beyond = tokenizer.vocab_size - rows
    lacking = [i for i in config.decoder.eos_ids if not 0 <= i < tokenizer.vocab_size]
    if beyond > _MOST_ADDED or lacking and tokenizer.vocab_size < rows:
        what = (f"{tokenizer.vocab_size} tokens for {rows} rows of the embedding table" if beyond > 0 else
                f"{tokenizer.vocab_size} tokens, and the decoder's end-of-sequence id is {lacking[0]}")
        raise UserError(f"the decoder {decoder} has the tokenizer of another model ({tokenizer.file}: {what}); the "
                        "decoder's own tokenizer was expected")
    has_token = lambda token: tokenizer.id_of(token) is not None
    name, why = own_template(directory, default)
    if why is None:
        name = language_template(config.decoder, has_token)
        why = ("by model type, because the decoder has no chat template" if name is None else
               "by the special tokens of the decoder's tokenizer, because the decoder has no chat template")
    if name is None and not all(map(has_token, get_template(default).form.tokens)):
        name, why = VICUNA, f"{why}, and the tokenizer lacks the special tokens of {default}"
    if name is None:
        return config, f"template: {default}, {why}"
    end = tokenizer.id_of(get_template(name).end_token)
    ids = config.decoder.eos_ids
    ids = ids if end is None or end in ids else (*ids, end)
    decoder_config = replace(config.decoder, **config.decoder.ends_with(ids))
    return config.replace(template=name, decoder=decoder_config), f"template: {name}, {why}"


def _files(decoder: Path, preprocessor: Path | None) -> dict[str, Path]:
    """Returns the decoder's tokenizer files and the tower's preprocessor; not the decoder's text-only chat template."""
    files = {name: file for name, file in text_files(decoder).items()
             if name.startswith(("tokenizer", "special_", "added_", "generation"))}
    return files | ({} if preprocessor is None else {PREPROCESSOR: preprocessor})


def _fresh_projector(config: LlavaConfig, seed: int) -> dict[str, Tensor]:
    """Returns kernels and biases as `nn.Linear` draws them, uniform within fan_in^-1/2, each from its own stream."""
    specs = names.specs(config)

    def load(name: str, shape: tuple[int, ...]) -> np.ndarray:
        bound = specs[f"{name.rpartition('/')[0]}/kernel"].shape[0] ** -0.5
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return {name: Tensor(spec.shape, np.dtype(np.float32), lambda name=name, shape=spec.shape: load(name, shape))
            for name, spec in specs.items() if spec.part == "projector"}


def with_projector(checkpoint: Checkpoint, file: Path) -> tuple[Checkpoint, str]:
    """Replaces a checkpoint's projector by that of an `mm_projector.bin`.

    The originals' training writes such files (`llava/train/llava_trainer.py` of LLaVA-Med v1.0 and of LLaVA).

    A `config.json` beside the file decides how features are taken (layer, selection). From the file's `embed_tokens`, a
    whole table or two rows, the last two rows are taken, which are those of `<im_start>` and `<im_end>`; a model
    without these tokens takes none, as in the original.

    Args:
      checkpoint: the checkpoint.
      file: an `mm_projector.bin`.

    Returns:
      The checkpoint with the new projector, and a sentence that says what was taken.

    Raises:
      UserError: the file does not exist, or has other tensors or shapes than expected.
    """
    if not exists(file):
        raise UsageError(f"the projector {cut(str(file))} does not exist; an mm_projector.bin was expected")
    found = read_file(file)
    pattern = re.compile(r"(?:.*\.)?(?:mm_projector\.(?:(\d+)\.)?(weight|bias)|(embed_tokens|embed_in)\.weight)")
    unknown = [name for name in found if not pattern.fullmatch(name)]
    if unknown:
        raise UserError(f"{file} holds {some(unknown)}; only tensors of mm_projector and embed_tokens were expected")
    layers = {pattern.fullmatch(name).groups(): tensor for name, tensor in found.items()}
    table = next((tensor for (_, _, embedding), tensor in layers.items() if embedding), None)
    layers = {(index, leaf): tensor for (index, leaf, embedding), tensor in layers.items() if not embedding}
    config = _with_settings(checkpoint.config, file, layers)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("projector/")}
    for name, spec in names.specs(config).items():
        if spec.part == "projector":
            n, leaf = spec.torch.split(".")
            key = (None, leaf) if config.projector_type == "linear" else (str(2 * int(n)), leaf)
            tensors[name] = _fitting(file, name, layers.pop(key, None), spec.shape)
    if layers:
        raise UserError(f"{file} holds {len(layers)} projector tensors too many for {config.projector_type}")
    sentence = f"projector: {config.projector_type} of {file}"
    if table is not None and config.use_start_end:
        tensors[next(iter(TABLES))] = _with_last_rows(file, tensors[next(iter(TABLES))], table)
        sentence += ", with its rows of <im_start> and <im_end>"
    elif table is not None:
        sentence += "; its embed_tokens are not used, because this model has no <im_start> and <im_end>"
    return checkpoint.replace(config=config, tensors=tensors), sentence


def _with_settings(config: LlavaConfig, file: Path, layers: Mapping[tuple[str | None, str], Tensor]) -> LlavaConfig:
    """Sets the projector's type from the names in its file, and the use of features from the config beside the file."""
    indices = {index for index, _ in layers}
    if not layers:
        raise UserError(f"{file} holds no tensors of mm_projector")
    kind = "linear" if None in indices else f"mlp{len(indices)}x_gelu"
    beside = file.with_name("config.json")
    settings = read_json(beside) if beside.is_file() else {}
    changes = {field: settings[key] for key, field in _SETTINGS.items() if key in settings}
    if changes.pop("use_start_end", config.use_start_end) and not config.use_start_end:
        raise UserError(f"{beside} has mm_use_im_start_end set, but the model has no <im_start> and <im_end>; "
                        "`convert build --add_image_tokens` adds them")
    if "image_aspect_ratio" in settings:
        changes["image_aspect_ratio"] = "pad" if settings["image_aspect_ratio"] == "pad" else "square"
    return config.replace(projector_type=kind, projector_bias=any(leaf == "bias" for _, leaf in layers), **changes)


def _fitting(file: Path, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    wanted = names.torch_shape(name, shape)
    if tensor is None or tensor.shape != wanted:
        found = "is missing" if tensor is None else f"is {list(tensor.shape)}"
        raise UserError(f"{file} does not fit this model: {name} {found}; {list(wanted)} (in torch's order) was "
                        "expected")
    return from_torch(name, tensor, shape)


def _with_last_rows(file: Path, table: Tensor, rows: Tensor) -> Tensor:
    if rows.shape not in (table.shape, (2, table.shape[1])):
        raise UserError(f"{file} has embed_tokens of {list(rows.shape)}; {list(table.shape)} or {[2, table.shape[1]]} "
                        "was expected")
    def load() -> np.ndarray:
        out = np.array(table.load())
        out[-2:] = Tally().cast(f"embed_tokens of {file}", rows.load()[-2:], out.dtype)
        return out
    return Tensor(table.shape, table.dtype, load)
