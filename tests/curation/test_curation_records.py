"""`curation records`: shards equal loose files to the bit, several writers, stops, and shards that are damaged."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.config import preset
from llavamed_jax.curation import shard_writer
from llavamed_jax.curation.__main__ import main
from llavamed_jax.datasets import shards
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import Stored, load_image
from llavamed_jax.pipeline import lengths, loader
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.processor import Processor


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """60 records: text, one image or two, a broken image, a malformed record, one with a surplus image."""
    folder = tmp_path_factory.mktemp("loose")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 70, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    rows = []
    for i in range(60):
        images = [f"{(i + j) % 6}.png" for j in range(i % 3)]
        marks = "<image>\n" * len(images)
        rows.append({"id": f"é{i}", "image": images if i % 2 else images[0] if len(images) == 1 else images,
                     "conversations": [{"from": "human", "value": f"{marks}number {i} {'word ' * (i % 7)}"}, {"from": "gpt", "value": "an answer"}]})
    rows[1]["image"] = "broken.png"
    rows[17]["image"] = ["3.png", "4.png", "5.png"]
    rows[33] = {"id": 33, "conversations": []}
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def write(loose, out, tokenizer, *more, span="8"):
    return main(["records", "--data", str(loose / "data.json"), "--checkpoint", "preset:small", "--tokenizer", str(tokenizer), "--out", str(out),
                 "--records_a_shard", span, "--max_length", "96", *more])


def batches_of(data, processor, max_length=96):
    found = lengths.measure(data, processor, max_length)
    plan = Plan(Stream.of(data, 3), found, Layout(192, 5, 4, True))
    return found, list(loader.batches(data, processor, plan, max_length, epochs=2))


@pytest.fixture(scope="module")
def made(loose, mistral_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    for part in ("2/3", "0/3"):
        assert write(loose, out, mistral_tokenizer, "--part", part) == 0
    with pytest.raises(UserError, match="part 1 of 3 .* is missing"):
        read_training(out)
    assert write(loose, out, mistral_tokenizer, "--part", "1/3") == 0
    return out


def test_batches_from_shards_equal_those_from_files(loose, made, processor, monkeypatch):
    """Three writers; the two bad records are gone from both. Planning reads no sample."""
    rows = json.loads((loose / "data.json").read_text(encoding="utf-8"))
    (loose / "good.json").write_text(json.dumps([row for i, row in enumerate(rows) if i not in (1, 33)]), encoding="utf-8")
    wanted, expected = batches_of(read_training(loose / "good.json"), processor)
    data = read_training(made)
    assert len(data) == 58 and data.record(16)["surplus"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardRecords, "__getitem__", None)
        found = lengths.measure(data, processor, 96)
        Plan(Stream.of(data, 3), found, Layout(192, 5, 4, True)).rows(0)
    for name in ("tokens", "images", "lost"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist() and getattr(found, name).dtype == getattr(wanted, name).dtype
    assert lengths.rest_of(found) == lengths.rest_of(wanted) and found.surplus == 1
    _, got = batches_of(data, processor)
    assert len(got) == len(expected) > 4
    for one, other in zip(got, expected):
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    dropped = [entry for part in range(3) for entry in json.loads((made / f"dropped-{shards.part_name(part, 3)}.json").read_text())["dropped"]]
    assert [(entry["record"], entry["kind"]) for entry in dropped] == [(1, "image that cannot be read"), (33, "malformed record")]


def test_a_recipe_takes_shards_alone_and_in_a_mixture(loose, made, processor):
    mixed = read_training([{"path": str(made), "weight": 2}, {"path": str(loose / "data.json"), "images": str(loose)}])
    found = lengths.measure(mixed, processor, 96)
    alone = lengths.measure(read_training(loose / "data.json"), processor, 96)
    assert len(mixed) == 176 and found.tokens[58:].tolist() == alone.tokens.tolist() and len(found.damaged) == len(alone.damaged) == 1
    assert read_training(made).fingerprint() != read_training(loose / "data.json").fingerprint()


def test_other_models_lengths_and_pixels(made, processor, mistral_tokenizer, capsys):
    data = read_training(made)
    other = lengths.measure(data, processor, 60)
    assert other.truncated and other.longest == 60 and "has no lengths for this tokenizer, template and max_length 60" in capsys.readouterr().err
    for wrong, words in ((Processor(preset("v15-7b"), processor.tokenizer), "size 96, but this model needs 336"),
                         (Processor(preset("small"), processor.tokenizer, image_mode="square"), "mode pad, but this model needs square")):
        with pytest.raises(UserError, match=words):
            lengths.measure(data, wrong, 96)


def test_a_stopped_writer_goes_on_with_the_shard_it_had_begun(loose, made, mistral_tokenizer, tmp_path, monkeypatch, capsys):
    out, written = tmp_path / "out", []
    real = shard_writer.Writer._shard

    def stop_at_third(self, number, *rest):
        if number == 3:
            (out / f".{self._file(3).name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt("stopped by SIGTERM")
        written.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(shard_writer.Writer, "_shard", stop_at_third)
    assert write(loose, out, mistral_tokenizer) == 75
    with pytest.raises(UserError):
        read_training(out)
    monkeypatch.setattr(shard_writer.Writer, "_shard", lambda self, number, *rest: (written.append(number), real(self, number, *rest))[1])
    assert write(loose, out, mistral_tokenizer, "--max_length", "96") == 0 and written == [0, 1, 2, *range(3, 8)]
    one, three = read_training(out), read_training(made)
    plain = lambda record: (record["id"], record["conversations"], [image.data for image in record["image"]])
    assert [plain(one.record(i)) for i in range(58)] == [plain(three.record(i)) for i in range(58)]
    assert sorted(each.name for each in out.iterdir() if "tmp" in each.name or each.name.endswith(".json") and each.name.startswith(".")) == []
    capsys.readouterr()
    assert write(loose, out, mistral_tokenizer) == 0 and len(written) == 8 and "is complete already" in capsys.readouterr().out
    assert write(loose, out, mistral_tokenizer, "--format", "jpeg") == 2 and "other flags" in capsys.readouterr().err
    assert write(loose, out, mistral_tokenizer, "--part", "1/1") == 2 and "--part" in capsys.readouterr().err
    for flags in (["--quality", "5"], ["--workers", "-1"], ["--records_a_shard", "0"], ["--part", "x"], ["--format", "gif"]):
        assert write(loose, out, mistral_tokenizer, *flags) == 2


def test_damaged_shards_are_said(made, processor, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in made.glob("*-0000*-of-00003*"):
        (folder / file.name).write_bytes(file.read_bytes())
    shard = sorted(folder.glob("*.array_record"))[0]
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle:middle + 8] = bytes(8)
    shard.write_bytes(data)
    records = read_training(folder)
    bad = [i for i in range(7) if not _is_readable(records, i)]
    assert len(bad) == 1 and records.record(20)["id"]
    with pytest.raises(UserError, match=rf"record {bad[0]} of {shard} cannot be read"):
        records.record(bad[0])
    found = lengths.measure(records, processor, 96)
    run = loader.batches(records, processor, Plan(Stream.of(records, 3), found, Layout(192, 5, 4, True)), 96, epochs=1)
    ids = run.ids(run.state())
    rows = sum(int((batch["segment_ids"].max(1)).sum()) for batch in run)
    assert [(entry["id"], entry["epoch"]) for entry in run.skipped] == [(bad[0], 0)] and "cannot be read" in run.skipped[0]["reason"]
    assert rows == 57 and len(ids) > 4
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="is missing or has another size than its manifest says"):
        read_training(folder)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        read_training(folder)
    manifest = folder / "manifest-00000-of-00003.json"
    for text in ("{}", "[]", "{", json.dumps(json.loads(manifest.read_text()) | {"shards": [{"file": 1}]})):
        manifest.write_text(text)
        with pytest.raises(UserError, match="manifest-00000"):
            read_training(folder)
    manifest.write_text(json.dumps(json.loads((made / manifest.name).read_text()) | {"made_from": 1}))
    with pytest.raises(UserError, match="was written with other data"):
        read_training(folder)
    (folder / "manifest-00000-of-00002.json").write_text("{}")
    with pytest.raises(UserError, match="do not belong together"):
        read_training(folder)
    for data in (b"", b"\xff\xff\xff\xff{}", shards.encode({"id": 1, "conversations": []}, [("a", b"xyz")])[:-1]):
        with pytest.raises(UserError, match="it is not a record"):
            shards.decode(data, "it")


def _is_readable(records, i) -> bool:
    try:
        return bool(records.record(i))
    except UserError:
        return False


def test_jpeg_is_smaller_and_stored_images_are_named(loose, mistral_tokenizer, processor, tmp_path):
    assert write(loose, tmp_path / "j", mistral_tokenizer, "--format", "jpeg", "--quality", "60") == 0
    data = read_training(tmp_path / "j")
    (image,) = data.record(3)["image"]
    assert isinstance(image, Stored) and "record 3 of" in image and load_image(pickle.loads(pickle.dumps(image))).size == (96, 96)
    with pytest.raises(UserError, match="the image of mine"):
        load_image(Stored("of mine", b"nothing"))
    assert json.loads((tmp_path / "j/manifest-00000-of-00001.json").read_text())["images"]["quality"] == 60
    assert os.path.getsize(tmp_path / "j" / "part-00000-of-00001-00000.array_record") > 0


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Six records of one image each, three shards of two; the numbers of the shards that are written."""
    for i in range(6):
        Image.new("RGB", (9, 9), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [{"id": i, "image": f"{i}.png", "conversations": [{"from": "human", "value": f"<image>\n{i}"}, {"from": "gpt", "value": "a"}]} for i in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    written, real = [], shard_writer.Writer._shard
    monkeypatch.setattr(shard_writer.Writer, "_shard", lambda self, number, *rest: (written.append(number), real(self, number, *rest))[1])
    return tmp_path, written


def two_a_shard(folder, tokenizer, *more):
    return write(folder, folder / "out", tokenizer, *more, span="2")


@pytest.mark.parametrize("broken", [(2, 3), (0, 1, 2, 3, 4, 5), (0, 1), (4, 5)])
def test_a_shard_of_which_no_record_can_be_used_is_empty(few, mistral_tokenizer, processor, capsys, broken):
    folder, _ = few
    for i in broken:
        (folder / f"{i}.png").unlink()
    assert two_a_shard(folder, mistral_tokenizer) == 0
    empty = len(broken) // 2
    assert f"{empty} shard{'s hold' if empty > 1 else ' holds'} no record" in (said := capsys.readouterr().out) and f"cannot be read: {len(broken)}" in said
    if len(broken) == 6:
        with pytest.raises(UserError, match="holds no training records"):
            read_training(folder / "out")
        return
    data = read_training(folder / "out")
    assert [data.record(i)["id"] for i in range(len(data))] == [i for i in range(6) if i not in broken]
    assert lengths.measure(data, processor, 96).tokens.shape == (6 - len(broken),)


def test_shards_whose_images_have_changed_are_written_again(few, mistral_tokenizer, processor, capsys):
    folder, written = few
    reds = lambda: [int(np.asarray(load_image(record["image"][0]))[48, 48, 0]) for record in read_training(folder / "out").readable()]
    (folder / "3.png").rename(folder / "kept.png")
    assert two_a_shard(folder, mistral_tokenizer) == 0 and reds() == [0, 10, 20, 40, 50] and written == [0, 1, 2]

    def again(*more):
        written.clear()
        capsys.readouterr()
        assert two_a_shard(folder, mistral_tokenizer, *more) == 0
        return written, capsys.readouterr().out

    assert again()[0] == [] and "is complete already" in again()[1]
    (folder / "kept.png").rename(folder / "3.png")  # an image that was missing
    assert again()[0] == [1] and reds() == [0, 10, 20, 30, 40, 50]
    whole = json.loads((folder / "out/manifest-00000-of-00001.json").read_text())
    assert json.loads((folder / "out/dropped-00000-of-00001.json").read_text()) == {"dropped": []}
    assert lengths.measure(read_training(folder / "out"), processor, 96).tokens.all() and len(whole["shards"]) == 3
    Image.new("RGB", (9, 9), (99, 0, 0)).save(folder / "4.png")  # another picture
    found, said = again()
    assert found == [2] and reds() == [0, 10, 20, 30, 99, 50] and "1 shard is missing or has other images now; it is written again" in said
    (folder / "0.png").unlink()  # what is gone stays in the shard
    found, said = again()
    assert found == [] and reds()[0] == 0 and "1 image is gone since; the shard keeps their pixels" in said
    (folder / "out" / "part-00000-of-00001-00001.array_record").unlink()
    assert again()[0] == [1] and reds() == [0, 10, 20, 30, 99, 50]
    other = folder / "other"
    other.mkdir()
    for i in range(6):
        Image.new("RGB", (9, 9), (200 + i, 0, 0)).save(other / f"{i}.png")
    assert again("--images", str(other))[0] == [0, 1, 2] and reds() == [200, 201, 202, 203, 204, 205]
    real = shard_writer.Encode.image

    def fails(self, source):  # a disk that fails for a while: the file is the same afterwards
        if source.endswith("5.png"):
            raise UserError("no")
        return real(self, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.Encode, "image", fails)
        Image.new("RGB", (9, 9), (7, 0, 0)).save(other / "4.png")
        assert again("--images", str(other))[0] == [2] and reds() == [200, 201, 202, 203, 7]
        assert again("--images", str(other))[0] == []
    assert again("--images", str(other))[0] == [2] and reds() == [200, 201, 202, 203, 7, 205]


def _reds(out):
    return [int(np.asarray(load_image(record["image"][0]))[48, 48, 0]) for record in read_training(out).readable()]


def _as_an_earlier_version_wrote(out, kind):
    """Takes away what tells of the images, or other files beside the shards."""
    manifest, images = out / "manifest-00000-of-00001.json", out / "images-00000-of-00001.npz"
    found = json.loads(manifest.read_text())
    if kind == "old":
        images.unlink()
        [shard.pop("rest") for shard in found["shards"]]
        manifest.write_text(json.dumps(found))
    elif kind == "damaged images":
        images.write_bytes(images.read_bytes()[:40])
    elif kind == "images of another part":
        np.savez(images, seen=np.zeros(2, np.uint64), counts=np.array([2]))
    elif kind == "no lengths":
        next(out.glob("lengths-*")).unlink()
    elif kind == "no list of what was dropped":
        (out / "dropped-00000-of-00001.json").unlink()


@pytest.mark.parametrize("kind", ["old", "damaged images", "images of another part", "no lengths", "no list of what was dropped"])
def test_missing_evidence_is_no_reason_to_write_a_shard_again(few, mistral_tokenizer, processor, kind):
    """All images are gone, the shards stay; then one image comes with another picture, and the others' pixels stay."""
    folder, written = few
    out = folder / "out"
    assert two_a_shard(folder, mistral_tokenizer) == 0
    whole = lengths.measure(read_training(out), processor, 96)
    hashes = lambda: [shard["sha256"] for shard in json.loads((out / "manifest-00000-of-00001.json").read_text())["shards"]]
    before = hashes()
    _as_an_earlier_version_wrote(out, kind)
    for path in folder.glob("?.png"):
        path.unlink()
    for _ in range(2):
        written.clear()
        assert two_a_shard(folder, mistral_tokenizer) == 0 and written == [] and hashes() == before
        assert _reds(out) == [0, 10, 20, 30, 40, 50] and np.load(out / "images-00000-of-00001.npz")["counts"].tolist() == [2, 2, 2]
    Image.new("RGB", (9, 9), (99, 0, 0)).save(folder / "4.png")
    assert two_a_shard(folder, mistral_tokenizer) == 0 and written == [2] and _reds(out) == [0, 10, 20, 30, 99, 50]
    found = lengths.measure(read_training(out), processor, 96)
    assert found.tokens.tolist() == whole.tokens.tolist() and lengths.rest_of(found) == lengths.rest_of(whole)
    assert json.loads((out / "dropped-00000-of-00001.json").read_text()) == {"dropped": []} and not list(out.glob(".part*.json"))
    assert two_a_shard(folder, mistral_tokenizer) == 0 and written == [2]


def test_a_stopped_writer_of_an_earlier_version_keeps_its_shards(few, mistral_tokenizer, monkeypatch):
    folder, written = few
    out, real = folder / "out", shard_writer.Writer._finish
    monkeypatch.setattr(shard_writer.Writer, "_finish", lambda *_: None)
    assert two_a_shard(folder, mistral_tokenizer) == 0
    monkeypatch.setattr(shard_writer.Writer, "_finish", real)
    for file in out.glob(".part-*.json"):
        found = json.loads(file.read_text())
        found["shard"].pop("rest")
        file.write_text(json.dumps({key: value for key, value in found.items() if key not in ("seen", "number")}))
    for path in folder.glob("?.png"):
        path.unlink()
    assert two_a_shard(folder, mistral_tokenizer) == 0 and written == [0, 1, 2] and _reds(out) == [0, 10, 20, 30, 40, 50]
    assert all(shard["rest"] for shard in json.loads((out / "manifest-00000-of-00001.json").read_text())["shards"])


@pytest.mark.parametrize(("workers", "is_stopped"), [("0", False), ("1", False), ("0", True)])
def test_a_gone_image_keeps_its_pixels_where_another_of_its_shard_changed(few, mistral_tokenizer, processor, capsys, monkeypatch, workers, is_stopped):
    """One shard of: an image that never was, gone ones, a changed one, and a record with a gone and a changed image."""
    folder, _ = few
    out = folder / "out"
    rows = json.loads((folder / "data.json").read_text())
    rows[5] |= {"image": ["2.png", "3.png"], "conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]}
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "0.png").unlink()
    again = lambda workers=workers: write(folder, out, mistral_tokenizer, "--workers", workers, span="6")
    assert again("0") == 0
    for name, red in (("1.png", None), ("2.png", None), ("3.png", 99)):
        Image.new("RGB", (9, 9), (red, 0, 0)).save(folder / name) if red else (folder / name).unlink()
    if is_stopped:
        with monkeypatch.context() as patch:
            patch.setattr(shard_writer.Writer, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("stopped by SIGTERM")))
            assert again() == 75
    for _ in range(2):
        assert again() == 0
        reds = [[int(np.asarray(load_image(image))[48, 48, 0]) for image in record["image"]] for record in read_training(out).readable()]
        assert reds == [[10], [20], [99], [40], [20, 99]]
        assert [each["record"] for each in json.loads((out / "dropped-00000-of-00001.json").read_text())["dropped"]] == [0]
        said = capsys.readouterr().out
    assert "is complete already" in said and "3 images are gone since" in said
    assert lengths.measure(read_training(out), processor, 96).images.tolist() == [1, 1, 1, 1, 2]


def test_a_manifest_of_other_shards_is_refused(few, mistral_tokenizer, capsys):
    folder, written = few
    assert two_a_shard(folder, mistral_tokenizer) == 0
    file = folder / "out/manifest-00000-of-00001.json"
    found = json.loads(file.read_text())
    for listed in (None, found["shards"][:2], [*found["shards"][:2], 7]):
        file.write_text(json.dumps({**found, "shards": listed}))
        assert two_a_shard(folder, mistral_tokenizer) == 1 and "lists other shards" in capsys.readouterr().err
    assert written == [0, 1, 2]


def test_a_manifest_has_the_hash_of_each_shard(made):
    listed = [shard for file in sorted(made.glob("manifest-*")) for shard in json.loads(file.read_text())["shards"]]
    assert len(listed) >= 9
    for shard in listed:
        data = (made / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest() and shard["bytes"] == len(data)
