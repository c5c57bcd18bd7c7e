"""How many rows an update has, of which length, and in how many micro-batches they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llavamed_jax.errors import UsageError

AUTO = "auto"
ROW_LENGTHS = (8192, 4096, 2048)
TOLERANCE = 0.1  # how far the samples of an update may be from batch_size, relative to it
AT_A_TIME = 16384  # positions of a device's micro-batch, at most, if their number is chosen
_FEW = range(1, 5)  # rows of a device and micro-batch that are tried with a length of their own
_SPARE = 1.1  # positions of a sample that a longer row may cost, relative to the fullest rows
_CORRECTIONS = 5  # of a length of its own, at most: its rows hold fewer samples than without empty ends


@dataclass(frozen=True)
class Update:
    """The rows of an update of about `batch_size` samples.

    Attributes:
      row_length: positions of a row.
      rows: number of rows.
      micro_batches: parts in which the rows are computed.
      samples: the samples that the rows hold.
      is_close: whether `samples` is `batch_size` to a tenth.
    """

    row_length: int
    rows: int
    micro_batches: int
    samples: float
    is_close: bool


def rows_an_update(batch_size: int, mean_length: float, shards: int, micro_batches: int | str = 1, row_length: int = 0,
                   longest: int = 0, samples_a_row: Callable[[int], float] | None = None) -> Update:
    """Returns the rows of an update.

    Their number is the multiple of shards x micro-batches, at least one, nearest to what `batch_size` samples fill.

    Args:
      batch_size: samples of an update.
      mean_length: mean number of tokens of a sample.
      shards: data x fsdp, the devices that share the rows evenly.
      micro_batches: parts in which the rows are computed; AUTO as `parts_of` chooses them.
      row_length: positions of a row; 0 takes the longest of `ROW_LENGTHS` with which an update has `batch_size` samples
        to a tenth, or else the length that makes it so. Rows that leave so much empty that a sample costs a tenth more
        positions than in the fullest of these rows are passed over.
      longest: tokens of the longest sample, which must fit a row.
      samples_a_row: returns the mean number of samples in a row of a length, as `trial.Trial.samples_a_row` counts it;
        None takes rows as full, where only the mean length is known.

    Returns:
      The rows; those nearest to `batch_size` if no length makes it so.

    Raises:
      UsageError: the longest sample does not fit the row length.
    """
    if row_length and row_length < longest:
        raise UsageError(f"the config key 'data.row_length' is {row_length}, but the longest sample has {longest} "
                         f"tokens; at least {longest}, or 0, was expected")
    multiple = shards if micro_batches == AUTO else shards * micro_batches
    held = samples_a_row or (lambda length: length / mean_length)

    def of(length: int) -> Update:
        rows = max(1, int(batch_size / held(length) / multiple + 0.5)) * multiple
        samples = rows * held(length)
        parts = parts_of(rows // shards, length) if micro_batches == AUTO else micro_batches
        return Update(length, rows, parts, samples, abs(samples - batch_size) <= TOLERANCE * batch_size)

    def of_its_own(rows: int) -> Update:
        """Returns rows of a length of their own, of which `rows` a device and micro-batch make `batch_size`."""
        wanted = batch_size / (multiple * rows)
        low, high, tried = shortest, 0, [max(shortest, _rounded(wanted * mean_length))]
        is_off = lambda length: abs(held(length) / wanted - 1)
        for _ in range(_CORRECTIONS if samples_a_row else 0):
            length = tried[-1]
            if length > most or is_off(length) <= TOLERANCE / 2:
                break
            low, high = (length, high) if held(length) < wanted else (low, length)
            tried.append(_rounded((low + high) / 2 if high else length * wanted / held(length)))
            if tried[-1] in tried[:-1]:
                break
        return of(min((length for length in tried if length <= most), key=is_off, default=most))

    if row_length:
        return of(row_length)
    shortest = _rounded(longest)
    most = max(ROW_LENGTHS[0], shortest)
    cost = lambda each: each.rows * each.row_length / each.samples
    made = []
    for candidate in (*(partial(of, length) for length in ROW_LENGTHS if length >= longest),
                      *(partial(of_its_own, rows) for rows in _FEW), partial(of, shortest)):
        made.append(candidate())
        if made[-1].is_close and cost(made[-1]) <= _SPARE * mean_length:  # no row can be much fuller
            break
    close = [each for each in made if each.is_close]
    if close:
        return next(each for each in close if cost(each) <= _SPARE * min(map(cost, close)))
    return min(made, key=lambda each: abs(each.samples - batch_size))


def parts_of(rows: int, row_length: int) -> int:
    """Returns the fewest micro-batches of a device's rows that have at most `AT_A_TIME` positions, or a row each."""
    return next(parts for parts in range(1, rows + 1)
                if rows % parts == 0 and (rows // parts * row_length <= AT_A_TIME or parts == rows))


def _rounded(length: float) -> int:
    """Rounds a length of rows up to a multiple of 128, of 16 below 1,024."""
    step = 128 if length > 1024 else 16
    return max(step, -int(-length // step) * step)
