"""Checks that the processes of a job were started alike.

Process 0 compares their settings, and all processes raise an error about the differences. XLA assumes that all
processes compile one program and call it in one order. If one has another learning rate, another file or another
version of a package, the processes deadlock or compute a wrong result.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.parallel import distributed
from llavamed_jax.utils.changes import changes
from llavamed_jax.utils.code import code_sha256, version

# Packages that compute, that read text, images or weights, or that write checkpoints; also plugins of accelerators.
PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu", "flax",
    "optax", "chex", "orbax-checkpoint", "tensorstore", "grain", "ml_collections", "ml_dtypes", "numpy", "scipy",
    "transformers", "tokenizers", "sentencepiece", "safetensors", "jinja2", "pillow", "pydicom", "pyarrow",
)  # fmt: skip
# Settings of jax that change the program; environment variables and the command line set them.
_SETTINGS = ("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
             "jax_threefry_partitionable", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_disable_jit",
             "jax_debug_nans")
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OF_A_HOST = ("dump", "cache")  # parts of the names of XLA flags that set a host's paths and do not change a program
_TYPED = ("--", "the config key ")  # settings of the command line, for which the exit status is 2


class StartedOtherwise(UserError):
    """A process has other files, code or packages than process 0. All processes raise it with the same sentence."""


def check_same(make: Callable[[], Mapping[str, object]]) -> None:
    """Compares the settings of all processes and raises in all of them if they differ.

    All processes must call it. A single process does not call `make`.

    Args:
      make: returns the settings that must be equal: a name (a flag `--NAME` or `the config key NAME` for what users
        type) -> a value of JSON's types.

    Raises:
      UsageError: a flag or a config key differs; raised in all processes.
      StartedOtherwise: something else differs; raised in all processes.
    """
    if distributed.process_count() == 1:
        return
    everyone = distributed.gather(json.dumps(dict(make()), default=str).encode())
    found = distributed.from_first(lambda: _difference([_read(each) for each in everyone]))
    if found is not None:
        distributed.end_alike()
        raise (UsageError if found["is_typed"] else StartedOtherwise)(found["sentence"])


def _read(values: bytes) -> dict[str, object]:
    return json.loads(values, parse_constant=str)  # as strings, NaN equals NaN


def _difference(everyone: Sequence[Mapping[str, object]]) -> dict | None:
    """Describes what differs between the processes, and whether users type it; returns None if nothing differs."""
    first, *others = everyone
    unlike = [k for k, values in enumerate(others, 1) if values != first]
    if not unlike:
        return None
    k, more = unlike[0], len(unlike) - 1
    who = f"process {k} was" if not more else f"process {k} and {more} more of {len(everyone)} were"
    found = changes(first, everyone[k], ("in process 0", f"in process {k}"))
    names = [name for name in {**first, **everyone[k]} if first.get(name) != everyone[k].get(name)]
    return {"is_typed": any(name.startswith(_TYPED) for name in names),
            "sentence": f"{who} started differently from process 0: {found}; the same was expected in all processes"}


def installation() -> dict[str, object]:
    """Returns what this process computes with.

    These are versions of Python and packages, this package's code, and settings of jax and XLA.
    """
    import jax  # not at the top: a single process can call the rest without jax
    return {
        "the version of Python": platform.python_version(),
        **{f"the version of {name}": version(name) for name in PACKAGES},
        "the code of llavamed_jax": f"sha256 {code_sha256()[:12]}",
        **{f"jax's setting {name}": _plain(getattr(jax.config, name, None)) for name in _SETTINGS},
        **compiler_flags(),
    }


def compiler_flags() -> dict[str, str]:
    """Returns the environment variables with flags of XLA, without the flags that set a host's paths."""
    return {f"the environment variable {name}": _flags(os.environ.get(name, "")) for name in _ENVIRONMENT}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flags(text: str) -> str:
    """Returns the flags that change a program, sorted by name; the order of repeated flags is kept, since it counts."""
    return " ".join(sorted((word for word in text.split() if not any(part in word for part in _OF_A_HOST)),
                           key=lambda word: word.partition("=")[0]))
