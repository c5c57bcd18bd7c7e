"""`inspect`: counts, copies of images, leakage into an evaluation; different images of one organ are not copies."""

import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.curation import __main__ as command_line
from llavamed_jax.curation.inspect import gather, leakage, near
from llavamed_jax.curation.inspect.pictures import Pictures, read_pictures
from llavamed_jax.curation.inspect.verbs import VERBS, verb_and_noun
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError
from tests.support.figure_records import figure, write_lines

pytest.importorskip("imagehash")
SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad"
IMAGES = sorted((SAMPLES / "images").glob("*.jpg"))


def copy(source: Path, target: Path, how: int) -> str:
    """A copy as data sets make them: resized, compressed, grey."""
    image = Image.open(source).convert("RGB")
    size = [(image.width // 2, image.height // 2), (224, 224), image.size, (image.width * 3 // 2, image.height * 3 // 2), image.size][how % 5]
    image = image.resize(size, Image.Resampling.BICUBIC)
    if how % 5 == 4:
        image = image.convert("L")
    image.save(target, quality=[50, 75, 15, 40, 70][how % 5])
    return str(target)


def pictures(paths) -> Pictures:
    return read_pictures(list(map(str, paths)), 1, lambda count: None)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_copies_are_found_and_other_images_of_the_same_organ_are_not(tmp_path):
    tested = pictures(IMAGES)
    copies = pictures([copy(path, tmp_path / f"{n}.jpg", n) for n, path in enumerate(IMAGES[::2])])
    found = near.matches(tested, copies)
    assert {i: [j for j, _, _ in each] for i, each in found.items()} == {2 * i: [i] for i in range(len(copies))}
    assert all(bits <= 12 and correlation > 0.995 for ((_, bits, correlation),) in found.values())
    assert near.groups(tested).groups == []
    hashes = tested.hashes
    apart = [int(np.bitwise_count(hashes[i] ^ hashes[j]).sum()) for i, j in itertools.combinations(range(len(IMAGES)), 2)]
    assert min(apart) > 60  # chest X-rays, CT and MRI slices; far above `near.MOST_BITS`


def test_groups_are_those_of_all_pairs(tmp_path):
    """Sorting by bands finds what comparing each with each finds; groups join along chains."""
    rng = np.random.default_rng(0)
    count = 300
    thumbnails = np.repeat(rng.integers(0, 255, (30, 32, 32), np.uint8), 10, 0)
    hashes = np.repeat(rng.integers(0, 2**63, (30, 4), np.uint64), 10, 0)
    for row in hashes:
        for bit in rng.choice(256, rng.integers(0, 12), replace=False):
            row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    order = rng.permutation(count)
    found = Pictures([str(n) for n in range(count)], hashes[order], thumbnails[order], np.arange(2 * count, dtype=np.uint64).view("V16"), [""] * count)
    wanted = {}
    parent = list(range(count))
    for i, j in itertools.combinations(range(count), 2):
        if np.bitwise_count(found.hashes[i] ^ found.hashes[j]).sum() <= near.MOST_BITS and order[i] // 10 == order[j] // 10:
            low, high = sorted((parent[i], parent[j]))
            parent = [low if each == high else each for each in parent]
    for i, each in enumerate(parent):
        wanted.setdefault(each, []).append(i)
    result = near.groups(found)
    assert sorted(result.groups) == sorted(group for group in wanted.values() if len(group) > 1)
    assert result.num_uncompared == result.same_file == 0 and result.num_surplus == sum(len(g) - 1 for g in result.groups)


def test_full_bands_are_said_and_hashes_alone_prove_nothing(monkeypatch):
    monkeypatch.setattr(near, "_MOST_NEIGHBOURS", 3)
    rng = np.random.default_rng(0)
    found = Pictures([str(n) for n in range(20)], np.zeros((20, 4), np.uint64), rng.integers(0, 255, (20, 32, 32), np.uint8),
                     np.arange(40, dtype=np.uint64).view("V16"), [""] * 20)
    result = near.groups(found)  # equal hashes, unlike pictures
    assert result.groups == [] and result.num_uncompared > 0


def test_blank_unreadable_and_missing_images(tmp_path):
    for n, shade in enumerate((0, 0, 3, 250)):
        Image.new("RGB", (40, 30), (shade,) * 3).save(tmp_path / f"{n}.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    found = pictures([*(tmp_path / f"{n}.png" for n in range(4)), tmp_path / "text.png", tmp_path / "none.png", tmp_path, "\0"])
    assert found.states == ["", "", "", "", "not readable", "missing", "missing", "missing"]
    result = near.groups(found)
    assert result.groups == [[0, 1]] and result.same_file == 1 and result.num_blank == 4  # black and almost black are not one picture
    assert near.matches(found, found) == {0: [(0, 0, 1.0), (1, 0, 1.0)], 1: [(0, 0, 1.0), (1, 0, 1.0)], 2: [(2, 0, 1.0)], 3: [(3, 0, 1.0)]}


def test_several_processes_see_the_same(tmp_path, monkeypatch):
    from llavamed_jax.curation.inspect import pictures as module

    monkeypatch.setattr(module, "_FEWEST", 2)
    counted = []
    alone, together = pictures(IMAGES[:6]), read_pictures([*map(str, IMAGES[:6])], 2, counted.append)
    assert (alone.hashes == together.hashes).all() and (alone.files == together.files).all() and sum(counted) == 6
    monkeypatch.setattr(module, "_begin", os.abort)
    with pytest.raises(UserError, match="a process that reads images was ended from outside"):
        read_pictures([*map(str, IMAGES[:6])], 2, counted.append)


# ---- verbs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "wanted"), [
    ("What does the arrow in the image indicate?", ("indicate", "image")),
    ("What does the arrow indicate?", ("indicate", "arrow")),
    ("Can you describe the location of the mass?", ("describe", "location")),
    ("What abnormalities are seen in the right lung?", ("see", "abnormality")),
    ("Where is the lesion located?", ("locate", "lesion")),
    ("What type of image is this?", ("be", "image")),
    ("Is the heart enlarged?", ("be", "heart")),
    ("Are there any fractures visible?", ("be", "fracture")),
    ("What do the brown areas represent in this slide?", ("represent", "slide")),
    ("Which organ system is shown in this image?", ("show", "system")),
    ("Describe the image concisely.", ("describe", "image")),
    ("Does the patient have a pneumothorax?", ("do", "patient")),
    ("What is labelled with A?", None), ("", None), ("Hm?", None), ("Is it?", None),
])
def test_verb_and_noun_of_a_question(question, wanted):
    assert verb_and_noun(question) == wanted


def test_the_verbs_are_a_list_without_repetition():
    assert len(VERBS) == len(set(VERBS)) and VERBS == sorted(VERBS)


# ---- the page --------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Every tag is closed, and nothing is fetched from elsewhere."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def training_file(tmp_path):
    """Records about eight images, of which the evaluation has the first five in other files."""
    records = []
    for n, path in enumerate(IMAGES[:8]):
        copy(path, tmp_path / f"{n}.jpg", n)
        turns = [("<image>\nWhich organ is shown?", f"Organ <b>{n}</b>."), ("Is there a mass?", "No"), ("Is there a mass?", "No")]
        conversations = [{"from": role, "value": text} for pair in turns for role, text in zip(("human", "gpt"), pair)]
        records.append({"id": n, "image": f"{n}.jpg", "conversations": conversations, "domain": {"mri": n % 2 == 0, "ct_scan": n % 2 == 1},
                        "licence": "CC BY" if n else None})
    copy(IMAGES[3], tmp_path / "again.jpg", 1)
    records += [{"id": "again", "image": "again.jpg", "conversations": records[3]["conversations"]},
                {"id": "gone", "image": "gone.jpg", "conversations": records[3]["conversations"]},
                {"id": "text", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
                {"id": "bad", "conversations": []}]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def evaluation(tmp_path):
    """Questions about the first five images in their own files, and about five others."""
    rows = []
    for n, path in enumerate([*IMAGES[:5], *IMAGES[20:25]]):
        answer = f"organ b {n} b" if n in (0, 1) else "Lung"
        for question, gold in (("Which organ is shown?", answer), ("is there a MASS", "no.")):
            rows.append({"id": len(rows), "image": path.name, "answer_type": "OPEN",
                         "conversations": [{"from": "human", "value": f"{question}\n<image>"}, {"from": "gpt", "value": gold}]})
    path = tmp_path / "test.jsonl"
    return write_lines(path, rows)


def test_the_page_and_its_numbers(tmp_path, training_file, evaluation, capsys):
    argv = ["inspect", "--data", str(training_file), "--out", str(tmp_path / "new" / "page.html"), "--json", str(tmp_path / "n.json"),
            "--against", str(evaluation), "--against_images", str(SAMPLES / "images"), "--workers", "1"]
    assert command_line.main(argv) == 0
    found = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))
    assert found["counts"] == {
        "records": 11, "damaged": 1, "without_image": 1, "pairs": 31, "questions": 31, "repeated_pairs": 10, "images": 10,
        "images_missing": 1, "images_not_readable": 0, "duplicate_groups": 1, "images_surplus": 1, "images_same_file": 0,
        "images_blank": 0, "images_not_all_compared": 0}
    assert found["leakage"] == {
        "images": 10, "images_not_readable": 0, "images_same_file": 0, "images_same_picture": 5, "questions": 20,
        "questions_on_same_picture": 10, "same_question_on_same_picture": 10, "same_question_and_answer_on_same_picture": 7,
        "same_question_and_answer_anywhere": 12}
    assert found["domains"] == {"mri": 4, "ct_scan": 4, "not stated": 3} and found["licences"] == {"not stated": 4, "CC BY": 7}
    assert found["unit"] == "words" and found["lengths"]["question"]["max"] == 4 and found["lengths"]["record"]["max"] == 16
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    checked = Checker(text)
    assert checked.sources and all(source.startswith("data:image/jpeg;base64,") for source in checked.sources)
    assert "http" not in re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", text)
    assert "<b>0</b>" not in text and "&lt;b&gt;" in text  # what records say is text
    assert "record 11 of" in text and "gone.jpg" in text and "test.jsonl" in text and "show  " in text
    assert "leakage: 5 of 10 tested images occur" in capsys.readouterr().out


def test_the_same_file_and_a_data_set_in_its_own_layout(tmp_path):
    out = ["--out", str(tmp_path / "p.html"), "--json", str(tmp_path / "n.json"), "--gallery", "0"]
    records = [{"id": n, "image": path.name, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]}
               for n, path in enumerate(IMAGES[:3])]
    write_lines(tmp_path / "few.jsonl", records)
    argv = ["inspect", "--data", str(tmp_path / "few.jsonl"), "--images", str(SAMPLES / "images"), *out]
    assert command_line.main([*argv, "--against", str(tmp_path / "few.jsonl"), "--against_images", str(SAMPLES / "images")]) == 1  # no answer_type
    assert command_line.main([*argv, "--against", str(SAMPLES / "organ.json"), "--against_images", str(SAMPLES / "images")]) == 0
    found = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))["leakage"]
    assert found["images"] == 45 and 0 < found["images_same_file"] <= 3 and found["images_same_picture"] == 0


PROMPT = "Which?\nA. CT\nB. MRI\nAnswer with the letter."


@pytest.mark.parametrize(("asked", "said", "is_asked", "is_answered"), [
    (PROMPT, "B", True, True), (f"<image_1>: \n{PROMPT}", "B. MRI", True, True), ("Question: Which?\nOptions:\n(A) MRI\n(B) CT", "A", True, True),
    ("Question: Which?\nOptions:\n(A) MRI\n(B) CT", "B", True, False), (PROMPT, "A", True, False), ("which", "mri.", True, True),
    ("which", "B", True, False), ("Where?\nA. CT\nB. MRI", "B", False, False),
])
def test_multiple_choice_is_compared_by_the_text_of_the_option(asked, said, is_asked, is_answered):
    """Markers, the order of options and the form of the list change nothing; a letter means what its own list says."""
    tested = VqaSample(1, Path("t.png"), f"<image_1>: <image>\n{PROMPT}", "MRI", "CHOICE", options=("CT", "MRI"), is_placed=True)
    texts = leakage.Texts([tested])
    texts.see(gather.Row("1", ["a.png"], [(asked, said)]))
    assert (texts.asked_about(0), texts.answered_about(0)) == ({"a.png"} if is_asked else set(), {"a.png"} if is_answered else set())


def test_a_folder_with_a_llava_file(tmp_path, training_file):
    argv = ["inspect", "--data", str(tmp_path), "--out", str(tmp_path / "p.html"), "--json", str(tmp_path / "n.json"), "--gallery", "2"]
    assert command_line.main(argv) == 0  # train.json of a folder
    found = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))
    assert found["domains"] == {"mri": 4, "ct_scan": 4, "not stated": 3} and found["leakage"] is None
    Checker((tmp_path / "p.html").read_text(encoding="utf-8"))


def test_files_of_figures(tmp_path):
    write_lines(tmp_path / "f.jsonl", [*(figure(n, licence="CC0") for n in range(10)), figure(1), 5])
    argv = ["inspect", "--data", str(tmp_path / "f.jsonl"), "--out", str(tmp_path / "p.html"), "--json", str(tmp_path / "n.json"),
            "--tokenizer", str(SAMPLES / "tokenizer.model")]
    assert command_line.main(argv) == 0
    found = json.loads((tmp_path / "n.json").read_text(encoding="utf-8"))
    assert found["counts"] | {"records": 11, "damaged": 1, "questions": 0, "pairs": 11, "images_missing": 10} == found["counts"]
    assert found["unit"] == "tokens" and found["lengths"]["question"] == {} and found["lengths"]["answer"]["min"] > 7
    Checker((tmp_path / "p.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("more", "status", "said"), [
    (["--data", "none.json"], 1, "none.json"), (["--against", "none.json"], 1, "the evaluation none.json does not exist"),
    (["--against_images", "x"], 2, "--against_images names the images of --against"), (["--workers", "0"], 2, "--workers is 0"),
    (["--gallery", "-1"], 2, "--gallery is -1"), (["--json", "."], 2, "--json is ., which is a directory"),
    (["--json", "/proc/none/n.json"], 1, "/proc/none/n.json cannot be written"), (["--against_split", "dev"], 2, "dev"),
])
def test_mistakes_are_one_sentence(tmp_path, capsys, more, status, said):
    write_lines(tmp_path / "f.jsonl", [figure(0)])
    argv = ["inspect", *([] if "--data" in more else ["--data", str(tmp_path / "f.jsonl")]), "--out", str(tmp_path / "p.html"), *more]
    assert command_line.main(argv) == status
    err = capsys.readouterr().err
    assert said in err and not (tmp_path / "p.html").exists()
