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


def tar(names: str, pax: dict | None = None, caption: bytes = b"Caption %s.") -> bytes:
    """Returns a shard with a sample of three files for each letter."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            for suffix, data in (("jpg", picture(ord(name))), ("json", b'{"license": "CC BY"}'), ("txt", caption.replace(b"%s", name.encode()))):
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


@pytest.fixture
def rocov2(tmp_path):
    """Returns a function that runs the command on six images, with captions and licences as given."""
    (tmp_path / "r/train_images").mkdir(parents=True)
    for number in range(6):
        (tmp_path / f"r/train_images/R{number}.jpg").write_bytes(picture(number))

    def made(captions: str | bytes, licences: str | bytes = "ID,License\nR0,CC BY\n", *flags: str):
        for name, text in (("train_captions.csv", captions), ("license_information.csv", licences)):
            (tmp_path / "r" / name).write_bytes(text.encode() if isinstance(text, str) else text)
        found, dropped = figures(tmp_path / "r", *flags)
        return ({name.removeprefix("R"): (row["fig_caption"], row["licence"]) for name, row in found.items()},
                [(name.replace("train_captions.csv line ", "line "), reason) for name, reason in dropped])

    return made


ROWS = [f"R{number},caption {number}\n" for number in range(6)]
DAMAGED, INSIDE, BYTES = "damaged row", "row inside an unclosed quote", "row that is not UTF-8 text"


@pytest.mark.parametrize(("captions", "kept", "dropped"), [
    (["ID,Caption\n", *ROWS], "012345", []), (ROWS, "012345", []), (["\ufeffID,Caption\r\n", "\r\n", *ROWS], "012345", []),
    (["\ufeff", *ROWS], "012345", []), (["R9,no image\n", *ROWS], "012345", [("R9", "no image file")]),
    (["ID,Caption\n", ROWS[0], 'R1,"open\n', *ROWS[2:]], "02345", [("line 3", DAMAGED)]),
    (["ID,Caption\n", ROWS[0], 'R1,"open\n', ROWS[2], 'R3,"caption 3"\n', *ROWS[4:]], "02345", [("line 3", DAMAGED)]),
    (["ID,Caption\n", 'R0,"caption 0"\n', 'R1,"a "stray" one"\n', *ROWS[2:]], "02345", [("line 3", DAMAGED)]),
    (["ID,Caption\n", ROWS[0], 'R1,"two lines,\nof which one, the second, has a "stray" quote"\n', *ROWS[2:]], "02345",
     [("line 3", DAMAGED), ("line 4", INSIDE)]),
    (["ID,Caption\n", ROWS[0], 'R1,"open\n', 'R2,"open\n', *ROWS[3:]], "0345", [("line 3", DAMAGED), ("line 4", DAMAGED)]),
    (['ID,"Caption\n', *ROWS], "012345", [("line 1", DAMAGED)]),
])
def test_a_damaged_row_of_captions_costs_no_other(rocov2, captions, kept, dropped):
    found, refused = rocov2("".join(captions))
    assert {name: caption for name, (caption, _) in found.items()} == {name: f"caption {name}" for name in kept}
    assert refused == dropped


def test_rows_that_an_unclosed_quote_may_hold_are_refused_where_no_image_proves_them(rocov2, tmp_path):
    for number in range(6):
        (tmp_path / f"r/train_images/R{number}.jpg").unlink()
    found, refused = rocov2("".join([*ROWS[:2], 'R2,"open\n', *ROWS[3:]]), "", "--without_images")
    assert set(found) == {"0", "1"} and refused == [("line 3", DAMAGED), *((f"line {line}", INSIDE) for line in (4, 5, 6))]


def test_a_damaged_row_of_licences_costs_no_other(rocov2):
    found, refused = rocov2("".join(ROWS), 'ID,License\nR0,CC BY\nR1,"CC BY\nR2,CC0\nR3\nR4,CC BY\nR5,\u00b5'.encode("latin-1"))
    assert [licence for _, licence in found.values()] == ["CC BY", "unknown", "CC0", "unknown", "CC BY", "unknown"]
    assert refused == [(f"license_information.csv line {line}", reason) for line, reason in ((3, DAMAGED), (5, DAMAGED), (7, BYTES))]


@pytest.mark.parametrize(("captions", "kept", "lines"), [
    ("R0,R\u00f6ntgen\nR1,CT\n".encode("latin-1"), "1", [1]), ("ID,Caption\nR0,R\u00f6ntgen\nR1,CT\n".encode("utf-16"), "", [1, 2, 3]),
])
def test_captions_that_are_not_utf8_are_refused(rocov2, captions, kept, lines):
    found, refused = rocov2(captions)
    assert set(found) == set(kept) and [each for each in refused if each[1] == BYTES] == [(f"line {line}", BYTES) for line in lines]


def test_a_caption_of_a_shard_or_of_medicat_that_is_not_utf8_is_refused(tmp_path):
    for name in "bm":
        (tmp_path / name).mkdir()
    (tmp_path / "b/0.tar").write_bytes(tar("a", caption="R\u00f6ntgen".encode("latin-1")))
    (tmp_path / "b/1.tar").write_bytes(tar("b", caption="R\u00f6ntgen".encode()))
    found, dropped = figures(tmp_path / "b")
    assert {name: row["fig_caption"] for name, row in found.items()} == {"b": "R\u00f6ntgen"} and dropped == [("0.tar a", "caption that is not UTF-8 text")]
    row = lambda name: json.dumps({"pdf_hash": "x", "fig_uri": f"{name}.png", "s2_caption": "R\u00f6ntgen"}, ensure_ascii=False) + "\n"
    for name in "12":
        (tmp_path / f"m/x_{name}.png").write_bytes(picture(1, "PNG"))
    (tmp_path / "m/a.jsonl").write_bytes(row("1").encode("latin-1") + row("2").encode())
    found, dropped = figures(tmp_path / "m")
    assert {name: row["fig_caption"] for name, row in found.items()} == {"x_2": "R\u00f6ntgen"} and dropped == [("a.jsonl line 1", "line that is not UTF-8 text")]
