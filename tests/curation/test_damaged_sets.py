"""`curation figures` on published sets with damage: what is sound is kept, and what is not is counted with a reason."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

from llavamed_jax.curation.__main__ import main
from tests.support.pmc_bucket import picture

pytest.importorskip("lxml")


def figures(source: Path, *flags: str) -> tuple[dict[str, dict], list[tuple[str, str]]]:
    """Returns the records by their pair_id, and name and reason of what is dropped."""
    out = source.parent / f"{source.name}-out"
    assert main(["figures", "--source", str(source), "--out", str(out), *flags]) == 0
    rows = lambda name: [json.loads(line) for line in (out / name).read_text().splitlines()]
    return ({row["pair_id"]: row for row in rows("figures.jsonl")},
            [(each["figure"].removeprefix(f"{source}/"), each["reason"]) for each in rows("dropped.jsonl")])


def tar(names: str, pax: dict | None = None) -> bytes:
    """Returns a shard with a sample of three files for each letter."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            for suffix, data in (("jpg", picture(ord(name))), ("json", b'{"license": "CC BY"}'), ("txt", f"Caption {name}.".encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size, info.pax_headers = len(data), pax or {}
                archive.addfile(info, io.BytesIO(data))
    return made.getvalue()


WHOLE = tar("abcd")
START = {name: WHOLE.index(name.encode()) for name in ("c.jpg", "c.json", "c.txt", "d.jpg", "d.txt")}
END = (START["d.txt"] // 512 + 2) * 512


def flipped(name: str) -> bytes:
    at = START[name] + 100
    return WHOLE[:at] + bytes([WHOLE[at] ^ 1]) + WHOLE[at + 1:]


def zeroed(data: bytes, start: int, end: int) -> bytes:
    return data[:start] + bytes(end - start) + data[end:]


CUT = "sample cut off in a damaged shard"
GZIP = gzip.compress(WHOLE)


@pytest.mark.parametrize(("data", "kept", "reasons", "place"), [
    (WHOLE, "abcd", [], None), (WHOLE[:END + 1024], "abcd", [], None), (GZIP, "abcd", [], None),
    (bz2.compress(WHOLE), "abcd", [], None), (lzma.compress(WHOLE), "abcd", [], None),
    (flipped("c.jpg"), "ab", ["ReadError"], "c.jpg"), (flipped("c.txt"), "ab", [CUT, "ReadError"], "c.txt"),
    (WHOLE[:START["c.jpg"]], "ab", ["no end marker"], "c.jpg"), (WHOLE[:START["c.json"]], "ab", [CUT, "no end marker"], "c.json"),
    (WHOLE[:START["c.jpg"] + 100], "ab", ["ReadError"], "c.jpg"), (WHOLE[:START["c.jpg"] + 700], "ab", ["ReadError"], START["c.jpg"] + 700),
    (WHOLE[:END], "abcd", ["no end marker"], END), (WHOLE[:END + 512], "abcd", ["no end marker"], END),
    (zeroed(WHOLE, START["d.jpg"], START["d.jpg"] + 1024), "abc", ["data after its end"], "d.jpg"),
    (WHOLE[:END] + bytes(512) + tar("e"), "abcd", ["data after its end"], END),
    (zeroed(GZIP, len(GZIP) // 2, len(GZIP) // 2 + 50), None, None, None),
    (GZIP[:-8] + bytes(4) + GZIP[-4:], "abcd", ["BadGzipFile"], END), (GZIP[:-8], "abcd", ["EOFError"], END),
    (tar("e", {"GNU.sparse.map": "x,y"}), "", ["ValueError"], 0), (tar("e", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), "", None, None),
    (tar("e", {"size": "-5"}), "", None, None), (b"", "", ["ReadError"], 0), (b"x" * 700, "", ["ReadError"], 0), (bytes(10240), "", ["shard without a sample"], None),
])
def test_a_damaged_shard_is_counted_and_what_stands_before_the_damage_is_kept(tmp_path, data, kept, reasons, place):
    """`place` is the byte where reading ends."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b/0.tar").write_bytes(data)
    (tmp_path / "b/1.tar").write_bytes(tar("z"))
    found, dropped = figures(tmp_path / "b")
    assert found.keys() >= {"z"} and all(row["licence"] == "CC BY" and row["fig_caption"] == f"Caption {name}." for name, row in found.items())
    if kept is not None:
        assert set(found) == {*kept, "z"}
    if reasons is not None:
        assert [reason.removeprefix("damaged shard: ") for _, reason in dropped] == reasons
    assert bool(dropped) == (reasons != [])
    if place is not None:
        assert dropped[-1][0] == f"0.tar byte {START.get(place, place)}"
