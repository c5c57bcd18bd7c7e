"""The texts of `configs/smol.py`'s first two stages."""

import json
from pathlib import Path

import pytest

from llavamed_jax.errors import UserError
from samples import smol, smol_texts

SAMPLE = Path(__file__).parents[1] / "samples/vqa_rad"


def test_images_of_a_folder_that_is_named_relatively_are_found(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/vqa_rad").symlink_to(SAMPLE)
    monkeypatch.chdir(tmp_path)
    found = smol_texts.write([Path("data/vqa_rad")], Path("texts"))
    for name, count in found.items():
        records = json.loads((tmp_path / "texts" / name).read_text(encoding="utf-8"))
        assert len(records) == count > 0
        assert all((tmp_path / "texts" / record["image"]).is_file() for record in records)


def test_every_answered_question_stands_once_with_the_sets_own_answer():
    samples = smol_texts.read(SAMPLE)
    assert any(not sample.answer.strip() for sample in samples) or len(samples) > 400
    records = smol_texts.texts(samples)["questions.json"]
    turns = [(record["image"], human["value"].removeprefix("<image>\n"), gpt["value"]) for record in records
             for human, gpt in zip(record["conversations"][::2], record["conversations"][1::2], strict=True)]
    wanted = [(str(s.image), s.question.strip(), s.answer.strip()) for s in samples if s.answer.strip()]
    assert sorted(turns) == sorted(wanted)
    sizes = [len(record["conversations"]) // 2 for record in records]
    assert max(sizes) == smol_texts.QUESTIONS and min(sizes) >= 1
    assert all(text["value"].startswith("<image>\n") == (n == 0) for record in records
               for n, text in enumerate(record["conversations"]) if text["from"] == "human")
    assert [r["conversations"] for r in smol_texts.texts(samples, 1)["questions.json"]] != [r["conversations"] for r in records]


def test_parts_of_a_list_are_few_and_alike():
    for n in range(1, 40):
        found = smol_texts._groups([*range(n)])
        assert sum(found, []) == [*range(n)] and len(found) == -(-n // 6) and max(map(len, found)) - min(map(len, found)) <= 1


def test_a_folder_that_was_made_otherwise_is_refused(tmp_path, monkeypatch):
    """Its tower would be another's, and its name would say otherwise."""
    built = []
    monkeypatch.setattr(smol.smollm2, "fetch", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(smol, "command", lambda *words: (built.append(words), Path(words[-1]).mkdir(parents=True)))
    out = tmp_path / "out"
    for _ in range(2):
        smol.prepare(out, [], "preset:small", 0)
    assert len(built) == 1 and "preset:small" in built[0] and (out / "texts/questions.json").is_file()
    for other in (([SAMPLE], "preset:small", 0), ([], "runs/small", 0), ([], "preset:small", 1)):
        with pytest.raises(UserError, match="was made from .*; another --out was expected for"):
            smol.prepare(out, *other)
    (out / "made_from.json").unlink()
    with pytest.raises(UserError, match="was made from what it does not say"):
        smol.prepare(out, [], "preset:small", 0)
    assert len(built) == 1
