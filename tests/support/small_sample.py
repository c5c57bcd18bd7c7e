"""`samples/vqa_rad` with images of at most 48 pixels: for evaluations of which no pixel counts."""

import functools
import shutil
import tempfile
from pathlib import Path

from tests.support.training_runs import SAMPLE, images


@functools.cache
def _copy() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="llavamed-sample-")
    shutil.copytree(SAMPLE, folder.name, ignore=shutil.ignore_patterns("images"), dirs_exist_ok=True)
    shutil.copytree(images(), Path(folder.name) / "images")
    return folder


def small_sample() -> Path:
    """The folder; it stays as it is."""
    return Path(_copy().name)
