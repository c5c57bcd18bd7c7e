"""`align`: short captions answer short instructions, long ones detailed ones; training reads the file."""

import json
from collections import Counter

import pytest

from llavamed_jax.curation import __main__ as command_line
from llavamed_jax.curation.align import OWN, read_instructions
from llavamed_jax.datasets.records import open_records
from llavamed_jax.errors import UserError
from tests.support.figure_records import figure, write_lines


def align(tmp_path, rows, *more, out="a.json"):
    write_lines(tmp_path / "f.jsonl", rows)
    status = command_line.main(["align", "--figures", str(tmp_path / "f.jsonl"), "--out", str(tmp_path / out), *more])
    return status, (json.loads((tmp_path / out).read_text(encoding="utf-8")) if (tmp_path / out).exists() and out.endswith(".json") else None)


def test_own_instructions_are_eleven_and_sixteen():
    found = read_instructions(OWN)
    assert {kind: len(set(lines)) for kind, lines in found.items()} == {"concise": 11, "detailed": 16}


def test_the_length_of_a_caption_picks_the_list(tmp_path, capsys):
    rows = [figure(n, fig_caption=" ".join(["word"] * (29 + n % 2)) + "\n", licence="CC BY") for n in range(300)]
    status, records = align(tmp_path, rows)
    assert status == 0
    lists, used, sides = read_instructions(OWN), Counter(), Counter()
    for n, record in enumerate(records):
        assert list(record) == ["id", "image", "domain", "licence", "conversations"] and record["image"] == f"{rows[n]['pair_id']}.jpg"
        question, answer = (turn["value"] for turn in record["conversations"])
        assert answer == " ".join(["word"] * (29 + n % 2))
        instruction = question.replace("<image>", "").strip()
        assert instruction in lists["detailed" if n % 2 else "concise"]
        assert question in (f"{instruction}\n<image>", f"<image>\n{instruction}")
        used[instruction] += 1
        sides[question.startswith("<image>")] += 1
    assert len(used) == 27 and min(sides.values()) > 100
    read = open_records(tmp_path / "a.json", tmp_path)
    assert len(read) == 300 and all("surplus" not in read[i] for i in range(300))
    assert "300 samples, 150 concise (fewer than 30 words) and 150 detailed" in capsys.readouterr().out
    assert align(tmp_path, rows)[1] == records and align(tmp_path, rows, "--seed", "1")[1] != records
    assert align(tmp_path, rows[::-1])[1] == records[::-1]  # a sample does not depend on its place
    _, records = align(tmp_path, rows, "--short_words", "0")
    assert all(record["conversations"][0]["value"].replace("<image>", "").strip() in lists["detailed"] for record in records)


def test_what_is_left_out_is_counted(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / f"{figure(0)['pair_id']}.jpg").touch()
    rows = [figure(0, fig_caption="A <image> scan."), figure(1), figure(2, fig_caption="…"), figure(3, fig_caption=None), 5]
    status, _ = align(tmp_path, rows, "--images", str(tmp_path / "images"), out="a.jsonl")
    (line,) = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert status == 0 and json.loads(line)["conversations"][1]["value"] == "A  scan."
    said = capsys.readouterr().out
    assert all(f"1 {reason}" in said for reason in ("without an image file", "with a caption that has no words", "without caption", "not an object"))
    assert align(tmp_path, rows[2:], out="b.json") == (1, None)
    assert "has no figure that can be used: 1 " in capsys.readouterr().err


def test_a_directory_in_the_place_of_the_file(tmp_path, capsys):
    write_lines(tmp_path / "f.jsonl", [figure(0)])
    assert command_line.main(["align", "--figures", str(tmp_path / "f.jsonl"), "--out", str(tmp_path)]) == 2
    assert f"--out is {tmp_path}, which is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "status", "said"), [
    (["--images", "nowhere"], 2, "--images is nowhere, which is not a folder"),
    (["--short_words", "-1"], 2, "--short_words is -1; at least 0 was expected"),
    (["--instructions", "nowhere"], 2, "the instructions nowhere cannot be read"),
])
def test_mistakes_are_one_sentence(tmp_path, capsys, more, status, said):
    assert align(tmp_path, [figure(0)], *more)[0] == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[[concise]]\na", "[[concise]]\na\n[[detailed]]\n", "x\n[[concise]]\na\n[[detailed]]\nb",
                                  "[[concise]]\na\n[[detailed]]\nb\n[[detailed]]\nc", "[[concise]]\na <image>\n[[detailed]]\nb"])
def test_instructions_that_cannot_be_used(tmp_path, text):
    (tmp_path / "i.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"\[\[concise\]\] and \[\[detailed\]\]"):
        read_instructions(tmp_path / "i.txt")
