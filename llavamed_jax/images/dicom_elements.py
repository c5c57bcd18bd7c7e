"""Reads elements of a DICOM header as plain values; an element that is present and empty counts as absent.

Scanners and anonymisers write elements of every kind without a value, with only the padding of a text, or with several
values where the standard has one. An element that cannot be read raises one sentence with its tag and name. Source:
DICOM PS3.5, 6.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llavamed_jax.errors import UserError, short

if TYPE_CHECKING:
    from pydicom import Dataset

_TEXT = ("CS", "DS", "IS", "LO", "SH", "UI")  # VRs with padded values, which may be padding only


def called(keyword: str) -> str:
    """Returns the tag and name of an element: `WindowWidth` -> `(0028,1051) Window Width`."""
    from pydicom.datadict import dictionary_description, tag_for_keyword

    tag = tag_for_keyword(keyword)
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {dictionary_description(tag)}"


def remove_empty(ds: Dataset) -> set[int]:
    """Removes the elements without a value from a data set and from the items of its sequences.

    Args:
      ds: the data set, which is changed.

    Returns:
      The tags that were removed from the data set itself.
    """
    from pydicom.datadict import dictionary_has_tag, dictionary_VR

    removed = set()
    for tag in list(ds.keys()):
        kind = dictionary_VR(tag) if dictionary_has_tag(tag) else ""
        if _is_empty(ds, tag, kind in _TEXT):
            del ds[tag]
            removed.add(int(tag))
        elif kind == "SQ":
            for item in ds[tag].value:
                remove_empty(item)
    return removed


def _is_empty(ds: Dataset, tag: int, is_text: bool) -> bool:
    try:
        value = ds.get_item(tag).value
    except Exception:  # pydicom converts empty values too, and may look at another empty element for that
        return True
    if is_text and isinstance(value, (str, bytes)):
        value = value.strip(" \0\\" if isinstance(value, str) else b" \0\\")
    return value is None or isinstance(value, (str, bytes, list)) and not value


def items(ds: Dataset, keyword: str) -> list[Dataset]:
    """Returns the items of a sequence; an empty list if there is no such sequence."""
    return list(ds.get(keyword) or [])


def values(ds: Dataset, keyword: str, name: str) -> list[Any]:
    """Returns all values of an element, None for each empty one; an empty list if the element is absent.

    Args:
      ds: the data set.
      keyword: the element's keyword.
      name: the image's name in errors.

    Returns:
      The values.

    Raises:
      UserError: the element cannot be read.
    """
    try:
        found = ds.get(keyword)
    except Exception as error:  # pydicom converts a value on access
        raw = ds.get_item(keyword)
        raise wrong(name, keyword, getattr(raw, "value", None), "a value of the element's type") from error
    several = ([found] if found is None or isinstance(found, (str, bytes)) or not hasattr(found, "__iter__")
               else list(found))
    several = [None if isinstance(value, (str, bytes)) and not value.strip() else value for value in several]
    return [] if all(value is None for value in several) else several


def numbers(ds: Dataset, keyword: str, name: str) -> list[float | None]:
    """Returns `values` as numbers, which may be infinite or NaN."""
    found = values(ds, keyword, name)
    try:
        return [None if value is None else float(value) for value in found]
    except (TypeError, ValueError, OverflowError):
        raise wrong(name, keyword, found[0] if len(found) == 1 else found, "a number") from None


def first_number(ds: Dataset, keyword: str, name: str) -> float | None:
    """Returns the first value of an element as a number; None if it has no value."""
    return next((value for value in numbers(ds, keyword, name) if value is not None), None)


def whole_number(ds: Dataset, keyword: str, name: str) -> int | None:
    """Returns the first value of an element as a whole number; None if it has no value."""
    value = first_number(ds, keyword, name)
    if value is not None and value != value // 1:  # NaN and infinity too
        raise wrong(name, keyword, value, "a whole number")
    return None if value is None else int(value)


def bits_stored(ds: Dataset, name: str) -> int | None:
    """Returns Bits Stored; if that is absent or 0, Bits Allocated, as viewers do. None without either."""
    return whole_number(ds, "BitsStored", name) or whole_number(ds, "BitsAllocated", name)


def text(ds: Dataset, keyword: str, name: str) -> str | None:
    """Returns the first value of an element as a text without padding, in capitals; None if it has no value."""
    value = next((value for value in values(ds, keyword, name) if value is not None), None)
    value = value.decode("latin-1") if isinstance(value, bytes) else value
    return None if value is None else str(value).strip(" \0").upper()


def wrong(name: str, keyword: str, value: Any, expected: str) -> UserError:
    """Returns the error about an element that cannot be used."""
    value = value.decode("latin-1").strip(" \0") if isinstance(value, bytes) else value
    return UserError(f"{name} has {called(keyword)} {short(value)}; {expected} was expected")
