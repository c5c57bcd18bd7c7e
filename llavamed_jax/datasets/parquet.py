"""Reads parquet files whose rows contain their images, as on the hub, and writes the images to files.

All code after the readers (controls, clustering by image, leakage counts, reports, training) identifies an image by its
path. So an image is written once, even if many rows repeat it, to a file that is named after the hash of its bytes. Two
rows have the same path if and only if they have the same image, in all splits.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llavamed_jax.datasets.records import save_whole
from llavamed_jax.errors import UserError
from llavamed_jax.utils import progress
from llavamed_jax.utils.files import open_file
from llavamed_jax.utils.hashes import sha256
from llavamed_jax.utils.paths import user_cache

log = logging.getLogger(__name__)

_ROWS = 64  # rows that are in memory at a time, with their images
_LARGE = 2000  # rows; from this number on, a progress bar is shown


@dataclass(frozen=True)
class Default:
    """The folder that images are written to if the user names none. It lies beside the data and may be read-only."""

    folder: Path


def image_folder(root: Path, images: str | Path | None) -> Path | Default:
    """Returns the folder that the images of parquet files are written to: `images`, or by default `root/images`."""
    return Path(images) if images else Default(root / "images")


def read_parquet(files: Sequence[Path], columns: Sequence[str], images: Path | Default,
                 optional: Sequence[str] = (), pictures: Sequence[str] = ("image",)) -> Iterator[dict[str, Any]]:
    """Reads the rows of files, one file after another.

    Args:
      files: the files. The values of their images are encoded bytes or, as on the hub, `{"bytes", "path"}`.
      columns: required columns without the images.
      images: the folder that the images are written to, unless they are there already. If it is a `Default` that cannot
        be written, they are written to `parquet_images` in the user's cache, with a warning.
      optional: columns that a file may have; rows have them only if their file does.
      pictures: the columns of the images. Every row has the first one; a row may lack the others.

    Yields:
      A dict with the values of the columns, and under each of `pictures` the path of the image, if there is one.

    Raises:
      UserError: pyarrow is not installed; a file is not parquet, lacks a column or contains no image; or the folder
        cannot be written to.
    """
    parquet = _pyarrow()
    opened = [_open(parquet, file, {*columns, pictures[0]}) for file in files]
    total, keep = sum(file.metadata.num_rows for file in opened), _Images(images)
    with progress.bar(total=total, is_long=total >= _LARGE, desc="reading parquet", unit="row") as bar:
        for name, file in zip(files, opened, strict=True):
            there = file.schema_arrow.names
            index, more = 0, [column for column in (*optional, *pictures[1:]) if column in there]
            for batch in _batches(file, name, [*columns, pictures[0], *more]):
                for row in batch:
                    shown = [column for column in pictures if column == pictures[0] or row.get(column) is not None]
                    yield {**row, **{column: keep(row[column], f"row {index} of {name}") for column in shown}}
                    index += 1
                bar.update(len(batch))


def footer(file: Path) -> tuple[list[str], int]:
    """Returns the columns and the number of rows of a file; nothing and 0 if it or pyarrow cannot be loaded."""
    try:
        opened = _open(_pyarrow(), file, set())
    except UserError:  # reading the rows gives the error
        return [], 0
    return opened.schema_arrow.names, opened.metadata.num_rows


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("pyarrow, which reads parquet files, is not installed: pip install "
                        "'llavamed-jax[parquet]'") from None
    return pyarrow.parquet


def _open(parquet, file: Path, columns: set[str]):
    open_file(file).close()  # raises for a pipe, which pyarrow would wait for
    try:
        opened = parquet.ParquetFile(file)
    except Exception as error:  # ArrowInvalid, OSError and others
        raise UserError(f"{file} cannot be read as a parquet file: {_first_line(error)}") from None
    missing = sorted(columns - set(opened.schema_arrow.names))
    if missing:
        raise UserError(f"{file} has no column {' and '.join(missing)}; its columns are "
                        f"{', '.join(opened.schema_arrow.names)}")
    return opened


def _batches(file, name: Path, columns: Sequence[str]) -> Iterator[list[dict]]:
    batches = file.iter_batches(_ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except Exception as error:  # pyarrow raises many kinds for damaged pages
            raise UserError(f"{name} is damaged: {_first_line(error)}") from None
        if rows is None:
            return
        yield rows


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


class _Images:
    """Writes encoded images into a folder."""

    def __init__(self, folder: Path | Default):
        self._is_default = isinstance(folder, Default)
        self._folder = folder.folder if isinstance(folder, Default) else folder
        self._instead: Path | None = None
        self._last: tuple[bytes, Path] = (b"", self._folder)

    def __call__(self, value: Any, name: str) -> Path:
        """Returns the path of an image; writes the file if it does not exist."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise UserError(f"{name} has no image; encoded bytes were expected")
        if data != self._last[0]:  # questions about one image are adjacent
            self._last = (data, self._written(data))
        return self._last[1]

    def _written(self, data: bytes) -> Path:
        name = f"{sha256(data)[:32]}{_suffix(data)}"
        try:
            return self._put(self._folder / name, data)
        except OSError as error:
            if not self._is_default:
                raise UserError(f"the images of parquet files cannot be written to {self._folder} ({error.strerror}); "
                                "set data.images to another folder") from None
            first = error.strerror
        try:
            folder = user_cache() / "parquet_images"
            path = self._put(folder / name, data)
        except OSError as error:
            raise UserError(f"the images of parquet files cannot be written to {self._folder} ({first}), nor to the "
                            f"user's cache ({error.strerror or error}); another cache was expected in XDG_CACHE_HOME"
                            ) from None
        if self._instead is None:
            self._instead = folder
            log.warning("the images of parquet files cannot be written to %s (%s); they are written to %s",
                        self._folder, first, folder)
        return path

    @staticmethod
    def _put(path: Path, data: bytes) -> Path:
        if not path.is_file() or path.stat().st_size != len(data):
            save_whole(path, lambda file: file.write(data))
        return path


def _suffix(data: bytes) -> str:
    """Returns a suffix such as `.jpg`; "" for data that Pillow does not know, which raise when the image is loaded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"JPEG": ".jpg"}.get(image.format, f".{image.format.lower()}")
    except Exception:  # Pillow's readers raise many kinds; the file is written unchanged
        return ""
