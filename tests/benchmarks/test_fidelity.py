"""The two scripts behind docs/fidelity.md: the layer table at tiny shapes, and that every row names tests that exist."""

import ast
import functools
import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")

from benchmarks import families, fidelity, true_shapes  # noqa: E402
from llavamed_jax.checkpoints.random import random_checkpoint  # noqa: E402
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig  # noqa: E402
from tests.conftest import ROOT  # noqa: E402

TOWER = VisionConfig(32, 64, 3, 4, 28, 14)
MODELS = {
    "Mistral with a window": LlavaConfig(TOWER, DecoderConfig(2000, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 512, 7, architecture="mistral")),
    "LLaMA, tied, linear projector": LlavaConfig(
        TOWER, DecoderConfig(2000, 48, 96, 2, 4, 4, 12, 1e-6, 1e4, 512, tie_word_embeddings=True), projector_type="linear",
        feature_select="cls_patch", feature_layer=-1, source="llava"),
}
QUESTION = [1, 733, true_shapes.IMAGE_TOKEN, 13, 319, 434, 289]


@pytest.mark.parametrize("name", MODELS)
def test_layers_beside_torch(name):
    cfg = MODELS[name]
    pixels = np.random.default_rng(0).standard_normal((1, 28, 28, 3), np.float32)
    rows = list(true_shapes.compare(true_shapes.roughened(random_checkpoint(cfg)), QUESTION, pixels))
    used = cfg.num_vision_layers_used
    assert [row["after"] for row in rows] == [
        "tower embeddings", *(f"tower layer {i + 1}" for i in range(used)), "projector", "image and text joined",
        "decoder layer 1", "decoder layer 2", "decoder norm", "logits"]
    for row in rows:
        assert row["magnitude"] > 0.1 and row["difference"] <= 1e-5 * row["magnitude"], row


def test_the_layer_table_shows_where_a_mistake_begins(monkeypatch):
    monkeypatch.setattr(true_shapes.llama, "apply_rope", lambda x, rope: x)
    pixels = np.random.default_rng(0).standard_normal((1, 28, 28, 3), np.float32)
    rows = {row["after"]: row for row in true_shapes.compare(random_checkpoint(MODELS["Mistral with a window"]), QUESTION, pixels)}
    assert rows["image and text joined"]["difference"] < 1e-4
    assert rows["decoder layer 1"]["difference"] > 1e-2


@functools.cache
def functions_of(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist():
    known = [*fidelity.QUIRKS, *fidelity.OTHERS]
    selectors = {s for _, _, group, _ in fidelity.GROUPS for s in group} | {row[-1] for row in known} - {None}
    for selector in selectors:
        file, _, function = fidelity.place_of(selector).partition("::")
        assert not function or function in functions_of(file), selector


def test_no_row_puts_off():
    rows = [*(row[1] for row in fidelity.QUIRKS), *(row[2] for row in fidelity.QUIRKS), *(row[-1] for row in fidelity.GROUPS)]
    assert not [text for text in rows if "to come" in text]


def test_rows_say_what_was_measured():
    results = [fidelity.Result("test_a::test_one[x]", "passed", [(1e-7, 1e-6), (5e-3, 1.0)]),
               fidelity.Result("test_a::test_two", "skipped", [])]
    assert [r.belongs("test_a") for r in results] == [True, True]
    assert [r.belongs("test_a::test_one") for r in results] == [True, False]
    assert not results[0].belongs("test_a::test_on")
    assert fidelity.group_row("7", "numbers", results, "note") == "| 7 | numbers | 1 (1 skipped) | 1.0e-07 | 1e-06 | note |"
    assert fidelity.group_row("3", "ids", results[1:], "") == "| 3 | ids | 0 (1 skipped) | holds |  |  |"
    assert fidelity.group_row("5", "later", [], "to come") == "| 5 | later | – | – | – | to come |"


def test_the_document_is_of_this_table():
    """What stands in docs/fidelity.md was written by the script as it is: each group and quirk has its row."""
    file = ROOT / "docs" / "fidelity.md"
    if not file.is_file():
        pytest.skip("docs/fidelity.md has not been made")
    text = file.read_text()
    for _, title, _, _ in fidelity.GROUPS:
        assert f"| {title} |" in text
    assert re.findall(r"^\| (Q\d+) \|", text, re.MULTILINE) == [quirk[0] for quirk in fidelity.QUIRKS] == [f"Q{n}" for n in range(1, 35)]
    for what, *_ in fidelity.OTHERS:
        assert f"| {what} |" in text


def test_the_table_of_families_is_on_the_page_and_no_mutant_is_near():
    data = json.loads(fidelity.FAMILIES.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert "\n".join(fidelity.families()) in page
    found = {(row["family"], row["what"]) for row in data["rows"]}
    names = [name for group in families.TEMPLATES for name in group]
    assert found == {(family, what) for family in families.DECODERS for what in ("logits", "gradient")} | {
        (family, what) for family in families.TOWERS for what in ("features", "gradient")} | {(name, "prompts") for name in names}
    assert not [problem for row in data["rows"] for problem in families.problems(row)]
    near = {**data["rows"][0], "difference": 1.0, "mutants": {"harmless": 0.0, "noticed": 1.0}}
    assert len(list(families.problems(near))) == 2
