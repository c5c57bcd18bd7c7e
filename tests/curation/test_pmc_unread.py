"""`curation pmc` while metadata or listings cannot be read, and an inventory that has nothing yet."""

import json
from pathlib import Path

import pytest

from llavamed_jax.curation import downloads
from llavamed_jax.curation.__main__ import main
from tests.support.pmc_bucket import HTML, Bucket, picture

pytest.importorskip("httpx")
pytest.importorskip("lxml")


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF_S", 0.001)
    with Bucket() as server:
        yield server


def lines(path: Path) -> dict[str, dict]:
    return {row["pmcid"]: row for row in map(json.loads, path.read_text().splitlines())}


def fetch(url: str, folder: Path, rows: list[str], *more: str) -> int:
    (folder / "list").write_text("".join(f"{row}\n" for row in rows))
    return main(["pmc", "--list", str(folder / "list"), "--out", str(folder / "out"), "--base_url", url, "--rate", "0",
                 "--concurrency", "1", "--retries", "0", *more])


@pytest.mark.parametrize(("answer", "reason", "is_tried_again"), [
    (500, "server failed", True), (HTML, "web page in its place", True), (b"{torn", "metadata damaged", False)])
@pytest.mark.parametrize("is_address", [False, True])
def test_no_mirror_is_asked_for_an_article_whose_metadata_cannot_be_read(bucket, tmp_path, answer, reason, is_tried_again, is_address):
    """It may be for text mining only, or retracted. What the bucket lacks altogether comes from the mirror as before."""
    bucket.article("PMC1", 1, {"a.jpg": picture(1)})
    bucket.article("PMC2", 1, {}, "TDM")
    bucket.article("PMC3", 1, {"a.jpg": picture(3)}, retracted=True)
    bucket.article("PMC5", 1, {"b.jpg": picture(5)})
    bucket.article("PMC5", 2, {"a.jpg": picture(5)}, retracted=True)  # the older version alone has no such name
    (tmp_path / "mirror").mkdir()
    for n in range(1, 7):
        (tmp_path / f"mirror/PMC{n}").mkdir()
        (tmp_path / f"mirror/PMC{n}/a.jpg").write_bytes(b"no image" if n == 6 else picture(n))
        bucket.objects[f"mirror/PMC{n}/a.jpg"] = b"no image" if n == 6 else picture(n)
    (tmp_path / "second/PMC6").mkdir(parents=True)
    (tmp_path / "second/PMC6/a.jpg").write_bytes(picture(6))
    keys = [f"{place}PMC{each}.json" for each in ("2.1", "3.1", "5.2") for place in ("metadata/", f"PMC{each}/")]
    before = {key: bucket.objects[key] for key in keys}
    if isinstance(answer, int):
        bucket.once = {key: [answer] * 9 for key in keys}
    else:
        bucket.objects |= dict.fromkeys(keys, answer)
    command = [bucket.url, tmp_path, [f"PMC{n}/a.jpg" for n in range(1, 6)], "--mirror",
               bucket.url + "mirror/{pmcid}/{file}" if is_address else str(tmp_path / "mirror")]
    manifest, missing = tmp_path / "out/manifest.jsonl", tmp_path / "out/missing.jsonl"
    assert fetch(*command) == (1 if answer == 500 else 0)
    assert set(lines(manifest)) == {"PMC1", "PMC4"} and lines(manifest)["PMC4"]["licence"] == "unknown"
    assert {pmcid: row["reason"] for pmcid, row in lines(missing).items()} == dict.fromkeys(("PMC2", "PMC3", "PMC5"), reason)
    assert fetch(*command) == (1 if answer == 500 else 0) and set(lines(manifest)) == {"PMC1", "PMC4"}
    if not is_tried_again:  # as earlier versions wrote it
        missing.write_text("".join(json.dumps(row | {"reason": "damaged"}) + "\n" for row in lines(missing).values()))
        assert fetch(*command) == 0 and set(lines(manifest)) == {"PMC1", "PMC4"}
    bucket.objects |= before
    bucket.once = {}
    assert fetch(*command, *([] if is_tried_again else ["--retry_missing"])) == 0
    assert set(lines(manifest)) == {"PMC1", "PMC4"}
    assert {pmcid: row["reason"] for pmcid, row in lines(missing).items()} == {
        "PMC2": "licence without media", "PMC3": "retracted", "PMC5": "retracted"}
    command[2] = ["PMC6/a.jpg"]  # a mirror's damaged file keeps no other mirror from it
    assert fetch(*command) == 0 and lines(missing)["PMC6"]["reason"] == "damaged"
    assert fetch(*command, "--mirror", str(tmp_path / "second")) == 0 and "PMC6" in lines(manifest)


@pytest.mark.parametrize("row", ["PMC{}/a.jpg", "PMC{}.1/a.jpg", "PMC{}"])
def test_an_address_that_is_no_bucket_ends_the_run(bucket, tmp_path, capsys, row):
    for n in (1, 2):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)})
    rows = [row.format(n) for n in range(1, 101)]
    assert fetch(bucket.url + "typo/", tmp_path, rows) == 1
    assert "typo/ answers each of 16 listings with status 404" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert sum(bucket.asked.values()) <= 4 * 16 and not (tmp_path / "out/missing.jsonl").read_text().count("no prefix")
    assert fetch(bucket.url + "typo/", tmp_path, rows[:3]) == 1 and "the server failed for 3 files" in capsys.readouterr().err
    assert fetch(bucket.url, tmp_path, rows[2:] + rows[:2]) == 0  # a bucket that lacks the first 98 articles
    assert set(lines(tmp_path / "out/manifest.jsonl")) == {"PMC1", "PMC2"}
    assert {each["reason"] for each in lines(tmp_path / "out/missing.jsonl").values()} == {"no prefix in the bucket"}


def test_an_inventory_that_has_nothing_yet_is_read_again(bucket, tmp_path, capsys):
    command = ["pmc", "--since", "2026-11-21", "--out", str(tmp_path / "out"), "--rate", "0", "--retries", "0"]
    bucket.inventory("2026-11-20", {"metadata/PMC1.1.json": "2026-11-01T00:00:00.000Z"})
    chosen = tmp_path / "out/selected.txt"
    for _ in range(2):
        assert main([*command, "--base_url", bucket.url]) == 0 and not chosen.exists()
        assert "inventory of 2026-11-20: 0 articles changed" in (said := capsys.readouterr().out) and "nothing is selected" in said
    chosen.write_text("# since 2026-11-21 until None limit None\n")  # as earlier versions wrote it
    for n in (2, 3):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)})
        bucket.inventory(f"2026-11-2{n}", {"metadata/PMC2.1.json": "2026-11-22T00:00:00.000Z", f"metadata/PMC{n}.1.json": f"2026-11-2{n}T00:00:00.000Z"})
        assert main([*command, "--base_url", bucket.url]) == 0 and chosen.read_text().split()[-1:] == ["PMC2"]
    assert "selected.txt: 1 article; remove the file to choose anew" in capsys.readouterr().out
    chosen.unlink()
    assert main([*command, "--base_url", bucket.url]) == 0 and chosen.read_text().split()[-2:] == ["PMC3", "PMC2"]
    chosen.unlink()
    assert main([*command, "--base_url", bucket.url + "typo/"]) == 1 and "cannot be listed" in capsys.readouterr().err
