"""Describes images by what survives resizing and compression, in several processes.

A perceptual hash (`imagehash.phash`, 256 bits: the signs of the low frequencies of a 64 x 64 grey image) finds
candidates, and a grey thumbnail of 32 x 32 pixels confirms them. On the 60 images of `samples/`, resized to between a
quarter and one and a half, saved as JPEG of quality 10 to 85, or turned grey, a copy has at most 14 other bits and a
correlation of at least 0.998, and two different images have at least 66 other bits and a correlation of at most 0.89.

Letters: N images.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llavamed_jax.curation import extra
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image, split_frame
from llavamed_jax.utils import child_processes, signals, terminal
from llavamed_jax.utils.files import open_file

SIDE = 16  # the hash has SIDE * SIDE bits
THUMBNAIL = 32  # pixels
MISSING, UNREADABLE = "missing", "not readable"
_CHUNK = 16  # images that a process takes at a time
_FEWEST = 128  # images for which processes are started


@dataclass
class Pictures:
    """What is known of N images.

    Attributes:
      paths: their paths.
      hashes: uint64 [N,4].
      thumbnails: uint8 [N,32,32].
      files: bytes [N,16], a digest of each file and of the frame that the path names.
      states: for each image "" or the reason why it could not be read.
    """

    paths: list[str]
    hashes: np.ndarray
    thumbnails: np.ndarray
    files: np.ndarray
    states: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def readable(self) -> np.ndarray:
        """The numbers of the images that could be read, int64 [N]."""
        return np.flatnonzero([not state for state in self.states])


def read_pictures(paths: Sequence[str], workers: int, advance: Callable[[int], None]) -> Pictures:
    """Reads images and hashes them.

    Args:
      paths: the paths.
      workers: the number of processes.
      advance: is called with the number of images that are done.

    Raises:
      UserError: the package imagehash is not installed.
    """
    extra.needed("imagehash", "compares images")
    found = Pictures(list(paths), np.zeros((len(paths), 4), np.uint64),
                     np.zeros((len(paths), THUMBNAIL, THUMBNAIL), np.uint8), np.zeros(len(paths), "V16"), [])
    for number, (state, bits, thumbnail, file) in enumerate(_described(paths, workers)):
        found.states.append(state)
        if not state:
            found.hashes[number] = np.frombuffer(bits, np.uint64)
            found.thumbnails[number] = np.frombuffer(thumbnail, np.uint8).reshape(THUMBNAIL, THUMBNAIL)
            found.files[number] = np.void(file)
        advance(1)
        signals.check()
    return found


def _described(paths: Sequence[str], workers: int) -> Iterator[tuple[str, bytes, bytes, bytes]]:
    if workers < 2 or len(paths) < _FEWEST:
        yield from map(describe, paths)
        return
    child_processes.prepare()
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    with ProcessPoolExecutor(workers, context, initializer=_begin) as pool:
        try:
            yield from pool.map(describe, paths, chunksize=_CHUNK)
        except BrokenProcessPool:
            raise UserError("a process that reads images was ended from outside, perhaps because the memory is full; "
                            "run again with a smaller --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    """Lets a process ignore the terminal's signals, clean its output, and end with its parent."""
    signals.block_here()
    terminal.install()
    child_processes.end_with_parent()


def describe(path: str) -> tuple[str, bytes, bytes, bytes]:
    """Returns the state of an image, its hash (32 bytes), its thumbnail (1,024 bytes) and its file's digest (16)."""
    import imagehash

    try:
        file, frame = split_frame(path)
        if not os.path.isfile(file):
            return MISSING, b"", b"", b""
        with open_file(file) as opened:
            digest = hashlib.file_digest(opened, "sha256")
        digest.update(repr(frame).encode())
        grey = load_image(path).convert("L")
    except (UserError, OSError):
        return UNREADABLE, b"", b"", b""
    bits = np.packbits(imagehash.phash(grey, hash_size=SIDE).hash)
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return "", bits.tobytes(), small.tobytes(), digest.digest()[:16]


def distinct(paths: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """Returns the distinct paths in order, and the number of each."""
    numbers = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    return list(numbers), numbers
