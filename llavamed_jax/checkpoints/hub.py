"""Fetches models by name, `owner/name[@revision]`, through huggingface_hub and its cache.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE.

Only the needed files are fetched: configs, tokenizer and processor files and the model card, then the weights in one
format.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from llavamed_jax.checkpoints.torch.files import (
    ADAPTER_CONFIG,
    ADAPTER_OTHERS,
    ADAPTER_WEIGHTS,
    PATTERNS,
    WHOLE,
    shards,
)
from llavamed_jax.errors import UsageError, UserError, cut, exists
from llavamed_jax.utils import terminal
from llavamed_jax.utils.paths import check, is_bucket

_TEXT = ["*.json", "*.jinja", "*.model", "README.md", "LICENSE*", "llavamed_jax/*"]


def local(path: str | Path, weights: bool = True, may_be_bucket: bool = False) -> Path:
    """Returns the directory of a checkpoint; fetches it if `path` is a model's name on a hub, or in a bucket.

    Args:
      path: a directory, `owner/name[@revision]`, or, if `may_be_bucket`, `gs://BUCKET/KEY` or `s3://BUCKET/KEY`.
      weights: False fetches only configs, tokenizer and processor files.
      may_be_bucket: whether `path` may be the address of this project's own tree in a bucket.

    Raises:
      UserError: the name is not a directory here, and the hub does not give it; the reason is named.
    """
    check("the path", path, may_be_bucket)
    if is_bucket(path):
        from llavamed_jax.checkpoints.tree import bucket_copy  # imports jax, which a processor does without otherwise
        return bucket_copy.local(path, weights)
    if not exists(path) and is_hub_name(path):
        return _fetch(str(path), weights)
    try:
        Path(path).stat()
    except FileNotFoundError:
        pass  # the caller says what was expected when it opens the path
    except (OSError, ValueError) as error:
        raise UsageError(f"{cut(str(path))!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    return Path(path)


def is_hub_name(path: str | Path) -> bool:
    """Returns whether a path has the form of a model's name on a hub, `owner/name[@revision]`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(path)) is not None


@functools.cache  # a command opens config, processor and weights one after another
def _fetch(path: str, weights: bool) -> Path:
    name, _, revision = path.partition("@")
    directory = _snapshot(path, name, revision or None, _TEXT)
    if weights:
        # By commit, so that the weights belong to the config that was just read.
        is_adapter = (directory / ADAPTER_CONFIG).is_file()
        directory = (_fetch_adapter if is_adapter else _fetch_weights)(path, name, directory)
    _print_licence(path, directory)
    return directory


def _fetch_weights(path: str, name: str, directory: Path) -> Path:
    """Fetches the files that `read_weights` reads, and no others: one format, of an index its files."""
    for whole in WHOLE:
        directory = _snapshot(path, name, directory.name, [whole])
        if (directory / whole).is_file():
            return directory
        if (index := directory / f"{whole}.index.json").is_file():
            return _snapshot(path, name, directory.name, shards(index))
    for pattern in PATTERNS:
        index = next(iter(sorted(directory.glob(f"{pattern}.index.json"))), None)
        directory = _snapshot(path, name, directory.name, [pattern] if index is None else shards(index))
        if any(directory.glob(pattern)):
            break
    return directory


def _fetch_adapter(path: str, name: str, directory: Path) -> Path:
    """Fetches the factors of an adapter, and the whole tensors that LLaVA writes beside them."""
    for file in ADAPTER_WEIGHTS:
        directory = _snapshot(path, name, directory.name, [file, ADAPTER_OTHERS])
        if (directory / file).is_file():
            break
    return directory


def _snapshot(path: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # imported here, since it takes half a second and most paths are directories
    log = logging.getLogger("huggingface_hub")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it warns of patterns without a match, which is normal for one of two formats
        with asking(path):
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def asking(path: str) -> Iterator[None]:
    """Re-raises errors of huggingface_hub inside the block as UserError with one sentence about `path`."""
    from huggingface_hub import constants, errors
    unknown, where = f"{path} is not a directory here, and the hub model of this name", constants.ENDPOINT
    if constants.HF_HUB_CACHE.startswith("~"):  # without a home, `~` would be a directory name where the user works
        raise UserError(f"{unknown} cannot be cached, because this user has no home directory; set HF_HOME to a "
                        "directory")
    unreached = f"{unknown} is not in the cache of hub models (%s); give a checkpoint's directory"
    try:
        yield
    except errors.RevisionNotFoundError:
        raise UserError(f"{unknown} has no revision {path.partition('@')[2]!r} on {where}") from None
    except errors.GatedRepoError:
        raise UserError(f"{unknown} is gated on {where}: accept its terms there and log in with `hf auth "
                        "login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{unknown} does not exist on {where} or is private") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(unreached % (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{where} cannot be reached")) from None
    except (errors.HTTPError, OSError) as error:  # HTTPError is that of huggingface_hub's HTTP client
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            raise UserError(unreached % f"{where} cannot be reached") from None
        if getattr(error, "filename", None):
            raise UserError(f"{unknown} cannot be cached in {constants.HF_HUB_CACHE} "
                            f"({error.filename}: {error.strerror}); set HF_HOME to another directory") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"status {status}" if status else getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{unknown} could not be fetched from {where} ({reason}); the files fetched so far are kept "
                        "for the next try") from None


@functools.cache
def _print_licence(path: str, directory: Path) -> None:
    """Prints the licence that the model card states on stderr, since it binds the user of the weights."""
    from huggingface_hub import ModelCard
    try:
        licence = ModelCard.load(directory / "README.md").data.to_dict().get("license")
    except (OSError, ValueError):  # no card, or a card with an invalid header
        licence = None
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    commit = directory.name[:12]
    said = f"{path} (commit {commit}): licence {licence or 'not stated by its model card'}"
    print(terminal.sentence(said), file=sys.stderr)
