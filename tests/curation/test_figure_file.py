"""Files of figures: four layouts, and records that cannot be used are counted."""

import json

import pytest

from llavamed_jax.curation.figure_file import FigureFile, domain_of
from llavamed_jax.errors import UserError
from tests.support.figure_records import DOMAINS, figure, write_lines

ROWS = [figure(n) for n in range(7)]


def write(path, layout):
    if layout == "lines":
        return write_lines(path, ROWS)
    if layout == "list":
        text = json.dumps(ROWS, indent=1)
    else:
        text = json.dumps({name: [row for row in ROWS if row["domain"][name]] for name in DOMAINS}, indent=None if layout == "one line" else 2)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("layout", ["lines", "list", "domains", "one line"])
def test_layouts(tmp_path, layout):
    file = FigureFile(write(tmp_path / "f.json", layout))
    found = {each.pair_id: each for _, each in file.figures()}
    assert len(found) == len(file) == 7 and not file.skipped
    one = found[ROWS[1]["pair_id"]]
    assert (one.label, one.caption, one.mentions) == ("Figure 1", "Caption number 1 of a mri image.", ("Finding 1 is shown.",))
    assert one.image == f"{one.pair_id}.jpg" and one.domain == "mri" and one.domains == ROWS[1]["domain"] and one.licence is None
    assert [each.pair_id for each in file.round_robin()] == [row["pair_id"] for row in ROWS]
    assert [each.pair_id for each in file.round_robin(6)] == [row["pair_id"] for row in ROWS[:6]]
    assert file.describe().endswith("7 figures (2 chest_xray, 2 mri, 1 ct_scan, 1 histology, 1 gross)")


def test_what_cannot_be_used_is_counted(tmp_path):
    rows = [figure(0), figure(0), 5, figure(1, pair_id=None), figure(2, fig_caption=" "), figure(3, fig_caption=7), figure(4, in_text_mention=3),
            figure(5, fig_caption="half \ud83d"), figure(6, image=["a"]), {}]
    path = write_lines(tmp_path / "f.jsonl", rows)
    path.write_text(path.read_text(encoding="utf-8") + '{"pair_id": "x", "fig_ca', encoding="utf-8")
    file = FigureFile(path)
    assert len([*file.figures()]) == 1
    assert file.skipped == {"a pair_id that occurred before": 1, "not an object": 1, "without pair_id": 2, "without caption": 2,
                            "with mentions that are not a list": 1, "with half a surrogate pair in a text": 1,
                            "with an image that is not a name": 1, "not JSON": 1}
    assert "not used: 2 without pair_id" in file.describe()


def test_optional_fields_and_odd_types(tmp_path):
    rows = [{"pair_id": 7, "fig_caption": "a"}, figure(1, in_text_mention=["one", {"tokens": "two"}, {"tokens": None}, 3, " "], image="a/b.png", licence="CC BY"),
            figure(2, in_text_mention="one sentence", license="CC0", domain="CT")]
    one, two, three = (each for _, each in FigureFile(write_lines(tmp_path / "f.jsonl", rows)).figures())
    assert (one.pair_id, one.image, one.label, one.domain, one.mentions) == ("7", "7.jpg", "", "other", ())
    assert (two.mentions, two.image, two.licence) == (("one", "two"), "a/b.png", "CC BY")
    assert (three.mentions, three.licence, three.domain) == (("one sentence",), "CC0", "CT")
    assert domain_of({"gross": True, "mri": True}) == "mri" and domain_of({"x": 1}) == "other" and domain_of({"mri": False, "x": True}) == "x"


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds no figures"), ("[]", "holds no figures"), ('{"a": 1', None), ("[{}", "is not valid JSON"),
    ('{\n"a": 1\n}', "is an object with the keys 'a'"), ('{"a": [], "b": 1}\n', None), ("\xff", None),
])
def test_files_that_hold_no_figures(tmp_path, text, said):
    (tmp_path / "f.json").write_text(text, encoding="latin-1")
    if said is None:  # lines without a usable record
        file = FigureFile(tmp_path / "f.json")
        assert not file.places() and file.skipped.total() == 1 and "no usable figures" in file.describe()
    else:
        with pytest.raises(UserError) as found:
            FigureFile(tmp_path / "f.json")
        assert said in str(found.value)


def test_a_file_that_is_not_there(tmp_path):
    for path, said in ((tmp_path / "no.json", "does not exist"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=said):
            FigureFile(path)
