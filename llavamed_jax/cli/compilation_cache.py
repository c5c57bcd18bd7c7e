"""Keeps compiled programs on disk, so that a command that is started again does not compile them again."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from llavamed_jax.utils.paths import user_cache

SWITCH, DIRECTORY = "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"  # jax's environment variables
# Programs that compile faster are not kept. jax's default of 1 s would skip half of a small model's programs.
LEAST_SECONDS = 0.1
MOST_BYTES = 4_000_000_000


def enable() -> None:
    """Makes jax keep compiled programs in the user's cache directory. Call it before the first program is compiled.

    jax finds an entry by the program, jaxlib, XLA's flags, the kind and number of devices and, on a CPU, its
    instruction set: entries of another version or machine are not used. `JAX_COMPILATION_CACHE_DIR` names another
    directory, and `JAX_ENABLE_COMPILATION_CACHE=0` disables the cache. Several processes use only a directory that was
    named: in a directory that they do not share, one process could find a program for which the others still want to
    tune kernels with it.
    """
    import jax  # callers need it next anyway

    config = jax.config
    if not config.jax_enable_compilation_cache:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    if config.jax_compilation_cache_dir is not None or jax.distributed.is_initialized():
        return
    try:
        directory = user_cache() / "programs"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, since its programs are executed
        with tempfile.TemporaryFile(dir=directory):
            pass
        prune(directory, MOST_BYTES)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"warning: compiled programs are not cached: {error.strerror or error}{where} (set {DIRECTORY} to "
              f"another directory, or {SWITCH}=0 to turn the cache off)", file=sys.stderr)
        return
    config.update("jax_compilation_cache_dir", str(directory))


def prune(directory: Path, most: int) -> None:
    """Deletes the least recently used entries until at most `most` bytes are left."""
    found = []
    for path in directory.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process may be here at the same time
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    for _, size, path in sorted(found, reverse=True):
        most -= size
        if most < 0:
            path.unlink(missing_ok=True)
