"""How many rows an update has, of which length, and in how many micro-batches they are computed."""

from __future__ import annotations

from dataclasses import dataclass

from llavamed_jax.errors import UsageError

AUTO = "auto"
ROW_LENGTHS = (8192, 4096, 2048)
TOLERANCE = 0.1  # how far the samples of an update may be from batch_size, relative to it
AT_A_TIME = 16384  # positions of a device's micro-batch, at most, if their number is chosen
_FEW = range(1, 5)  # rows of a device and micro-batch that are tried with a length of their own


@dataclass(frozen=True)
class Update:
    """The rows of an update of about `batch_size` samples.

    Attributes:
      row_length: positions of a row.
      rows: number of rows.
      micro_batches: parts in which the rows are computed.
      samples: the samples that the rows would hold without padding.
      is_close: whether `samples` is `batch_size` to a tenth.
    """

    row_length: int
    rows: int
    micro_batches: int
    samples: float
    is_close: bool


def rows_an_update(batch_size: int, mean_length: float, shards: int, micro_batches: int | str = 1, row_length: int = 0,
                   longest: int = 0) -> Update:
    """Returns the rows of an update.

    Their number is the multiple of shards x micro-batches, at least one, nearest to what `batch_size` samples of the
    mean length fill.

    Args:
      batch_size: samples of an update.
      mean_length: mean number of tokens of a sample.
      shards: data x fsdp, the devices that share the rows evenly.
      micro_batches: parts in which the rows are computed; AUTO as `parts_of` chooses them.
      row_length: positions of a row; 0 takes the longest of `ROW_LENGTHS` with which an update has `batch_size` samples
        to a tenth, or else the length that makes it so.
      longest: tokens of the longest sample, which must fit a row.

    Returns:
      The rows; those nearest to `batch_size` if no length makes it so.

    Raises:
      UsageError: the longest sample does not fit the row length.
    """
    if row_length and row_length < longest:
        raise UsageError(f"the config key 'data.row_length' is {row_length}, but the longest sample has {longest} "
                         f"tokens; at least {longest}, or 0, was expected")
    multiple = shards if micro_batches == AUTO else shards * micro_batches

    def of(length: int) -> Update:
        rows = max(1, int(batch_size * mean_length / length / multiple + 0.5)) * multiple
        samples = rows * length / mean_length
        parts = parts_of(rows // shards, length) if micro_batches == AUTO else micro_batches
        return Update(length, rows, parts, samples, abs(samples - batch_size) <= TOLERANCE * batch_size)

    if row_length:
        return of(row_length)
    shortest = _rounded(longest)
    usual = [of(length) for length in ROW_LENGTHS if length >= longest]
    exact = [of(max(shortest, _rounded(batch_size * mean_length / (multiple * rows)))) for rows in _FEW]
    exact = [each for each in exact if each.row_length <= max(ROW_LENGTHS[0], shortest)]
    return next((each for each in [*usual, *exact] if each.is_close), min(
        [*usual, *exact, of(shortest)], key=lambda each: abs(each.samples - batch_size)))


def parts_of(rows: int, row_length: int) -> int:
    """Returns the fewest micro-batches of a device's rows that have at most `AT_A_TIME` positions, or a row each."""
    return next(parts for parts in range(1, rows + 1)
                if rows % parts == 0 and (rows // parts * row_length <= AT_A_TIME or parts == rows))


def _rounded(length: float) -> int:
    """Rounds a length of rows up to a multiple of 128, of 16 below 1,024."""
    step = 128 if length > 1024 else 16
    return max(step, -int(-length // step) * step)
