"""Reads and writes `preprocessor_config.json` and `processor_config.json`, which say how images become pixels.

Absent keys have the defaults of transformers' classes, and a switch that is null is off, as in transformers; an
`image_processor` inside `processor_config.json` takes precedence over the other file. In transformers' layout `do_pad`
of a `LlavaImageProcessor` says whether images are padded to a square; in the originals' layouts `image_aspect_ratio` of
`config.json` does. Each key is obeyed, refused or warned of: docs/checkpoint_keys.md has the table.

Source: transformers 5.24, `image_processing_backends.py` (PilBackend),
`models/{clip,llava,siglip}/image_processing_pil_*.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llavamed_jax.checkpoints import open_clip
from llavamed_jax.config import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_EDGE,
    RESAMPLE,
    ImageSettings,
    LlavaConfig,
    VisionConfig,
    channels,
)
from llavamed_jax.errors import UserError, short, some, warn_once
from llavamed_jax.utils.files import read_json, write_json

FILE, PROCESSOR, VIDEO = "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"
_CLIP, _LLAVA, _SIGLIP, _VIT = "CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor", "ViTImageProcessor"
_SIZE = 224  # every class's default of `size`, and of `crop_size` if it crops by default


class _Class(NamedTuple):
    """The defaults of one of transformers' image processors.

    Attributes:
      mean: of the colours.
      std: standard deviation of the colours.
      is_cropped: whether the centre is cut out; then `size` is the shortest edge, else height and width.
      resample: the filter of the resizing.
      is_square: whether a single number for `size` means both edges.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_cropped: bool
    resample: str = "bicubic"
    is_square: bool = False


_CLASSES = {_CLIP: _Class(CLIP_MEAN, CLIP_STD, True), _LLAVA: _Class(CLIP_MEAN, CLIP_STD, True),
            _SIGLIP: _Class((0.5,) * 3, (0.5,) * 3, False),
            _VIT: _Class((0.5,) * 3, (0.5,) * 3, False, "bilinear", is_square=True)}
_EITHER = " or ".join(_CLASSES)
# Keys that change no pixel: which class reads the file, and how results are returned. Images are always converted to
# RGB here; if `do_convert_rgb` is false, transformers accepts no other images.
_WITHOUT_EFFECT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map",
    "do_convert_rgb", "data_format", "input_data_format", "device", "return_tensors", "disable_grouping",
    "image_seq_length", "_valid_processor_keys", "use_fast", "transformers_version", "_commit_hash", "_name_or_path"}
_READ = {
    "do_resize", "size", "default_to_square", "use_square_size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad", "pad_size"}


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """The image settings of a directory's files.

    Attributes:
      where: the file, for messages.
      settings: resizing, cropping and scaling.
      image_mean: mean of each channel.
      image_std: standard deviation of each channel.
      is_padded: whether transformers' processor pads images to a square.
    """

    where: str
    settings: ImageSettings
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    is_padded: bool

    @property
    def content(self) -> tuple:
        """The settings that decide the pixels."""
        return self.settings, self.image_mean, self.image_std, self.is_padded

    def applied_to(self, vision: VisionConfig) -> VisionConfig:
        """Returns a tower's config with these image settings."""
        return dataclasses.replace(vision, image_mean=self.image_mean, image_std=self.image_std, images=self.settings)


def read(directory: Path, size: int, warn: Callable[[str], None] = warn_once,
         kind: str = _LLAVA) -> Preprocessor | None:
    """Reads the image settings of a directory's files; returns None if it has no such files.

    Args:
      directory: the directory.
      size: edge of the tower's input in pixels.
      warn: called with a sentence for settings that are not applied.
      kind: transformers' class for files that name none: that of llava models, or of a tower's own directory.

    Raises:
      UserError: another image processor, or a setting that this project does not have.
    """
    found = [_parse(raw, where, size, warn, kind) for where, raw in _raw(directory, warn)]
    if len(found) == 2 and found[0].content != found[1].content:
        warn(f"{directory}: {PROCESSOR} and {FILE} hold different image settings; {PROCESSOR}'s are used, as in "
             "transformers 5")
    return found[0] if found else None


def has_settings(directory: Path) -> bool:
    """Returns whether a directory has files with image settings."""
    return bool(_raw(directory, warn_once))


def _raw(directory: Path, warn: Callable[[str], None]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the files that hold image settings, with their content; the one that takes precedence first."""
    if open_clip.is_open_clip(directory):
        return [(str(directory / open_clip.FILE), open_clip.preprocessor_json(directory))]
    processor, file = directory / PROCESSOR, directory / FILE
    content = read_json(processor) if processor.is_file() else {}
    if content.get("video_processor") is not None or (directory / VIDEO).is_file():
        warn(f"{directory} has settings for videos, which are not read")
    inner = content.get("image_processor")
    if not isinstance(inner, Mapping | None):
        raise UserError(f"{processor} has image_processor {short(inner)}; an object was expected")
    found = [] if inner is None else [(str(processor), inner)]
    return found + ([(str(file), read_json(file))] if file.is_file() else [])


def with_image_settings(config: LlavaConfig, directory: Path, is_transformers: bool,
                        tower: Path | None = None) -> LlavaConfig:
    """Returns a config with the image settings of a directory's files, if it has any.

    Args:
      config: the model's config.
      directory: the checkpoint's directory.
      is_transformers: whether `do_pad` decides about padding, and `processor_config.json` must count an image's tokens
        as the model does.
      tower: a directory with settings that take precedence and are in `config.vision` already; None for no such
        directory.

    Raises:
      UserError: as `read`; the settings give some image another size than the tower's; files contradict each other.
    """
    raw = _raw(directory, warn_once)
    file, given = raw[0] if raw else (str(directory), {})
    is_towers = tower is not None and has_settings(tower)
    if not is_towers and (found := read(directory, config.vision.image_size)) is not None:
        config = config.replace(vision=found.applied_to(config.vision))
    if given.get("do_pad") is not None:
        own, ratio = config.image_aspect_ratio, "pad" if _pads(given, file) else "square"
        if is_transformers:
            config = config.replace(image_aspect_ratio=ratio)
        elif ratio != own:
            warn_once(f"{file} has do_pad {str(given['do_pad']).lower()}; image_aspect_ratio {own} of config.json is "
                      "used, as in the original's code")
    if is_transformers and (directory / PROCESSOR).is_file():
        _check_count(read_json(directory / PROCESSOR), directory / PROCESSOR, config)
    check(config, str(tower) if is_towers else file)
    return config


def check(config: LlavaConfig, where: str) -> None:
    """Raises UserError if some image would not get the size of the tower's input."""
    vision, is_padded = config.vision, config.image_aspect_ratio == "pad"
    if not vision.images.fills(vision.image_size, is_padded):
        edge = vision.image_size
        raise UserError(f"{where}: do_center_crop is false, so an image {_words(vision.images.resize)}; the vision "
                        f"tower expects {edge} x {edge} pixels")
    if is_padded:
        try:
            _ = vision.pad_color
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _words(resize: tuple[int, ...] | None) -> str:
    if resize is None or len(resize) == 1:
        return "keeps its aspect ratio"
    return f"is resized to {resize[1]} x {resize[0]} pixels" if resize else "keeps its size"


# ---- from a file


def _parse(given: Mapping[str, Any], where: str, size: int, warn: Callable[[str], None],
           default: str) -> Preprocessor:
    kind = _kind(given, where, default)
    defaults = _CLASSES[kind]
    if given.get("use_square_size"):
        raise UserError(f"{where} has use_square_size, which versions of transformers read differently; size was "
                        "expected")
    does = {key: _switch(given, key, where, key != "do_center_crop" or defaults.is_cropped)
            for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    is_padded = _pads(given, where)
    if does["do_center_crop"]:
        _check_crop(given, where, size, defaults)
    if given.get("do_pad") and not is_padded and given.get("pad_size") is not None:
        _check_edges(given, "pad_size", where, size)  # CLIP's processor pads to this size at the end
    odd = sorted(key for key, value in given.items() if value is not None and key not in _READ | _WITHOUT_EFFECT)
    if odd:
        warn(f"{where} has {some(odd)}, which neither transformers' {kind} nor this project reads")
    mean = channels(where, "image_mean", given.get("image_mean", defaults.mean))
    std = channels(where, "image_std", given.get("image_std", defaults.std))
    settings = ImageSettings(
        _resize(given, where, size, defaults) if does["do_resize"] else (), does["do_center_crop"],
        _filter(given, where, defaults) if does["do_resize"] else "bicubic",
        _factor(given, where) if does["do_rescale"] else 1.0, does["do_normalize"])
    return Preprocessor(where, settings, mean, std, is_padded)


def _pads(given: Mapping[str, Any], where: str) -> bool:
    """Returns whether images are padded to a square, which only LLaVA's own processor does."""
    return _switch(given, "do_pad", where, False) and _kind(given, where) == _LLAVA


def _kind(given: Mapping[str, Any], where: str, default: str = _LLAVA) -> str:
    """Returns the class that transformers uses: by its name, by its name before 4.25, else `default`."""
    key = next((key for key in ("image_processor_type", "feature_extractor_type") if given.get(key) is not None), None)
    if key is None:
        if isinstance(given.get("auto_map"), dict) and given["auto_map"]:
            raise UserError(f"{where} names custom code (auto_map) but no image_processor_type; {_EITHER} was expected")
        return default
    kind = str(given[key]).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _CLASSES:
        raise UserError(f"{where} has {key} {short(given[key])}; {_EITHER} was expected")
    return kind


def _switch(given: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool | None):
        raise UserError(f"{where} has {key} {short(value)}; true or false was expected")
    return bool(value)


def _resize(given: Mapping[str, Any], where: str, size: int, defaults: _Class) -> tuple[int, ...] | None:
    if "size" not in given and "crop_size" not in given:  # the classes' defaults fit towers of 224 pixels alone
        return None if defaults.is_cropped else (size, size)
    is_square = _switch(given, "default_to_square", where, defaults.is_square)
    default = (_SIZE,) if defaults.is_cropped else (_SIZE, _SIZE)
    edges = _edges(given["size"], where, "size", is_square) if "size" in given else default
    return None if edges == (size,) else edges


def _check_crop(given: Mapping[str, Any], where: str, size: int, defaults: _Class) -> None:
    if not defaults.is_cropped and "crop_size" not in given:
        raise UserError(f"{where} has do_center_crop true and no crop_size; the vision tower's {size} x {size} was "
                        "expected")
    if "crop_size" not in given and "size" not in given:
        return  # the defaults, as in `_resize`
    if "crop_size" in given:
        _check_edges(given, "crop_size", where, size)
    elif size != _SIZE:
        raise UserError(f"{where} has no crop_size, so it is {_SIZE}; the vision tower's {size} x {size} was expected")


def _check_edges(given: Mapping[str, Any], key: str, where: str, size: int) -> None:
    if _edges(given[key], where, key, is_square=True) != (size, size):
        raise UserError(f"{where} has {key} {short(given[key])}; the vision tower's {size} x {size} was expected")


def _edges(value: Any, where: str, key: str, is_square: bool) -> tuple[int, ...]:
    """Returns (n,) for a shortest edge, (h, w) for both; with `is_square` a single number means both."""
    if isinstance(value, Mapping) and value.keys() == {"height", "width"}:
        edges = (value["height"], value["width"])
    elif isinstance(value, Mapping) and value.keys() == {"shortest_edge"} and key == "size":
        edges = (value["shortest_edge"],)
    elif isinstance(value, list) and len(value) == 2:
        edges = tuple(value)
    else:
        edges = (value, value) if is_square else (value,)
    if not all(isinstance(edge, int) and not isinstance(edge, bool) and 1 <= edge <= MAX_EDGE for edge in edges):
        kinds = "shortest_edge, " * (key == "size") + "height and width"
        raise UserError(f"{where} has {key} {short(value)}; {kinds} or a number, from 1 to {MAX_EDGE}, was expected")
    return edges


def _filter(given: Mapping[str, Any], where: str, defaults: _Class) -> str:
    number = given.get("resample", RESAMPLE.index(defaults.resample))
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(RESAMPLE):
        names = ", ".join(f"{i} ({name})" for i, name in enumerate(RESAMPLE))
        raise UserError(f"{where} has resample {short(number)}; one of {names} was expected")
    return RESAMPLE[number]


def _factor(given: Mapping[str, Any], where: str) -> float:
    value = given.get("rescale_factor", 1 / 255)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where} has rescale_factor {short(value)}; a finite number above 0 was expected")
    return float(value)


# ---- the number of tokens an image takes


def _check_count(raw: Mapping[str, Any], file: Path, config: LlavaConfig) -> None:
    """Raises UserError if `LlavaProcessor` counts another number of tokens an image than the model has.

    transformers fails on such a checkpoint. Processors before 4.48 have no `num_additional_image_tokens` and count 1.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    patch, strategy = given.get("patch_size", config.vision.patch_size), given.get("vision_feature_select_strategy")
    own, class_tokens = config.select_strategy, config.vision.class_tokens
    if patch != config.vision.patch_size:
        raise UserError(f"{file} has patch_size {short(patch)}; config.json has {config.vision.patch_size}")
    if strategy not in (None, own):
        raise UserError(f"{file} has vision_feature_select_strategy {short(strategy)}; config.json has {own}")
    additional = given.get("num_additional_image_tokens")
    if additional is not None and strategy is not None and additional != class_tokens:
        raise UserError(f"{file} has num_additional_image_tokens {short(additional)}; {class_tokens} was expected, the "
                        f"number of class tokens of the vision tower (an image takes {config.tokens_per_image} tokens)")


def warn_of_image_token(directory: Path, taken: str) -> None:
    """Warns if `processor_config.json` has another image token than the one that is used."""
    stated = read_json(directory / PROCESSOR).get("image_token") if (directory / PROCESSOR).is_file() else None
    if stated not in (None, taken):
        warn_once(f"{directory / PROCESSOR} has image_token {short(stated)}; {taken} of the tokenizer and config.json "
                  "is used")


# ---- to a file


def written(config: LlavaConfig, is_transformers: bool) -> dict:
    """Returns the `preprocessor_config.json` with which an image processor of transformers gives the same pixels.

    Only LLaVA's own processor pads to a square; in the originals' layouts their code does.

    Args:
      config: the model's config.
      is_transformers: whether the file is for transformers' layout.
    """
    vision, images, size = config.vision, config.vision.images, config.vision.image_size
    edges = (size,) if images.resize in (None, ()) else images.resize
    does_pad = is_transformers and config.image_aspect_ratio == "pad"
    kind = dict(image_processor_type=_LLAVA if does_pad else _CLIP, **({"do_pad": True} if does_pad else {}))
    return dict(
        kind, do_convert_rgb=True, do_resize=images.resize != (), resample=RESAMPLE.index(images.resample),
        size={"shortest_edge": edges[0]} if len(edges) == 1 else {"height": edges[0], "width": edges[1]},
        do_center_crop=images.is_cropped, crop_size={"height": size, "width": size}, do_rescale=images.scale != 1.0,
        rescale_factor=1 / 255 if images.scale == 1.0 else images.scale, do_normalize=images.is_normalized,
        image_mean=list(vision.image_mean), image_std=list(vision.image_std))


def make_equal(config: LlavaConfig, directory: Path, is_transformers: bool, is_needed: bool = True) -> None:
    """Rewrites the files of a directory that is being written if they disagree with the config.

    They may belong to another tower than the config's, or be absent though the settings are not those of its kind.

    Args:
      config: the model's config.
      directory: the directory.
      is_transformers: whether it is in transformers' layout.
      is_needed: False if a config of this project holds the settings, so that absent files stay absent.
    """
    try:
        found, is_other = read(directory, config.vision.image_size, warn=lambda sentence: None), False
    except UserError:  # the settings are for another tower's size
        found, is_other = None, True
    if found is None and not is_other and not is_needed:
        return
    if found is None:  # the settings of the tower's kind, or CLIP's in a file that could not be read
        own = config.vision.plain()
        found = Preprocessor("", own.images, own.image_mean, own.image_std, False)
    pads_alike = not is_transformers or found.is_padded == (config.image_aspect_ratio == "pad")
    if not is_other and pads_alike and found.applied_to(config.vision) == config.vision:
        return
    write_json(directory / FILE, written(config, is_transformers))
    if (directory / PROCESSOR).is_file():
        kept = {key: value for key, value in read_json(directory / PROCESSOR).items() if key != "image_processor"}
        write_json(directory / PROCESSOR, kept)
