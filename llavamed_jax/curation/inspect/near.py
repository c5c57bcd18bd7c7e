"""Finds images that show the same picture, within a set and between two sets.

Two images show the same if their hashes differ in at most `MOST_BITS` bits and their thumbnails correlate with at least
`LEAST_CORRELATION`. Copies that were cropped, mirrored, turned, or drawn upon are not found. Images of almost one grey
value have no picture to compare; they are equal only if their files are.

Letters: N images of a set, M of another, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llavamed_jax.curation.inspect.pictures import Pictures

MOST_BITS = 15
LEAST_CORRELATION = 0.99
_BANDS = 16  # two hashes that differ in 15 bits or fewer are equal in one of 16 bands
_MOST_NEIGHBOURS = 200  # images of a band's value with which each is compared
_LEAST_DEVIATION = 2.0  # grey values; below it an image is blank


@dataclass(frozen=True)
class Groups:
    """Images of one set that show the same.

    Attributes:
      groups: the numbers of the images of each group, largest group first.
      same_file: how many images are not the first of their group with these very bytes.
      num_blank: number of blank images.
      num_uncompared: number of images in bands so full that not all of their pairs were compared.
    """

    groups: list[list[int]]
    same_file: int
    num_blank: int
    num_uncompared: int

    @property
    def num_surplus(self) -> int:
        """Number of images that could be left out: all but one of each group."""
        return sum(map(len, self.groups)) - len(self.groups)


def groups(pictures: Pictures) -> Groups:
    """Groups the images of a set that show the same; groups are joined along chains."""
    readable = pictures.readable
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(first: int, second: int) -> None:
        parent[root(int(second))] = root(int(first))

    firsts: dict[bytes, int] = {}
    for i in readable:
        join(firsts.setdefault(pictures.files[i].tobytes(), i), i)
    same_file = len(readable) - len(firsts)
    different = np.fromiter(firsts.values(), np.int64, len(firsts))
    shown = different[~_blank(pictures, different)]
    edges, num_uncompared = _edges(pictures, shown)
    for first, second in edges:
        join(first, second)
    found: dict[int, list[int]] = {}
    for i in map(int, readable):
        found.setdefault(root(i), []).append(i)
    several = sorted((group for group in found.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))
    return Groups(several, same_file, int(_blank(pictures, readable).sum()), num_uncompared)


def _edges(pictures: Pictures, numbers: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns pairs of images that show the same, int64 [E,2], and how many images were not compared with all others.

    The images are sorted by one band of their hashes after the other, and each is compared with those after it that
    have the same value.
    """
    hashes, found = pictures.hashes[numbers], []
    bands = hashes.view(np.uint16).reshape(len(numbers), _BANDS)
    uncompared = np.zeros(len(numbers), bool)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        values = bands[order, band]
        here = np.arange(len(order))
        for shift in range(1, len(order)):
            here = here[here + shift < len(order)]
            here = here[values[here] == values[here + shift]]
            if not len(here):
                break
            if shift > _MOST_NEIGHBOURS:
                uncompared[order[here]] = True
                break
            first, second = order[here], order[here + shift]
            near = _bits(hashes[first], hashes[second]) <= MOST_BITS
            found.append(np.stack([first[near], second[near]], 1))
    pairs = np.unique(np.sort(np.concatenate(found), 1), axis=0) if found else np.zeros((0, 2), np.int64)
    pairs = numbers[pairs]
    is_same = _correlations(pictures, pairs[:, 0], pictures, pairs[:, 1]) >= LEAST_CORRELATION
    return pairs[is_same], int(uncompared.sum())


def matches(tested: Pictures, others: Pictures) -> dict[int, list[tuple[int, int, float]]]:
    """Finds the images of another set that show the same as the images of a tested set.

    Args:
      tested: M images.
      others: N images.

    Returns:
      Number of a tested image -> for each image that shows the same: its number, the number of other bits, and the
      correlation, the closest first. Equal files have 0 other bits and a correlation of 1.
    """
    there = others.readable
    found: dict[int, list[tuple[int, int, float]]] = {}
    by_file: dict[bytes, list[int]] = {}
    for j in map(int, there):
        by_file.setdefault(others.files[j].tobytes(), []).append(j)
    is_blank = _blank(tested, np.arange(len(tested)))
    shown = there[~_blank(others, there)]
    for i in map(int, tested.readable):
        same = by_file.get(tested.files[i].tobytes(), [])
        here = [(j, 0, 1.0) for j in same]
        if not is_blank[i] and len(shown):
            bits = _bits(others.hashes[shown], tested.hashes[i])
            near = bits <= MOST_BITS
            alike = _correlations(others, shown[near], tested, np.full(near.sum(), i))
            here += [(int(j), int(count), float(value)) for j, count, value in zip(shown[near], bits[near], alike)
                     if value >= LEAST_CORRELATION and j not in same]
        if here:
            found[i] = sorted(here, key=lambda match: (match[1], -match[2]))
    return found


def _bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the number of bits in which hashes differ: uint64 [N,4] and [N,4] or [4] -> int64 [N]."""
    return np.bitwise_count(first ^ second).sum(-1, dtype=np.int64)


def _blank(pictures: Pictures, numbers: np.ndarray) -> np.ndarray:
    """Returns which images have almost one grey value, bool [N]."""
    return np.array([pictures.thumbnails[i].std() < _LEAST_DEVIATION for i in numbers], bool)


def _correlations(first: Pictures, i: np.ndarray, second: Pictures, j: np.ndarray) -> np.ndarray:
    """Returns the correlation of the thumbnails of each pair, float64 [E]."""
    result, step = np.zeros(len(i)), 4096
    for at in range(0, len(i), step):
        a, b = (each.thumbnails[numbers[at:at + step]].reshape(-1, first.thumbnails[0].size).astype(np.float64)
                for each, numbers in ((first, i), (second, j)))
        a, b = (each - each.mean(1, keepdims=True) for each in (a, b))
        result[at:at + step] = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return result
