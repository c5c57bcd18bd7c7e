"""Checks the values of a config.json, since JSON can hold anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llavamed_jax.errors import UserError, short

# Names of transformers' activations that `models.layers` has; some are one function under several names.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")


def as_object(value: Any, key: str) -> dict:
    """Returns the JSON object under `key` of a config.json. Raises UserError for another value."""
    if not isinstance(value, Mapping):
        raise UserError(f"config.json has {key} {short(value)}; an object was expected")
    return dict(value)


def channels(where: str, key: str, value: Any) -> tuple[float, ...]:
    """Returns a preprocessor's `image_mean` or `image_std` as a tuple, which is hashable, unlike JSON's list.

    Args:
      where: the file, for errors.
      key: `image_mean` or `image_std`.
      value: the value in the file.

    Raises:
      UserError: the value is not a list of three numbers.
    """
    value = list(value) if isinstance(value, tuple) else value
    is_number = [is_plain(x, (int, float)) for x in value] if isinstance(value, list) else []
    if len(is_number) != 3 or not all(is_number) or (key == "image_std" and min(value) <= 0):
        raise UserError(f"{where} has {key} {short(value)}; a list of three numbers{' above 0' * (key == 'image_std')} "
                        "was expected")
    return tuple(map(float, value))


def number(value: Any, key: str) -> float:
    """Returns a finite number of a config.json as float. Raises UserError for another value."""
    if not is_plain(value, (int, float)):
        raise UserError(f"config.json has {key} {short(value)}; a number was expected")
    if not abs(value) < 1e300:  # NaN, infinity, and an integer that no float holds
        raise UserError(f"config.json has {key} {short(value)}; a finite number was expected")
    return float(value)


# By annotation; an integer is accepted as a number, but true and false are not.
_KINDS = {"int": ((int,), "a whole number"), "float": ((int, float), "a number"), "bool": ((bool,), "true or false"),
          "str": ((str,), "a text")}
_LISTS = {"tuple[int, ...]": ((int,), "a list of whole numbers"),
          "tuple[float, ...]": ((int, float), "a list of numbers")}
# Integers that are not counts, and counts that have a lower limit, since they multiply the number of tensors.
_SIGNED = {"feature_layer", "image_token_id", "bos_token_id", "eos_token_id", "pad_token_id"}
_MOST = {"num_layers": 1000}
_MOST_OF_ALL = 2**31 - 1


def check_fields(config: Any, part: str) -> None:
    """Raises UserError if a config's field does not have its annotated type, or has a value that no model has."""
    for field in dataclasses.fields(config):
        # The annotation is a string in files with `from __future__ import annotations`.
        annotation = field.type.__name__ if isinstance(field.type, type) else str(field.type)
        value, (kind, _, optional) = getattr(config, field.name), annotation.partition(" | ")
        if optional and value is None:
            continue
        if not _is_of_kind(value, kind):
            words = _KINDS[kind][1] if kind in _KINDS else _LISTS[kind][1] if kind in _LISTS else f"a {kind}"
            raise UserError(f"the {part}config has {field.name} {short(value)}; "
                            f"{words}{' or null' if optional else ''} was expected")
        if kind == "int" and field.name not in _SIGNED and not (
                1 <= value <= (limit := _MOST.get(field.name, _MOST_OF_ALL))):
            bounds = "of at least 1" if value < 1 and field.name not in _MOST else f"from 1 to {limit}"
            raise UserError(f"the {part}config has {field.name} {short(value)}; a whole number {bounds} was expected")
        if kind == "int" and abs(value) > _MOST_OF_ALL or kind == "tuple[int, ...]" and any(
                abs(item) > _MOST_OF_ALL for item in value):
            raise UserError(f"the {part}config has {field.name} {short(value)}; whole numbers of at most "
                            f"{_MOST_OF_ALL} were expected")
        if kind == "float" and not 0 < value < math.inf:
            raise UserError(f"the {part}config has {field.name} {short(value)}; a finite number above 0 was expected")


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind in _LISTS:
        return isinstance(value, tuple) and all(is_plain(item, _LISTS[kind][0]) for item in value)
    return is_plain(value, _KINDS[kind][0]) if kind in _KINDS else any(
        base.__name__ == kind for base in type(value).__mro__)


def is_plain(value: Any, types: tuple[type, ...]) -> bool:
    """Returns whether a JSON value has one of the types; true and false do not count as numbers."""
    return isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


def token_ids(value: Any, key: str, file: str = "config.json") -> tuple[int, ...]:
    """Returns the ids of a value that is one id, a list of ids, or null.

    Args:
      value: the value in the file.
      key: its key, for errors.
      file: the file, for errors.

    Raises:
      UserError: the value is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or not all(is_plain(i, (int,)) for i in ids):
        raise UserError(f"{file} has {key} {short(value)}; an id, a list of ids or null was expected")
    return tuple(dict.fromkeys(ids))


def check_counts(config: Mapping[str, Any], keys: list[str]) -> None:
    """Raises UserError if a value under one of the keys is not an integer of at least 1."""
    for key in keys:
        if not is_plain(config[key], (int,)) or config[key] < 1:
            raise UserError(f"config.json has {key} {short(config[key])}; a whole number of at least 1 was expected")


def check_activation(what: str, name: str) -> None:
    """Raises UserError for an activation that `models.layers.ACTIVATIONS` lacks."""
    if name not in ACTIVATIONS:
        raise UserError(f"{what} is {short(name)}; one of {', '.join(ACTIVATIONS)} was expected")
