"""Of the alternatives of one graphic, `curation figures` takes the first that is there, and previews last."""

import json

import pytest

from llavamed_jax.curation.__main__ import main
from tests.support.pmc_bucket import picture

pytest.importorskip("lxml")

THUMB, PRINT = 'content-type="thumbnail"', 'specific-use="print"'


@pytest.mark.parametrize(("graphics", "there", "taken"), [
    ({"b.jpg": PRINT, "a.jpg": THUMB}, "a.jpg b.jpg", "b.jpg"), ({"a.jpg": THUMB, "b.jpg": PRINT}, "a.jpg b.jpg", "b.jpg"),
    ({"b.jpg": PRINT, "a.jpg": 'specific-use="web"'}, "a.jpg b.jpg", "b.jpg"), ({"b.tif": PRINT, "a.jpg": THUMB}, "a.jpg b.jpg", "b.jpg"),
    ({"b.jpg": PRINT, "a.jpg": THUMB}, "a.jpg", "a.jpg"), ({"a.gif": "", "b.jpg": ""}, "a.gif b.jpg", "b.jpg"),
    ({"b-thumb.jpg": "", "a.gif": "", "c.png": ""}, "a.gif b-thumb.jpg c.png", "c.png"),
    ({"a.png": 'content-type="flow-chart"', "b.gif": ""}, "a.png b.gif", "a.png"),
])
def test_a_thumbnail_is_taken_last(tmp_path, graphics, there, taken):
    inner = "".join(f'<graphic xlink:href="{name}" {use}/>' for name, use in graphics.items())
    (tmp_path / "in").mkdir()
    images = {name: picture(n, {"jpg": "JPEG"}.get(name[-3:], name[-3:].upper())) for n, name in enumerate(there.split())}
    for name, data in images.items():
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in/x.xml").write_text(
        '<article xmlns:xlink="http://www.w3.org/1999/xlink"><body><fig id="F1"><label>Fig. 1</label><caption><p>Axial CT.</p></caption>'
        f"<alternatives>{inner}</alternatives></fig></body></article>")
    assert main(["figures", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    (record,) = map(json.loads, (tmp_path / "out/figures.jsonl").read_text().splitlines())
    assert (tmp_path / "out/images" / record["image"]).read_bytes() == images[taken]
