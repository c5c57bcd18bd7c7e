"""Models by name: `owner/name[@revision]`, fetched and cached by huggingface_hub (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE).

Only what is needed is fetched: configs, tokenizer and processor files and the model card, then the weights in one format.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from llavamed_jax.checkpoints.torch.files import weight_map
from llavamed_jax.errors import UsageError, UserError, cut, exists
from llavamed_jax.utils import terminal
from llavamed_jax.utils.paths import check

_TEXT = ["*.json", "*.jinja", "*.model", "README.md", "LICENSE*", "llavamed_jax/*"]


def local(path: str | Path, weights: bool = True) -> Path:
    """A directory as it is; a model's name on a hub as the directory that it was fetched into.

    Args:
      weights: False fetches configs, tokenizer and processor files alone.

    Raises:
      UserError: a name that is no directory here and that the hub does not give, with the reason.
    """
    check("the path", path)
    if not exists(path) and is_hub_name(path):
        return _fetch(str(path), weights)
    try:
        Path(path).stat()
    except FileNotFoundError:
        pass  # whoever opens it says what was expected
    except (OSError, ValueError) as error:
        raise UsageError(f"{cut(str(path))!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    return Path(path)


def is_hub_name(path: str | Path) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", str(path)) is not None


@functools.cache  # a command opens config, processor and weights one after another
def _fetch(path: str, weights: bool) -> Path:
    name, _, revision = path.partition("@")
    directory = _snapshot(path, name, revision or None, _TEXT)
    if weights and not (directory / "adapter_config.json").is_file():  # which is refused without its weights, too
        # By the commit, so that the weights are those of the config that was just read.
        directory = _fetch_weights(path, name, directory)
    _print_licence(path, directory)
    return directory


def _fetch_weights(path: str, name: str, directory: Path) -> Path:
    """safetensors before pickles, and of files that an index lists those alone, as `torch_files.read_weights` takes them."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        index = next(iter(sorted(directory.glob(f"{pattern}.index.json"))), None)
        directory = _snapshot(path, name, directory.name, [pattern] if index is None else sorted(set(weight_map(index).values())))
        if any(directory.glob(pattern)):
            break
    return directory


def _snapshot(path: str, name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub  # takes half a second to import, and most paths are directories
    log = logging.getLogger("huggingface_hub")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it warns of patterns that match nothing, of which one of two formats always is
        with asking(path):
            return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def asking(path: str) -> Iterator[None]:
    """Turns what huggingface_hub raises when it is asked for a model into one sentence about `path`. Raises UserError."""
    from huggingface_hub import constants, errors
    unknown, where = f"{path} is no directory; as a model's name", constants.ENDPOINT
    if constants.HF_HUB_CACHE.startswith("~"):  # it would be a folder of that name where the user works
        raise UserError(f"{unknown} it needs a directory to be kept in, and this user has no home directory; set HF_HOME to one")
    unreached = f"{unknown} it is not in the cache of hub models, and %s; give a checkpoint's directory"
    try:
        yield
    except errors.RevisionNotFoundError:
        raise UserError(f"{unknown} it has no revision {path.partition('@')[2]!r} on {where}") from None
    except errors.GatedRepoError:
        raise UserError(f"{unknown} it is gated on {where}: accept its terms there and log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{unknown} it is not known on {where}, or is private") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(unreached % ("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{where} cannot be reached")) from None
    except (errors.HTTPError, OSError) as error:  # HTTPError: of the client that huggingface_hub has, whichever it is
        if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
            raise UserError(unreached % f"{where} cannot be reached") from None
        if getattr(error, "filename", None):
            raise UserError(f"{unknown} it would be kept in {constants.HF_HUB_CACHE}, which cannot be used ({error.filename}: "
                            f"{error.strerror}); set HF_HOME to another directory") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"status {status}" if status else getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{unknown} it could not be fetched from {where} ({reason}); what came is kept for the next try") from None


@functools.cache
def _print_licence(path: str, directory: Path) -> None:
    """What the model card says, on stderr: whoever uses the weights is bound by it."""
    from huggingface_hub import ModelCard
    try:
        licence = ModelCard.load(directory / "README.md").data.to_dict().get("license")
    except (OSError, ValueError):  # no card, or one whose header is broken
        licence = None
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    commit = directory.name[:12]
    said = f"{path} (commit {commit}): licence {licence or 'not stated by its model card'}"
    print(terminal.sentence(said), file=sys.stderr)
