"""Whether the processes of a job were started alike: each says what it has, process 0 compares, and all hear what is not the same.

XLA takes for granted that all processes compile one program and call it in one order. Where one has another learning rate, another
file or another version of a package, they wait for each other, or compute something that nobody asked for.
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

# What computes, reads text, images and weights, or writes checkpoints; of accelerators their plugins, as far as they are packages.
PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu", "flax",
    "optax", "chex",
    "orbax-checkpoint", "tensorstore", "grain", "ml_collections", "ml_dtypes", "numpy", "scipy", "transformers",
    "tokenizers", "sentencepiece", "safetensors", "jinja2", "pillow", "pydicom", "pyarrow",
)  # fmt: skip
# Settings of jax, which its environment variables and the command line's own code make, that change the program.
_SETTINGS = ("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl",
             "jax_threefry_partitionable",
             "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion", "jax_disable_jit", "jax_debug_nans")
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_OF_A_HOST = ("dump", "cache")  # in the names of flags of XLA that say where a host writes, and change no program
_TYPED = ("--", "the config key ")  # what a user types, for which the exit status is 2


class StartedOtherwise(UserError):
    """A process has other files, code or packages than process 0; raised in all processes, with one sentence."""


def check_same(make: Callable[[], Mapping[str, object]]) -> None:
    """Compares what the processes have, and ends them together; to be called by all. One process alone does not call `make`.

    Args:
      make: what has to be the same in all: its name, a flag `--NAME` or `the config key NAME` where it is typed -> a value in JSON's
        types.
    Raises:
      UsageError: in all processes, where a flag or a config key is not the same; StartedOtherwise: where something else is not.
    """
    if distributed.process_count() == 1:
        return
    everyone = distributed.gather(json.dumps(dict(make()), default=str).encode())
    found = distributed.from_first(lambda: _difference([_read(each) for each in everyone]))
    if found is not None:
        distributed.end_alike()
        raise (UsageError if found["is_typed"] else StartedOtherwise)(found["sentence"])


def _read(values: bytes) -> dict[str, object]:
    return json.loads(values, parse_constant=str)  # NaN equals NaN then


def _difference(everyone: Sequence[Mapping[str, object]]) -> dict | None:
    """What is not the same in all processes, in a sentence, and whether it was typed; None where all is."""
    first, *others = everyone
    unlike = [k for k, values in enumerate(others, 1) if values != first]
    if not unlike:
        return None
    k, more = unlike[0], len(unlike) - 1
    who = f"process {k} was" if not more else f"process {k} and {more} more of {len(everyone)} were"
    found = changes(first, everyone[k], ("in process 0", f"in process {k}"))
    names = [name for name in {**first, **everyone[k]} if first.get(name) != everyone[k].get(name)]
    return {"is_typed": any(name.startswith(_TYPED) for name in names),
            "sentence": f"{who} started with something else than process 0: {found}; the same in all processes was "
                        "expected"}


def installation() -> dict[str, object]:
    """What this process computes with: versions of Python and packages, this package's code, settings of jax and XLA."""
    import jax  # not above: whoever runs alone needs no jax to call the rest
    return {
        "the version of Python": platform.python_version(),
        **{f"the version of {name}": version(name) for name in PACKAGES},
        "the code of llavamed_jax": f"sha256 {code_sha256()[:12]}",
        **{f"jax's setting {name}": _plain(getattr(jax.config, name, None)) for name in _SETTINGS},
        **compiler_flags(),
    }


def compiler_flags() -> dict[str, str]:
    """The environment variables with flags of XLA, without those that say where a host writes."""
    return {f"the environment variable {name}": _flags(os.environ.get(name, "")) for name in _ENVIRONMENT}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flags(text: str) -> str:
    """The flags that change a program, in one order; of one that is given twice the order counts."""
    return " ".join(sorted((word for word in text.split() if not any(part in word for part in _OF_A_HOST)),
                           key=lambda word: word.partition("=")[0]))
