"""The texts of `configs/smol.py`'s first two stages."""

import json
from pathlib import Path

from samples import smol_texts

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
