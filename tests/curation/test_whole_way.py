"""From article packages to a packed training batch: pmc, figures, align, records and the loader, on a bucket of two articles."""

import json

import numpy as np
import pytest

from llavamed_jax.config import IMAGE_TOKEN, preset
from llavamed_jax.curation import downloads
from llavamed_jax.curation.__main__ import main
from llavamed_jax.datasets.training import read_training
from llavamed_jax.pipeline import lengths, loader
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from tests.support.pmc_bucket import Bucket, picture

pytest.importorskip("httpx")
pytest.importorskip("lxml")


def test_from_articles_to_a_packed_batch(tmp_path, mistral_tokenizer, monkeypatch):
    monkeypatch.setattr(downloads, "BACKOFF_S", 0.001)
    with Bucket() as bucket:
        for n in (1, 2):
            figures = "".join(f'<fig id="F{i}"><label>Fig. {i}</label><caption><p>Axial CT of patient {n}, slice {i}.</p></caption>'
                              f'<graphic xmlns:x="http://www.w3.org/1999/xlink" x:href="f{i}"/></fig>' for i in (1, 2))
            xml = (f'<article><front><article-meta><article-id pub-id-type="pmid">{70 + n}</article-id></article-meta></front>'
                   f"<body>{figures}<p>Fig. 1 shows a mass.</p></body></article>").encode()
            bucket.article(f"PMC{n}", 1, {f"f{i}.jpg": picture(10 * n + i) for i in (1, 2)}, xml=xml)
        (tmp_path / "list.txt").write_text("PMC1\nPMC2\n")
        assert main(["pmc", "--list", str(tmp_path / "list.txt"), "--out", str(tmp_path / "pmc"), "--base_url", bucket.url, "--rate", "0"]) == 0
    made = tmp_path / "figures"
    assert main(["figures", "--source", str(tmp_path / "pmc"), "--out", str(made)]) == 0
    rows = [json.loads(line) for line in (made / "figures.jsonl").read_text().splitlines()]
    assert [(row["pair_id"], row["licence"], row["domain"]["ct_scan"], bool(row["in_text_mention"])) for row in rows] == [
        ("71_F1", "CC BY", True, True), ("71_F2", "CC BY", True, False), ("72_F1", "CC BY", True, True), ("72_F2", "CC BY", True, False)]
    assert main(["align", "--figures", str(made / "figures.jsonl"), "--out", str(tmp_path / "alignment.json"), "--images", str(made / "images")]) == 0
    assert main(["records", "--data", str(tmp_path / "alignment.json"), "--images", str(made / "images"), "--checkpoint", "preset:small",
                 "--tokenizer", str(mistral_tokenizer), "--max_length", "160", "--out", str(tmp_path / "shards")]) == 0
    data, processor = read_training(tmp_path / "shards"), Processor(preset("small"), Tokenizer.load(mistral_tokenizer))
    plan = Plan(Stream.of(data, 0), lengths.measure(data, processor, 160), Layout(320, 4, 2, True))
    (batch,) = loader.batches(data, processor, plan, 160, epochs=1)
    assert batch["num_images"].sum() == 4 and (batch["input_ids"] == IMAGE_TOKEN).sum() == 4 * processor.tokens_per_image
    wanted = processor.images_uint8([str(path) for path in sorted((made / "images").iterdir())])
    found = [pixels for row, count in zip(batch["pixel_values"], batch["num_images"]) for pixels in row[:count]]
    assert sorted(map(lambda each: each.tobytes(), found)) == sorted(map(lambda each: each.tobytes(), np.asarray(wanted)))
