"""Parquet files whose rows carry their images, as the hub keeps data sets: the images become files once, named by content.

Everything after the readers (control runs, clustering by image, leakage counts, reports, training) knows an image by its path.
The bytes of an image that many rows repeat are written once, under the hash of the bytes, so that two rows have one path
exactly where they have one image, in whichever split they stand.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llavamed_jax.datasets.records import save_whole
from llavamed_jax.errors import UserError
from llavamed_jax.utils import progress
from llavamed_jax.utils.files import open_file
from llavamed_jax.utils.hashes import sha256

_ROWS = 64  # that are held at a time, with their images
_LARGE = 2000  # rows from which on a bar is shown


def read_parquet(files: Sequence[Path], columns: Sequence[str], images: Path,
                 optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of some files, one file after another: `columns` as they are, and `image` as a path.

    Args:
      columns: other than `image`, whose values are encoded bytes, or `{"bytes", "path"}` as the hub has them.
      optional: columns that a file may have; a row has them where its file does.
      images: the folder that the images are written to, where they do not lie there already.
    Raises:
      UserError: pyarrow is missing, a file that is no parquet, lacks a column or holds no image, a folder that cannot be written.
    """
    parquet = _pyarrow()
    opened = [_open(parquet, file, {*columns, "image"}) for file in files]
    total, keep = sum(file.metadata.num_rows for file in opened), _Images(images)
    with progress.bar(total=total, is_long=total >= _LARGE, desc="reading parquet", unit="row") as bar:
        for name, file in zip(files, opened, strict=True):
            index, more = 0, [column for column in optional if column in file.schema_arrow.names]
            for batch in _batches(file, name, [*columns, *more, "image"]):
                for row in batch:
                    yield {**row, "image": keep(row["image"], f"row {index} of {name}")}
                    index += 1
                bar.update(len(batch))


def footer(file: Path) -> tuple[list[str], int]:
    """Names of the columns of a file and its number of rows; none where it cannot be read, or pyarrow is not there."""
    try:
        opened = _open(_pyarrow(), file, set())
    except UserError:  # whoever reads the rows says why
        return [], 0
    return opened.schema_arrow.names, opened.metadata.num_rows


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files are read with pyarrow, which is not installed: pip install 'llavamed-jax[parquet]'") from None
    return pyarrow.parquet


def _open(parquet, file: Path, columns: set[str]):
    open_file(file).close()  # pyarrow would wait for a pipe
    try:
        opened = parquet.ParquetFile(file)
    except Exception as error:  # ArrowInvalid, OSError and others, by what is wrong
        raise UserError(f"{file} is no parquet file that can be read: {_first_line(error)}") from None
    missing = sorted(columns - set(opened.schema_arrow.names))
    if missing:
        raise UserError(f"{file} has no column {' and '.join(missing)}; its columns are {', '.join(opened.schema_arrow.names)}")
    return opened


def _batches(file, name: Path, columns: Sequence[str]) -> Iterator[list[dict]]:
    batches = file.iter_batches(_ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except Exception as error:  # of the library's many, where pages are damaged
            raise UserError(f"{name} is damaged: {_first_line(error)}") from None
        if rows is None:
            return
        yield rows


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


class _Images:
    """Writes encoded images into a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._last: tuple[bytes, Path] = (b"", folder)

    def __call__(self, value: Any, name: str) -> Path:
        """The path of an image, which is written if no such file is there."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes) or not data:
            raise UserError(f"{name} has no image; encoded bytes were expected")
        if data != self._last[0]:  # questions about one image stand together
            self._last = (data, self._written(data))
        return self._last[1]

    def _written(self, data: bytes) -> Path:
        path = self._folder / f"{sha256(data)[:32]}{_suffix(data)}"
        try:
            if not path.is_file() or path.stat().st_size != len(data):
                save_whole(path, lambda file: file.write(data))
        except OSError as error:
            raise UserError(f"the images of parquet files cannot be written to {self._folder} ({error.strerror}); "
                            "data.images names another folder") from None
        return path


def _suffix(data: bytes) -> str:
    """`.jpg` and the like; none where Pillow does not know what it is, which is said when the image is asked for."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return {"JPEG": ".jpg"}.get(image.format, f".{image.format.lower()}")
    except Exception:  # Pillow's readers raise many kinds; the file is kept as it is
        return ""
