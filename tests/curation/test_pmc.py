"""`curation pmc` against a bucket on loopback, a fifth of it faulty: all that can be had is had, the rest is listed by reason."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llavamed_jax.curation import downloads, mirror, store
from llavamed_jax.curation.__main__ import main
from llavamed_jax.curation.wanted import Wanted
from tests.support.pmc_bucket import HTML, Bucket, md5, picture

pytest.importorskip("httpx")
pytest.importorskip("lxml")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF_S", 0.001)


@pytest.fixture
def bucket():
    with Bucket() as server:
        yield server


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_list(path: Path, rows) -> str:
    path.write_text("".join(f"{json.dumps(row) if isinstance(row, dict) else row}\n" for row in rows), encoding="utf-8")
    return str(path)


def fetch(bucket, list_file, out, *more) -> int:
    return main(["pmc", "--list", str(list_file), "--out", str(out), "--base_url", bucket.url, "--rate", "0", *more])


def test_all_that_can_be_had_is_had(bucket, tmp_path, capsys):
    bucket.fill()
    assert len(bucket.rows) == 500 and len({row["image_file_path"].split("/")[0] for row in bucket.rows}) == 200
    list_file = write_list(tmp_path / "list.jsonl", bucket.rows)
    training = [{"id": pair, "image": f"{pair}.jpg", "domain": {"mri": True},
                 "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "é"}]} for pair in bucket.expected]
    (tmp_path / "instruct.json").write_text(json.dumps([*training, {"id": "text", "conversatons": []}, 7]), encoding="utf-8")
    assert fetch(bucket, list_file, tmp_path / "out", "--training", str(tmp_path / "instruct.json")) == 0
    out = capsys.readouterr().out

    had = {pair for pair, why in bucket.expected.items() if why is None}
    assert 400 < len(had) < 500
    manifest = {line["path"]: line for line in lines(tmp_path / "out" / "manifest.jsonl")}
    assert set(manifest) == {f"images/{pair}.jpg" for pair in had}
    for path, line in manifest.items():
        data = (tmp_path / "out" / path).read_bytes()
        assert md5(data) == line["md5"] and hashlib.sha256(data).hexdigest() == line["sha256"] and len(data) == line["bytes"] and line["licence"] == "CC BY"
        assert Image.open(tmp_path / "out" / path).size == (line["width"], line["height"])
    missing = {line["name"].removesuffix(".jpg"): line["reason"] for line in lines(tmp_path / "out" / "missing.jsonl")}
    assert missing == {pair: why for pair, why in bucket.expected.items() if why is not None}
    for reason, count in Counter(missing.values()).items():
        assert f"  {reason}: {count:,}\n" in out
    # A listing, one request for metadata and one for each image of an article without a fault; nothing was sent twice.
    good = {row["image_file_path"].split("/")[0] for i, row in enumerate(bucket.rows)} - {f"PMC{1000 + i}" for i in range(0, 200, 5)}
    assert all(count == 1 for key, count in bucket.asked.items() if any(f"{pmcid}." in key for pmcid in good))
    assert sum(count for key, count in bucket.asked.items() if any(f"{pmcid}." in key for pmcid in good)) == 160 + sum(
        row["image_file_path"].split("/")[0] in good for row in bucket.rows)
    versions = {line["pmcid"]: line["version"] for line in manifest.values()}
    assert versions["PMC1025"] == versions["PMC1060"] == 2 and versions["PMC1001"] == 1  # a manuscript, and a retraction, before them

    kept = json.loads((tmp_path / "out" / "instruct.json").read_text(encoding="utf-8"))
    assert [row["id"] for row in kept] == [row["id"] for row in training if row["id"] in had] + ["text"]
    assert kept[0] == training[[row["id"] for row in training].index(kept[0]["id"])]
    assert f"{len(had) + 1} of 502 records; {500 - len(had)} without their image; 1 malformed" in out

    before = Counter(bucket.asked)
    assert fetch(bucket, list_file, tmp_path / "out") == 0  # a second run asks only where a web page came
    assert {key for key in bucket.asked if bucket.asked[key] != before[key]} == {key for key in before if key.endswith(".jpg") and bucket.objects.get(key) == HTML}
    assert f"{len(had)} files" in capsys.readouterr().out


THREADS = 4


def started(bucket, list_file, out):
    code = "import sys; from llavamed_jax.curation import downloads as d; d.BACKOFF_S = 0.001; from llavamed_jax.curation.__main__ import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, "pmc", "--list", list_file, "--out", str(out), "--base_url", bucket.url,
                             "--rate", "0", "--concurrency", str(THREADS)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")


def test_a_run_that_is_killed_and_then_stopped_downloads_nothing_twice(bucket, tmp_path):
    """The server stops answering after so many objects. When every thread waits, all that was sent is on the disk."""
    bucket.fill()
    list_file, out = write_list(tmp_path / "list.jsonl", bucket.rows), tmp_path / "out"
    for count, number in ((150, signal.SIGKILL), (300, signal.SIGTERM)):
        bucket.park_after = count
        bucket.num_parked = 0
        bucket.released.clear()
        process = started(bucket, list_file, out)
        deadline = time.monotonic() + 60
        while bucket.num_parked < THREADS:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        while number == signal.SIGTERM and "finishing the files on their way" not in process.stderr.readline():
            assert process.poll() is None
        bucket.park_after = None if number == signal.SIGTERM else count
        bucket.released.set()
        said = process.communicate(timeout=60)
        assert process.returncode == (75 if number == signal.SIGTERM else -number), said
    with open(out / "manifest.jsonl", "a", encoding="utf-8") as file:
        file.write('{"path": "images/torn')
    bucket.park_after = None
    assert fetch(bucket, list_file, out) == 0
    manifest = lines(out / "manifest.jsonl")
    assert {line["path"] for line in manifest} == {f"images/{pair}.jpg" for pair, why in bucket.expected.items() if why is None}
    assert len(manifest) == len({line["path"] for line in manifest})
    assert not list(out.rglob("*.tmp"))
    images = {key: count for key, count in bucket.served.items() if key.endswith((".jpg", ".JPG", ".png"))}
    faulty = {f"PMC{1000 + i}" for i in range(0, 200, 5)}
    assert [key for key, count in images.items() if count > 1 and key.partition(".")[0] not in faulty] == []
    metadata = {key: count for key, count in bucket.served.items() if key.startswith("metadata/")}
    assert [key for key, count in metadata.items() if count > 1 and key[9:].partition(".")[0] not in faulty] == []


def test_what_a_killed_run_left_is_verified_and_taken_over(bucket, tmp_path):
    """Killed between a file and its line; a file that is not the one that is expected is fetched again."""
    for n in (1, 2, 3):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)})
    list_file, out = write_list(tmp_path / "list.txt", ["PMC1/a.jpg", "PMC2/a.jpg", "PMC3/a.jpg"]), tmp_path / "out"
    assert fetch(bucket, list_file, out) == 0
    (out / "manifest.jsonl").unlink()
    (out / "images/PMC2/a.jpg").write_bytes(b"half")
    (out / "images/PMC2/.a.jpg.123.tmp").write_bytes(b"half")
    assert fetch(bucket, list_file, out) == 0
    assert {key: count for key, count in bucket.served.items() if key.endswith(".jpg")} == {"PMC1.1/a.jpg": 1, "PMC2.1/a.jpg": 2, "PMC3.1/a.jpg": 1}
    assert (out / "images/PMC2/a.jpg").read_bytes() == picture(2) and len(lines(out / "manifest.jsonl")) == 3
    assert {path.name for path in out.rglob("*") if path.is_file()} == {"a.jpg", "manifest.jsonl", "missing.jsonl", "resolved.jsonl", "settings.json"}
    (out / "images/PMC3/a.jpg").unlink()  # by the user
    assert fetch(bucket, list_file, out) == 0
    assert len(lines(out / "manifest.jsonl")) == 4 and (out / "images/PMC3/a.jpg").is_file()
    assert fetch(bucket, list_file, out) == 0 and len(lines(out / "manifest.jsonl")) == 3


def test_rows_that_share_a_file_share_a_download(bucket, tmp_path, capsys):
    bucket.article("PMC1", 1, {"a.jpg": picture(1), "b.jpg": picture(2)})
    rows = [{"pair_id": pair, "image_file_path": f"PMC1/{file}"} for pair, file in (("x", "a.jpg"), ("y", "a.jpg"), ("x", "a.jpg"), ("x", "b.jpg"))]
    assert fetch(bucket, write_list(tmp_path / "list.jsonl", rows), tmp_path / "out") == 0
    assert bucket.served["PMC1.1/a.jpg"] == 1 and bucket.served["PMC1.1/b.jpg"] == 0
    assert (tmp_path / "out/images/y.jpg").read_bytes() == (tmp_path / "out/images/x.jpg").read_bytes() == picture(1)
    assert [line["reason"] for line in lines(tmp_path / "out/missing.jsonl")] == ["name taken by another row"]
    assert "1 row repeats an earlier one" in capsys.readouterr().out
    rows[2:] = [{"pair_id": "z", "image_file_path": "PMC1/a.jpg"}]
    assert fetch(bucket, write_list(tmp_path / "list.jsonl", rows), tmp_path / "out") == 0
    assert bucket.served["PMC1.1/a.jpg"] == 1 and (tmp_path / "out/images/z.jpg").is_file()


@pytest.mark.parametrize("licence, had", [("none", "abcd"), ("commercial", "ad"), ("non-commercial", "b"), ("commercial,non-commercial", "abd")])
def test_licences(bucket, tmp_path, licence, had):
    for n, (name, code) in enumerate({"a": "CC BY", "b": "cc by-nc-sa 4.0", "c": "NO-CC CODE", "d": "CC0"}.items(), 1):
        bucket.article(f"PMC{n}", 1, {f"{name}.jpg": picture(n)}, code)
    list_file = write_list(tmp_path / "list", [f"PMC{n}/{name}.jpg" for n, name in enumerate("abcd", 1)])
    assert fetch(bucket, list_file, tmp_path / "out", "--licence", licence) == 0
    assert {path.stem for path in (tmp_path / "out" / "images").rglob("*.jpg")} == set(had)
    assert {(line["asked"][0], line["reason"]) for line in lines(tmp_path / "out" / "missing.jsonl")} == {
        (name, "licence excluded by --licence") for name in set("abcd") - set(had)}
    if licence == "commercial":
        assert fetch(bucket, list_file, tmp_path / "out") == 2  # another filter, the same folder


def test_the_version_that_holds_the_file(bucket, tmp_path):
    """The very name goes before a newer version; then the newest that is not retracted and allowed."""
    bucket.article("PMC1", 1, {"old.jpg": picture(1)})
    bucket.article("PMC1", 2, {"new.jpg": picture(2)})
    bucket.article("PMC1", 3, {"old.gif": picture(3, "GIF"), "both.gif": picture(4, "GIF"), "both.tif": picture(5, "TIFF")})
    bucket.article("PMC2", 2, {"a.jpg": picture(6)}, retracted=True)
    bucket.article("PMC2", 3, {"a.jpg": picture(7)})
    del bucket.objects["metadata/PMC2.3.json"]  # the copy beside the files is read
    bucket.article("PMC3", 1, {"a.jpg": picture(8)}, "CC BY-NC")
    bucket.article("PMC3", 2, {"a.jpg": picture(9)}, "CC BY")
    for version in (1, 2, 3, 4):  # a manuscript, two papers with the same name, and a retraction
        bucket.article("PMC4", version, {"a.jpg": picture(10 + version)} if version > 1 else {}, "TDM" if version == 1 else "CC BY", version == 4)
    wanted = ["PMC4/a.jpg", "PMC1/old.jpg", "PMC1/new.jpg", "PMC1/both.jpg", "PMC2/a.jpg", "PMC3/a.jpg", "PMC3.1/a.jpg", "PMC2.2/a.jpg", "pmc1.2/new.jpg", "PMC2.9/a.jpg"]
    assert fetch(bucket, write_list(tmp_path / "list", wanted), tmp_path / "out", "--licence", "commercial") == 0
    found = {f"{line['path'][7:]}": (line["version"], line["file"]) for line in lines(tmp_path / "out/manifest.jsonl")}
    assert found == {"PMC1/old.jpg": (1, "old.jpg"), "PMC1/new.jpg": (2, "new.jpg"), "PMC1/both.jpg": (3, "both.tif"), "PMC2/a.jpg": (3, "a.jpg"),
                     "PMC3/a.jpg": (2, "a.jpg"), "pmc1.2/new.jpg": (2, "new.jpg"), "PMC4/a.jpg": (3, "a.jpg")}
    assert bucket.asked["metadata/PMC4.3.json"] == 1 and not bucket.asked["metadata/PMC4.2.json"], "older versions are not asked about"
    assert {line["asked_version"]: line["reason"] for line in lines(tmp_path / "out/missing.jsonl")} == {
        1: "licence excluded by --licence", 2: "retracted", 9: "no prefix in the bucket"}


def test_whole_articles_and_the_inventory(bucket, tmp_path, capsys):
    for n in range(1, 6):
        bucket.article(f"PMC{n}", 1, {"f1.jpg": picture(n), "f1.gif": picture(n, "GIF"), "s 1.mp4": b"film", "f2.png": picture(n, "PNG")},
                       "TDM" if n == 3 else "CC BY")
    bucket.objects["PMC2.1/f2.png"] = b"damaged"
    bucket.inventory("2026-11-01", {"metadata/PMC1.1.json": "2026-10-30T08:00:00.000Z"})
    bucket.inventory("2026-11-20", {f"metadata/PMC{n}.1.json": f"2026-11-0{n}T08:00:00.000Z" for n in range(1, 6)} | {
        "metadata/PMC4.2.json": "2026-11-04T09:00:00.000Z", "README.txt": "2026-11-03T00:00:00.000Z"})
    command = ["pmc", "--since", "2026-11-02", "--until", "2026-11-04", "--out", str(tmp_path / "out"), "--base_url", bucket.url, "--rate", "0"]
    assert main(command) == 0
    assert "inventory of 2026-11-20: 3 articles changed" in capsys.readouterr().out
    assert (tmp_path / "out/selected.txt").read_text().split()[-3:] == ["PMC4", "PMC3", "PMC2"]
    files = {str(path.relative_to(tmp_path / "out/articles")) for path in (tmp_path / "out/articles").rglob("*.*") if path.is_file()}
    assert files == {f"PMC{n}.1/{name}" for n in (2, 3, 4) for name in ("f1.jpg", "f2.png", f"PMC{n}.1.xml")} - {"PMC2.1/f2.png"}
    assert [(line["name"], line["reason"]) for line in lines(tmp_path / "out/missing.jsonl")] == [("articles/PMC2.1/f2.png", "damaged")]
    before = Counter(bucket.asked)
    assert main(command) == 0 and bucket.asked == before
    assert "8 files" in (said := capsys.readouterr().out) and "selected.txt: 3 articles; remove the file to choose anew" in said
    assert main([*command, "--limit", "1"]) == 2 and "holds another choice" in capsys.readouterr().err
    bucket.objects["PMC2.1/f2.png"] = picture(2, "PNG")
    assert main([*command, "--retry_missing"]) == 0 and "9 files" in capsys.readouterr().out


def package(path: Path, members: dict[str, bytes], damage: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("PMC9/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if damage:
        path.write_bytes(path.read_bytes()[:-40])


def test_a_mirror_fills_gaps_and_nothing_else(bucket, tmp_path):
    bucket.article("PMC1", 1, {"other.jpg": picture(1)})  # name gone
    bucket.article("PMC2", 1, {"a.jpg": picture(2)}, retracted=True)
    bucket.article("PMC3", 1, {}, "TDM")
    bucket.article("PMC10", 1, {}, "CC BY")  # its licence allows media, and the bucket has none
    mirror = tmp_path / "mirror"
    package(mirror / "aa/01/PMC1.tar.gz", {"PMC1/../../../evil.jpg": picture(7), "PMC1/a.gif": picture(8, "GIF"), "PMC1/a.jpg": picture(9)})
    package(mirror / "aa/01/PMC2.tar.gz", {"PMC2/a.jpg": picture(2)})
    package(mirror / "PMC3.tar.gz", {"PMC3/a.jpg": picture(3)})
    package(mirror / "PMC4.tar.gz", {"PMC4/a.jpg": picture(4), "PMC4/b.jpg": os.urandom(4000)}, damage=True)
    (mirror / "PMC5").mkdir()
    (mirror / "PMC5/a.png").write_bytes(picture(5, "PNG"))
    (mirror / "6_F1.jpg").write_bytes(picture(6))
    (mirror / "7_F1.jpg").write_bytes(HTML)
    rows = [{"pair_id": f"{n}_F1", "pmc_tar_url": f"https://x/oa_package/aa/01/PMC{n}.tar.gz", "image_file_path": f"PMC{n}/a.jpg"} for n in range(1, 9)]
    package(mirror / "PMC10.tar.gz", {"PMC10/a.jpg": picture(3)})
    rows.append({"pair_id": "10_F1", "image_file_path": "PMC10/a.jpg"})
    rows.append({"pair_id": "4_F2", "image_file_path": "PMC4/b.jpg"})
    rows.append({"pair_id": "9_F1", "image_file_path": "PMC9/link.jpg"})
    list_file, out = write_list(tmp_path / "list", rows), tmp_path / "out"
    assert fetch(bucket, list_file, out) == 0 and not (out / "images").exists()
    assert fetch(bucket, list_file, out, "--mirror", str(mirror)) == 0
    assert {path.stem: md5(path.read_bytes()) for path in (out / "images").iterdir()} == {
        "1_F1": md5(picture(9)), "10_F1": md5(picture(3)), "4_F1": md5(picture(4)), "5_F1": md5(picture(5, "PNG")), "6_F1": md5(picture(6))}
    assert {line["name"][:4]: line["reason"] for line in lines(out / "missing.jsonl")} == {
        "2_F1": "retracted", "3_F1": "licence without media", "4_F2": "damaged", "7_F1": "damaged", "8_F1": "no prefix in the bucket", "9_F1": "no prefix in the bucket"}
    assert not list(tmp_path.rglob("evil.jpg"))
    # Over the web: the old packages, and single files; with a filter only where the bucket says the licence.
    bucket.objects |= {f"old/aa/01/PMC{n}.tar.gz": (mirror / place).read_bytes() for n, place in ((1, "aa/01/PMC1.tar.gz"), (3, "PMC3.tar.gz"))}
    bucket.objects |= {"files/PMC5/a.jpg": picture(5), "files/PMC8/a.jpg": HTML}
    assert fetch(bucket, list_file, tmp_path / "web", "--mirror", f"{bucket.url}old", "--mirror", bucket.url + "files/{pmcid}/{file}", "--licence", "commercial") == 0
    assert [line["path"] for line in lines(tmp_path / "web/manifest.jsonl")] == ["images/1_F1.jpg"]
    assert lines(tmp_path / "web/manifest.jsonl")[0]["licence"] == "CC BY"
    assert {line["name"][:4]: line["reason"] for line in lines(tmp_path / "web/missing.jsonl")}["5_F1"] == "licence unknown, with --licence"
    assert fetch(bucket, list_file, tmp_path / "web2", "--mirror", bucket.url + "files/{pmid}") == 2


def test_a_mirror_that_fails_is_named(bucket, tmp_path, capsys, monkeypatch):
    """The run ends as for a server that fails; another mirror may still have the file; what a package lacks is no failure."""
    rows = [{"pair_id": f"{n}_F{k}", "pmc_tar_url": f"oa/aa/0{n}/PMC{n}.tar.gz", "image_file_path": f"PMC{n}/{k}.jpg"} for n in range(1, 6) for k in range(3)]
    for n in range(1, 6):
        package(tmp_path / "p.tar.gz", {f"PMC{n}/{k}.jpg": picture(10 * n + k) for k in range(2)} | ({"x": os.urandom(9000 if n == 4 else 900)} if n > 3 else {}))
        bucket.objects[f"old/aa/0{n}/PMC{n}.tar.gz"] = (tmp_path / "p.tar.gz").read_bytes()[:-300 if n == 5 else None]
    bucket.objects["old/aa/03/PMC3.tar.gz"] = HTML
    bucket.once = {"old/aa/02/PMC2.tar.gz": [500, 503], "files/PMC2/1.jpg": [403]}
    bucket.objects |= {"files/PMC2/0.jpg": picture(20), "files/PMC2/1.jpg": picture(21)}
    monkeypatch.setattr(mirror, "_MOST_ARCHIVE", 5000)
    list_file, mirrors = write_list(tmp_path / "list", rows), ["--retries", "0", "--mirror", f"{bucket.url}old", "--mirror", bucket.url + "files/{pmcid}/{file}"]
    assert fetch(bucket, list_file, tmp_path / "out", *mirrors) == 1
    assert "the mirror failed for 2 files, first with http://127.0.0.1" in capsys.readouterr().err
    missing = lambda: {line["name"].removesuffix(".jpg"): line["reason"] for line in lines(tmp_path / "out/missing.jsonl")}
    gone = dict.fromkeys(["1_F2"], "no prefix in the bucket") | dict.fromkeys(["3_F0", "3_F1", "3_F2"], "web page in its place") | dict.fromkeys(
        ["4_F0", "4_F1", "4_F2"], "too large") | {"5_F2": "damaged"}
    assert missing() == gone | dict.fromkeys(["2_F1", "2_F2"], "mirror failed")
    assert bucket.asked["old/aa/01/PMC1.tar.gz"] == 1 and max(count for key, count in bucket.asked.items() if key.startswith("old/")) == 1
    bucket.once = {}
    assert fetch(bucket, list_file, tmp_path / "out", *mirrors) == 0 and missing() == gone | {"2_F2": "no prefix in the bucket"}
    assert {key[7:11]: count for key, count in bucket.asked.items() if key.startswith("old/")} == {"01/P": 1, "02/P": 2, "03/P": 2, "04/P": 1, "05/P": 1}
    assert fetch(bucket, list_file, tmp_path / "out", *mirrors, "--retry_missing") == 0 and bucket.asked["old/aa/01/PMC1.tar.gz"] == 2


@pytest.mark.parametrize("kind", ["damaged package", "damaged image", "web page", "another mirror"])
def test_a_mirror_does_not_hide_that_the_server_failed(bucket, tmp_path, capsys, kind):
    """The next run has what the first could not get, from the bucket or from the mirror."""
    bucket.article("PMC1", 1, {"a.jpg": picture(1)})
    bucket.once = {"PMC1.1/a.jpg": [500], "two/PMC1/a.jpg": [500]}
    package(tmp_path / "p.tar.gz", {"PMC1/a.jpg": picture(1), "PMC1/x": os.urandom(4000)})
    bucket.objects |= {"one/PMC1.tar.gz": (tmp_path / "p.tar.gz").read_bytes()[:60], "one/PMC1/a.jpg": {"damaged image": b"no image", "web page": HTML}.get(kind, picture(1))}
    place = "one/{pmcid}.tar.gz" if kind in ("damaged package", "another mirror") else "one/{pmcid}/{file}"
    command = ["--retries", "0", *(["--mirror", bucket.url + "two/{pmcid}/{file}"] if kind == "another mirror" else []), "--mirror", bucket.url + place]
    list_file, out = write_list(tmp_path / "list", ["PMC1/a.jpg"]), tmp_path / "out"
    assert fetch(bucket, list_file, out, *command) == 1 and "failed for 1 file" in capsys.readouterr().err
    (line,) = lines(out / "missing.jsonl")
    assert line["reason"] == ("mirror failed" if kind == "another mirror" else "server failed") and "(elsewhere: " in line["detail"]
    bucket.objects["one/PMC1.tar.gz"] = b""
    assert fetch(bucket, list_file, out, *command) == 0 and lines(out / "missing.jsonl") == []
    assert md5((out / "images/PMC1/a.jpg").read_bytes()) == md5(picture(1))


def test_a_damaged_package_does_not_hide_a_file_that_its_folder_could_not_read(tmp_path, monkeypatch):
    (tmp_path / "PMC1").mkdir()
    (tmp_path / "PMC1/a.jpg").write_bytes(picture(1))
    package(tmp_path / "PMC1.tar.gz", {"PMC1/x": os.urandom(4000)}, damage=True)
    wanted = Wanted("PMC1", None, "a.jpg", "a.jpg")
    monkeypatch.setattr(mirror.Mirror, "_read", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    (why,) = mirror.Mirror(str(tmp_path), downloads.Client()).find([wanted], 2**28).failed.values()
    assert why.reason == "mirror failed" and "Input/output error" in why.detail and "the package is damaged" in why.detail


@pytest.mark.parametrize(("detail", "licence", "reason"), [
    ("version 1, CC BY", "none", None), ("version 2, cc by-nc 4.0", "none", None), ("version 1, CC BY", "commercial", None),
    ("version 1, CC BY-NC", "commercial", "licence excluded by --licence"), ("version 1, TDM", "none", "licence without media"), ("", "none", "licence without media")])
def test_lines_of_an_earlier_version_keep_no_mirror_from_articles_of_a_cc_licence(bucket, tmp_path, detail, licence, reason):
    (tmp_path / "mirror/PMC1").mkdir(parents=True)
    (tmp_path / "mirror/PMC1/a.jpg").write_bytes(picture(1))
    list_file, out = write_list(tmp_path / "list", ["PMC1/a.jpg"]), tmp_path / "out"
    assert fetch(bucket, list_file, out, "--licence", licence) == 0
    (line,) = lines(out / "missing.jsonl")
    write_list(out / "missing.jsonl", [{**line, "reason": "licence without media", "detail": detail, "licence": ""}])
    assert fetch(bucket, list_file, out, "--licence", licence, "--mirror", str(tmp_path / "mirror")) == 0
    assert [line["reason"] for line in lines(out / "missing.jsonl")] == ([reason] if reason else [])
    assert (out / "images/PMC1/a.jpg").is_file() == (reason is None)


def test_a_package_is_never_in_memory(bucket, tmp_path):
    package(tmp_path / "p.tar.gz", {"PMC1/film.avi": os.urandom(20_000_000), "PMC1/a.jpg": picture(1)})
    bucket.objects["PMC1.tar.gz"] = (tmp_path / "p.tar.gz").read_bytes()
    bucket.objects["small"], bucket.once["small"] = b"1234567", ["cut"]
    client = downloads.Client()
    with open(tmp_path / "small", "w+b") as file:
        client.save(bucket.url + "small", 7, file)
    assert (tmp_path / "small").read_bytes() == b"1234567"  # nothing is left of the first attempt
    wanted = Wanted("PMC1", None, "a.jpg", "a.jpg")
    for place in (bucket.url + "{pmcid}.tar.gz", str(tmp_path)):
        (tmp_path / "p.tar.gz").rename(tmp_path / "PMC1.tar.gz") if place == str(tmp_path) else None
        tracemalloc.start()
        answer = mirror.Mirror(place, client, tmp_path).find([wanted], 2**28)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert answer.found[wanted][0] == picture(1) and not answer.failed and peak < 8_000_000
    assert client.again == {"connection lost": 1} and {path.name for path in tmp_path.iterdir()} == {"PMC1.tar.gz", "small"}


def test_metadata_that_an_earlier_run_read_may_be_old(bucket, tmp_path):
    """A file that is gone or has other bytes is looked up once more; --retry_missing reads all metadata again."""
    for n in (1, 2, 3, 4):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)})
    list_file, out = write_list(tmp_path / "list", ["PMC1/a.jpg", "PMC2/a.jpg", "PMC3", "PMC4/a.jpg"]), tmp_path / "out"
    assert fetch(bucket, list_file, out) == 0
    for path in [out / "manifest.jsonl", *out.rglob("*.jpg"), *out.rglob("*.xml")]:
        path.unlink()
    bucket.article("PMC1", 1, {"a.jpg": picture(11)})  # other bytes
    for n in (2, 3):  # a new version in its place
        for key in [key for key in bucket.objects if f"PMC{n}.1" in key]:
            del bucket.objects[key]
        bucket.article(f"PMC{n}", 2, {"a.jpg": picture(10 + n)})
    bucket.article("PMC4", 1, {"a.jpg": picture(4)}, wrong_md5=True)
    bucket.objects["PMC4.1/a.jpg"] = picture(14)  # its md5 is wrong in the new metadata too
    before = Counter(bucket.asked)
    assert fetch(bucket, list_file, out, "--retries", "0") == 0
    assert {line["path"]: (out / line["path"]).read_bytes() for line in lines(out / "manifest.jsonl") if line["path"].endswith("jpg")} == {
        "images/PMC1/a.jpg": picture(11), "images/PMC2/a.jpg": picture(12), "articles/PMC3.2/a.jpg": picture(13)}
    assert [line["reason"] for line in lines(out / "missing.jsonl")] == ["damaged"]
    assert bucket.asked["PMC4.1/a.jpg"] - before["PMC4.1/a.jpg"] == 2
    after = Counter(bucket.asked)
    assert fetch(bucket, list_file, out) == 0 and bucket.asked == after
    bucket.article("PMC4", 1, {"a.jpg": picture(24)})
    assert fetch(bucket, list_file, out, "--retry_missing") == 0 and lines(out / "missing.jsonl") == []
    assert bucket.asked["metadata/PMC4.1.json"] == after["metadata/PMC4.1.json"] + 1 and bucket.asked["PMC4.1/a.jpg"] == after["PMC4.1/a.jpg"] + 1


def test_the_limit_counts_what_the_licence_allows(bucket, tmp_path, capsys):
    for n in range(1, 9):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)}, {0: "CC BY", 1: "CC BY-NC", 2: "TDM"}[n % 3])
    bucket.inventory("2026-11-20", {f"metadata/PMC{n}.1.json": f"2026-11-0{n}T08:00:00.000Z" for n in range(1, 9)})
    for groups, wanted in (("none", ["PMC8", "PMC7"]), ("commercial", ["PMC6", "PMC3"]), ("non-commercial", ["PMC7", "PMC4"]), ("commercial,non-commercial", ["PMC7", "PMC6"])):
        command = ["pmc", "--since", "2026-11-01", "--limit", "2", "--licence", groups, "--out", str(tmp_path / groups), "--base_url", bucket.url,
                   "--rate", "0", "--concurrency", "2"]
        before = Counter(bucket.asked)
        assert main(command) == 0
        assert (tmp_path / groups / "selected.txt").read_text().split()[-2:] == wanted
        assert {line["pmcid"] for line in lines(tmp_path / groups / "manifest.jsonl")} == set(wanted)
        assert all(bucket.asked[f"metadata/{pmcid}.1.json"] == before[f"metadata/{pmcid}.1.json"] + 1 for pmcid in wanted)
        before = Counter(bucket.asked)
        assert main(command) == 0 and bucket.asked == before


def test_a_run_keeps_to_its_rate_and_its_concurrency(bucket, tmp_path, monkeypatch):
    for n in range(1, 9):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)})
    list_file = write_list(tmp_path / "list", [f"PMC{n}/a.jpg" for n in range(1, 9)])
    bucket.park_after = 0
    run = threading.Thread(target=fetch, args=(bucket, list_file, tmp_path / "out", "--concurrency", "3"))
    run.start()
    deadline = time.monotonic() + 60
    while bucket.num_parked < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert bucket.num_parked == 3
    bucket.park_after = None
    bucket.released.set()
    run.join(60)
    now, lock = [0.0], threading.Lock()

    def sleep(seconds):
        with lock:
            now[0] += seconds

    monkeypatch.setattr(downloads, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    for rate, least in (("4", 23 / 4), ("8", 23 / 8), ("0", 0)):
        begun, sent = now[0], sum(bucket.asked.values())
        assert main(["pmc", "--list", list_file, "--out", str(tmp_path / rate), "--base_url", bucket.url, "--rate", rate, "--concurrency", "2"]) == 0
        assert sum(bucket.asked.values()) - sent == 16 and least <= now[0] - begun <= 2 * least + 1


def test_a_request_that_is_called_bad_is_no_proof_of_absence(bucket, tmp_path, capsys):
    bucket.article("PMC1", 1, {"a.jpg": picture(1)})
    bucket.once = {"PMC1.1/a.jpg": [400]}
    list_file = write_list(tmp_path / "list", ["PMC1/a.jpg"])
    assert fetch(bucket, list_file, tmp_path / "out") == 1 and "the server failed for 1 file" in capsys.readouterr().err
    assert fetch(bucket, list_file, tmp_path / "out") == 0 and (tmp_path / "out/images/PMC1/a.jpg").is_file()


def test_lists(bucket, tmp_path, capsys):
    bucket.article("PMC7", 1, {"a.jpg": picture(1), "b é+ c.jpg": picture(2)})
    ok = [{"pair_id": "1_F1", "pmc_tar_url": None, "image_file_path": "PMC7/a.jpg"}]
    records = {"chest_xray": [{"pair_id": "1_F1", "graphic_ref": "cd/6e/PMC7/a.jpg", "in_text_mention": None}], "mri": []}
    good = {"a.jsonl": json.dumps(ok[0]) + "\n\n", "b.json": json.dumps(ok, indent=1), "c.json": json.dumps(records), "d.json": json.dumps(records, indent=2),
            "e.txt": "\ufeffPMC7/a.jpg\r\n", "f.txt": "PMC7/b é+ c.jpg\n", "g.txt": "7.1/a.jpg\n", "h.txt": "PMC7/b%20%C3%A9%2B%20c.jpg\n"}
    for name, text in good.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert fetch(bucket, tmp_path / name, tmp_path / f"out-{name}") == 0, name
        assert len(lines(tmp_path / f"out-{name}/manifest.jsonl")) == 1, name
    capsys.readouterr()
    for name, data in {"html": HTML, "empty": b"\n \n", "binary": os.urandom(500), "object": b"{}", "list": b"[1, 2]", "prose": b"hello\nPMC7/a.jpg",
                       "cut": b'[{"pair_id": "1"', "deep": b"[" * 100_000,
                       "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:26\nsize 128785989\n"}.items():
        (tmp_path / name).write_bytes(data)
        assert fetch(bucket, tmp_path / name, tmp_path / "out-bad") == 1, name
        said = capsys.readouterr().err
        assert said.startswith("error: ") and str(tmp_path / name) in said and ("git lfs pull" in said) == (name == "pointer") and said.count("\n") == 1, said
    assert fetch(bucket, tmp_path / "no", tmp_path / "out-bad") == 2 and "does not exist" in capsys.readouterr().err
    rows = ["PMC7/a.jpg", "PMC7/../../a.jpg", "PMC7/..", "/etc/passwd", "PMC7/" + "x" * 300, "PMC7/a\tb.jpg", "PMC7/a.jpg"]
    pairs = [ok[0], {"pair_id": "../x", "image_file_path": "PMC7/a.jpg"}, {"pair_id": "x"}, {"pair_id": "y", "image_file_path": 7}]
    for name, odd in (("odd.txt", rows), ("odd.jsonl", pairs)):
        assert fetch(bucket, write_list(tmp_path / name, odd), tmp_path / f"out-{name}") == 0
        reasons = Counter(line["reason"] for line in lines(tmp_path / f"out-{name}/missing.jsonl"))
        assert reasons == {"malformed row of the list": 5 if name == "odd.txt" else 3}
    assert {path.name for path in tmp_path.glob("*.jpg")} == set()


def test_servers_and_disks_that_fail(bucket, tmp_path, capsys, monkeypatch):
    for n in range(1, 31):
        bucket.article(f"PMC{n}", 1, {"a.jpg": picture(n)})
    list_file, out = write_list(tmp_path / "list", [f"PMC{n}/a.jpg" for n in range(1, 31)]), tmp_path / "out"
    assert main(["pmc", "--list", list_file, "--out", str(tmp_path / "x"), "--base_url", "http://127.0.0.1:9/", "--retries", "0"]) == 1
    said = capsys.readouterr().err
    assert "cannot be had" in said and said.count("error:") == said.count("\n") == 1
    keys = dict(bucket.objects)
    bucket.objects = dict.fromkeys(keys, HTML)  # a login page in place of everything
    assert fetch(bucket, list_file, out) == 1
    assert "HTML" in (said := capsys.readouterr().err) and said.count("\n") == 1 and not (out / "images").exists()
    bucket.objects = keys  # a proxy that refuses: not "no prefix", which would be kept
    bucket.once = {key: [403] * 9 for key in keys}
    assert fetch(bucket, list_file, out, "--concurrency", "1") == 1 and not (out / "images").exists()
    assert {line["reason"] for line in lines(out / "missing.jsonl")} <= {"server failed", "web page in its place"}
    capsys.readouterr()
    bucket.objects = keys
    bucket.once = {"PMC3.1/a.jpg": [500] * 6, "metadata/PMC4.1.json": ["drop"] * 6}
    assert fetch(bucket, list_file, out, "--concurrency", "2") == 1  # 28 are here, two can be tried again
    assert "the server failed for 2 files" in capsys.readouterr().err
    assert {line["reason"] for line in lines(out / "missing.jsonl")} == {"server failed"} and len(lines(out / "manifest.jsonl")) == 28
    real = store.write_whole

    def full(path, write):
        if path.suffix == ".jpg":
            raise OSError(28, "No space left on device")
        return real(path, write)

    monkeypatch.setattr(store, "write_whole", full)
    assert fetch(bucket, list_file, out) == 1
    assert "No space left on device; 28 files are in" in (said := capsys.readouterr().err) and said.count("\n") == 1, said
    monkeypatch.undo()
    assert fetch(bucket, list_file, out) == 0 and lines(out / "missing.jsonl") == []
    assert max(count for key, count in bucket.served.items() if key.endswith(".jpg")) <= 2
    holder = store.Store(out, {})
    assert fetch(bucket, list_file, out) == 1 and "in use by another run" in capsys.readouterr().err
    holder.close()
    for flags in (["--licence", "free"], ["--concurrency", "0"], ["--rate", "nan"], ["--limit", "3"], ["--mirror", "nowhere"], ["--base_url", "bucket"],
                  ["--training", "no.json"], ["--since", "2026-11-01"], ["--timeout", "0"]):
        assert fetch(bucket, list_file, out, *flags) == 2, flags
        assert flags[0] in capsys.readouterr().err


def test_a_server_that_asks_to_wait_is_left_alone(bucket, monkeypatch):
    """Every thread waits; a date counts as a number does; a wait of an hour ends the run with a sentence."""
    now = [1000.0]
    monkeypatch.setattr(downloads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    client = downloads.Client(1, rate=2.0, timeout=1e6)
    turns = []
    for _ in range(4):
        client._take_turn()
        turns.append(round(now[0] - 1000, 1))
    assert turns == [0.0, 0.5, 1.0, 1.5]
    monkeypatch.setattr(downloads.time, "time", lambda: 784111777.0)
    asked = lambda text: downloads.retry_after({"retry-after": text})
    assert asked("7") == 7 and asked("Sun, 06 Nov 1994 08:49:47 GMT") == 10
    assert asked("soon") is downloads.retry_after({}) is asked("nan") is None
    bucket.objects["x"] = b"1"
    begun = now[0]
    attempts = iter([downloads._PassingError("status 429", "status 429", 30.0)])

    def attempt(url, most, into=None):
        client._take_turn()
        for error in attempts:
            raise error
        return b"1", {}

    monkeypatch.setattr(client, "_attempt", attempt)
    assert client.get(bucket.url + "x", 10) == b"1" and 30 <= now[0] - begun < 32
    attempts = iter([downloads._PassingError("status 429", "status 429", 3600.0)])
    with pytest.raises(downloads.ServerError, match="asks to wait 3600 s"):
        client.get(bucket.url + "x", 10)
