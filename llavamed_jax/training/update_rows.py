"""Settles the rows of an update, for a run with what it measured of its data, and for preflight without data."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UsageError, count_of
from llavamed_jax.parallel.mesh import batch_shards
from llavamed_jax.pipeline import sizes


def update_of(cfg: ConfigDict, mesh: Mesh, config: LlavaConfig, mean_length: float = 0.0, longest: int | None = None,
              samples_a_row: Callable[[int], float] | None = None) -> sizes.Update:
    """Returns the rows of an update, by which a run and preflight take or refuse a mesh.

    Args:
      cfg: the recipe.
      mesh: the devices.
      config: the model's shapes.
      mean_length: mean number of tokens of a sample; not used where samples are not packed.
      longest: tokens of the longest sample. None if no data was read: then rows hold `max_length` tokens, if such rows
        make the batch, and else as many as make it, because the data may have no sample that long.
      samples_a_row: as for `packed`.

    Raises:
      UsageError: as `packed` and `unpacked`; without `longest`, only if no data of this mean length would be taken.
    """
    if not cfg.data.packing:
        return unpacked(cfg, batch_shards(mesh))
    if longest is None:
        is_close = lambda longest: _rows(cfg, batch_shards(mesh), mean_length, longest).is_close
        is_believed = cfg.data.row_length or not is_close(cfg.max_length) and is_close(mean_length)
        longest = mean_length if is_believed else cfg.max_length
    return packed(cfg, mesh, config, mean_length, longest, samples_a_row)


def _rows(cfg: ConfigDict, shards: int, mean_length: float, longest: float,
          samples_a_row: Callable[[int], float] | None = None, **changes) -> sizes.Update:
    """Returns `sizes.rows_an_update` of a recipe, with other values for some of its arguments."""
    known = dict(micro_batches=cfg.micro_batches, row_length=cfg.data.row_length) | changes
    return sizes.rows_an_update(cfg.batch_size, mean_length, shards, longest=longest, samples_a_row=samples_a_row,
                                **known)


def unpacked(cfg: ConfigDict, shards: int) -> sizes.Update:
    """Returns the rows of an update of one sample a row.

    Raises:
      UsageError: they cannot be sharded evenly. Packed rows adapt their number.
    """
    is_chosen = cfg.micro_batches == sizes.AUTO
    multiple = shards * (1 if is_chosen else cfg.micro_batches)
    if cfg.batch_size % multiple:
        said = "" if is_chosen else f" x micro_batches {cfg.micro_batches}"
        raise UsageError(f"the config key 'batch_size' is {cfg.batch_size}; a multiple of {multiple} was expected "
                         f"(data x fsdp of the mesh{said})")
    parts = sizes.parts_of(cfg.batch_size // shards, cfg.max_length) if is_chosen else cfg.micro_batches
    return sizes.Update(cfg.max_length, cfg.batch_size, parts, cfg.batch_size, True)


def packed(cfg: ConfigDict, mesh: Mesh, config: LlavaConfig, mean_length: float, longest: float,
           samples_a_row: Callable[[int], float] | None = None) -> sizes.Update:
    """Returns the packed rows of an update of `batch_size` samples.

    Args:
      cfg: the recipe.
      mesh: the devices.
      config: the model's shapes.
      mean_length: mean number of tokens of a sample.
      longest: tokens of the longest sample.
      samples_a_row: returns how many samples a row of a length holds; None takes rows as full.

    Raises:
      UsageError: updates would have another number of samples, by more than a tenth, and `batch_size_may_grow` is off;
        or the longest sample does not fit `data.row_length`.
    """
    shards = batch_shards(mesh)

    def update(shards=shards, **changes):
        return _rows(cfg, shards, mean_length, longest, samples_a_row, **changes)

    made = update()
    if made.is_close or cfg.batch_size_may_grow:
        return made
    ways = []
    if cfg.micro_batches not in (1, sizes.AUTO) and update(micro_batches=sizes.AUTO).is_close:
        ways.append("micro_batches=auto")
    if cfg.data.row_length and update(row_length=0).is_close:
        ways.append("data.row_length=0")
    tp = mesh.shape["tp"]
    splits = (2**i for i in range(1, 8) if shards % 2**i == 0 and config.decoder.num_kv_heads % (tp * 2**i) == 0)
    if (split := next((each for each in splits if update(shards=shards // each).is_close), None)) is not None:
        ways.append(f"mesh.tp={tp * split}")
    ways.append(f"batch_size={round(made.samples)}")
    fewer = (shards >> i for i in range(1, shards.bit_length()))
    if (number := next((each for each in fewer if update(shards=each).is_close), None)) is not None:
        ways.append(count_of(number * tp, "device"))
    raise UsageError(f"the config key 'batch_size' is {cfg.batch_size}, but {made.rows} packed rows of "
                     f"{made.row_length} tokens on {count_of(mesh.size, 'device')} (data x fsdp is {shards}) make "
                     f"updates of about {made.samples:.0f} samples; {', '.join(ways[:-1])}{' or ' if ways[1:] else ''}"
                     f"{ways[-1]} was expected, or batch_size_may_grow=true to train with what the rows hold")


def check_positions(cfg: ConfigDict, config: LlavaConfig) -> None:
    """Raises UsageError if samples may be longer than the decoder's positions."""
    most = config.decoder.max_positions
    if cfg.max_length > most:
        raise UsageError(f"the config key 'max_length' is {cfg.max_length}; at most {most} was expected, the number of "
                         "positions of the decoder")
