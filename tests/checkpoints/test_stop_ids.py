"""The ids that end an answer: config.json and generation_config.json as transformers' generate goes by them, on every way."""

import json
import shutil

import pytest

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.generation_file import not_applied
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli.convert import main
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.errors import UserError
from tests.support import released, tiny

ROW = [1, 5, 9, 20, 33, 41]
ABSENT, NO_FILE = "absent", "no file"
SETTINGS = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 77, "bos_token_id": 1, "pad_token_id": 0,
            "repetition_penalty": 1.05}


def read(directory, name):
    return json.loads((directory / name).read_text())


def write(directory, name, content):
    (directory / name).write_text(json.dumps(content))


# --- beside transformers -------------------------------------------------------------------------------------------------------------

# (what config.json says, what its text_config says, generation_config.json); A and B are ids that the model would write.
COMBINATIONS = {
    "config alone": (ABSENT, "A", NO_FILE),
    "a list in the config": (ABSENT, ["B", "A"], NO_FILE),
    "null in the config": (ABSENT, None, NO_FILE),
    "the outer config first": ("A", "B", NO_FILE),
    "null in the outer config": (None, "A", NO_FILE),
    "the file's id over the config's list": (ABSENT, ["A", "B"], {"eos_token_id": "B"}),
    "the file's list over the config's id": (ABSENT, 2, {"eos_token_id": [2, "A"]}),
    "the file over the outer config": ("A", 2, {"eos_token_id": 2}),
    "a file without ids": (ABSENT, "A", {"bos_token_id": 1}),
    "null in the file": (ABSENT, "A", {"eos_token_id": None}),
    "an empty file": (ABSENT, "A", {}),
    "a file made from the config": (ABSENT, "A", {"_from_model_config": True, "eos_token_id": "B"}),
    "an id that no token has": (ABSENT, "A", {"eos_token_id": [-1, 5000, "B"]}),
}


@pytest.fixture(scope="module")
def free_running(tmp_path_factory):
    """A random model of transformers, two ids that it writes when nothing ends it, the later one first, and all that it writes."""
    pytest.importorskip("torch", reason="torch's CPU build is not installed")
    from tests.support import hf
    root = tmp_path_factory.mktemp("model")
    model, _ = hf.llava("llama", vision=dict(num_hidden_layers=2), text=dict(num_hidden_layers=1), seed=3)
    model.save_pretrained(root)
    write(root, "generation_config.json", {})
    new = theirs(root)
    late, early = (next(i for i in new[k:] if i not in new[:k]) for k in (6, 3))
    return root, {"A": late, "B": early}, new


def theirs(directory):
    import torch
    import transformers
    model = transformers.LlavaForConditionalGeneration.from_pretrained(directory)
    found = model.generate(input_ids=torch.tensor([ROW]), max_new_tokens=14, do_sample=False, pad_token_id=0)
    return found[0, len(ROW):].tolist()


def filled(value, ids):
    if isinstance(value, list):
        return [filled(item, ids) for item in value]
    return ids.get(value, value) if isinstance(value, str) else value


def combined(case, free_running, out):
    """The model with what a combination says in its files."""
    root, ids, _ = free_running
    outer, inner, file = COMBINATIONS[case]
    shutil.copytree(root, out)
    config = read(root, "config.json")
    config.pop("eos_token_id", None)
    config["text_config"]["eos_token_id"] = filled(inner, ids)
    if outer != ABSENT:
        config["eos_token_id"] = filled(outer, ids)
    write(out, "config.json", config)
    if file == NO_FILE:
        (out / "generation_config.json").unlink()
    else:
        write(out, "generation_config.json", {key: filled(value, ids) for key, value in file.items()})
    return out


@pytest.mark.parametrize("case", COMBINATIONS)
def test_the_ids_are_those_that_end_answers_of_transformers(case, free_running, tmp_path):
    model = combined(case, free_running, tmp_path / "model")
    free, wanted = free_running[2], theirs(model)
    write_model(tmp_path / "tree", open_checkpoint(model))
    export(open_checkpoint(tmp_path / "tree"), tmp_path / "again")
    export(open_checkpoint(tmp_path / "tree"), tmp_path / "original", "llava")
    for directory in ("model", "tree", "again", "original"):
        ids = read_config(tmp_path / directory).decoder.eos_ids
        end = next((i + 1 for i, token in enumerate(free) if token in ids), len(free))
        assert free[:end] == wanted, directory
    assert theirs(tmp_path / "again") == wanted


def test_answers_end_where_those_of_transformers_do(free_running, tmp_path):
    """Beams with several ids are compared in tests/test_assistant.py."""
    import llavamed_jax as lm
    model = combined("the file's list over the config's id", free_running, tmp_path / "model")
    ours = lm.load(model, dtype="float32")
    assert ours.generate_tokens([ROW], max_new_tokens=14) == [theirs(model)]


def test_the_combinations_tell_the_files_apart(free_running):
    """The two ids end the answer at different lengths, so that each rule above shows."""
    _, ids, new = free_running
    assert len(new) == 14 and 2 not in new and new.index(ids["B"]) < new.index(ids["A"]) < 13


# --- every layout, every way ---------------------------------------------------------------------------------------------------------


def with_settings(directory, eos=(2, 7, 9)):
    write(directory, "generation_config.json", {**SETTINGS, "eos_token_id": list(eos)})
    return directory


@pytest.mark.parametrize("layout", ["v1.5", "v1.0", "v0", "LLaVA-1.5", "tree", "tree of before"])
def test_every_layout_has_the_ids_of_the_file(layout, tmp_path):
    if layout in ("v1.0", "v0"):
        directory = tiny.save_v1(tmp_path)
        if layout == "v0":
            config = {**tiny.LLAMA, "vocab_size": 73, "vision_tower": "openai/tiny-tower"}
            write(directory, "config.json", config)
    else:
        directory = released.save_v15(tmp_path)
        if layout == "LLaVA-1.5":
            write(directory, "config.json", {**released.V15, "model_type": "llava_llama"})
    with_settings(directory)
    if layout.startswith("tree"):
        write_model(tmp_path / "tree", open_checkpoint(directory))
        directory = tmp_path / "tree"
        if layout == "tree of before":  # which had copied the file and not looked at it
            config = read(directory / "model", "config.json")
            config["decoder"] |= {"eos_token_id": 2, "more_eos_ids": []}
            write(directory / "model", "config.json", config)
    assert open_checkpoint(directory).config.decoder.eos_ids == (2, 7, 9)
    assert read_config(directory).decoder.eos_ids == (2, 7, 9)


@pytest.mark.parametrize("layout", ["transformers", "llava"])
def test_an_export_keeps_ids_and_settings(layout, tmp_path):
    directory = with_settings(released.save_v15(tmp_path))
    write_model(tmp_path / "tree", open_checkpoint(directory))
    assert read(tmp_path / "tree" / "model", "generation_config.json") == {**SETTINGS, "eos_token_id": [2, 7, 9]}
    export(open_checkpoint(tmp_path / "tree"), tmp_path / "out", layout)
    config = read(tmp_path / "out", "config.json")
    assert config.get("text_config", config)["eos_token_id"] == [2, 7, 9]
    pad = 71 if layout == "transformers" else 0  # <pad> is a row of that layout
    assert read(tmp_path / "out", "generation_config.json") == {**SETTINGS, "eos_token_id": [2, 7, 9], "pad_token_id": pad}

    write_model(tmp_path / "again", open_checkpoint(tmp_path / "out"))
    settings = read(tmp_path / "again" / "model", "generation_config.json")
    assert settings == {**SETTINGS, "eos_token_id": [2, 7, 9], "pad_token_id": None if layout == "transformers" else 0} or (
        layout == "transformers" and "pad_token_id" not in settings)
    assert open_checkpoint(tmp_path / "again").config.decoder.eos_ids == (2, 7, 9)


def test_an_export_whose_file_was_changed_ends_as_it_says(tmp_path):
    directory = with_settings(released.save_v15(tmp_path))
    export(open_checkpoint(directory), tmp_path / "out")
    changed = {**read(tmp_path / "out", "generation_config.json"), "eos_token_id": [2, 11], "temperature": 0.3}
    write(tmp_path / "out", "generation_config.json", changed)
    write_model(tmp_path / "tree", open_checkpoint(tmp_path / "out"))
    assert open_checkpoint(tmp_path / "tree").config.decoder.eos_ids == (2, 11)
    assert read(tmp_path / "tree" / "model", "generation_config.json")["temperature"] == 0.3


def test_another_tokenizer_does_not_take_the_settings_away(tmp_path, capsys):
    directory = with_settings(released.save_v15(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.model").write_bytes((tiny_tokenizer := sample_tokenizer()).read_bytes())
    write(tmp_path / "other", "generation_config.json", {"eos_token_id": 3})
    for source in (tmp_path / "other", tiny_tokenizer):
        out = tmp_path / f"out-{source.name}"
        assert main(["import", "--checkpoint", str(directory), "--tokenizer", str(source), "--out", str(out)]) == 0
        assert open_checkpoint(out).config.decoder.eos_ids == (2, 7, 9)
        assert open_checkpoint(out).files.keys() == {"tokenizer.model", "generation_config.json"}
    capsys.readouterr()


def sample_tokenizer():
    from tests.support.training_runs import SAMPLE
    return SAMPLE / "tokenizer.model"


def test_a_decoder_that_is_built_in_keeps_its_ids(tmp_path, capsys):
    tiny.save(tmp_path / "decoder", tiny.MISTRAL, tiny.drawn(tiny.decoder_shapes(tiny.MISTRAL)))
    with_settings(tmp_path / "decoder")
    tiny.save_clip(tmp_path / "clip")
    assert main(["build", "--decoder", str(tmp_path / "decoder"), "--vision", str(tmp_path / "clip"), "--projector", "mlp2x_gelu",
                 "--out", str(tmp_path / "out")]) == 0
    assert open_checkpoint(tmp_path / "out").config.decoder.eos_ids == (2, 7, 9)
    capsys.readouterr()


def test_a_run_starts_with_the_ids_and_keeps_them(tmp_path):
    from llavamed_jax.training.start import open_start
    from tests.support.training_runs import SAMPLE, shrunk, write_data, write_start
    start, data = write_start(tmp_path / "start"), write_data(tmp_path)
    with_settings(start / "model")
    for changes in ({}, {"tokenizer": SAMPLE / "tokenizer.model"}):
        checkpoint = open_start(shrunk(start, data, **changes))
        assert checkpoint.config.decoder.eos_ids == (2, 7, 9)
        assert "generation_config.json" in checkpoint.files


def test_the_first_conversions_of_llama_are_mended_in_both_files(tmp_path):
    directory = tiny.save_v1(tmp_path)
    wrong = {"bos_token_id": 0, "eos_token_id": 1}
    write(directory, "config.json", {**read(directory, "config.json"), **wrong})
    write(directory, "generation_config.json", {"_from_model_config": True, **wrong, "pad_token_id": 0})
    write_model(tmp_path / "tree", open_checkpoint(directory))
    for path in (directory, tmp_path / "tree"):
        decoder = open_checkpoint(path).config.decoder
        assert (decoder.bos_token_id, decoder.eos_ids) == (1, (2,))
    written = read(tmp_path / "tree" / "model", "generation_config.json")
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, 2)


# --- what cannot be obeyed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "7"], [], {"id": 2}, [[2]]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ids_of_another_kind_are_one_sentence(file, value, tmp_path):
    directory = released.save_v15(tmp_path)
    content = read(directory, "config.json") if file == "config.json" else {}
    write(directory, file, {**content, "eos_token_id": value})
    with pytest.raises(UserError, match=f"{file} has eos_token_id .*; an id, a list of ids or null was expected") as error:
        open_checkpoint(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_settings_that_are_not_applied_are_said(tmp_path, capsys):
    import llavamed_jax as lm
    directory = released.save_v15(tmp_path)
    write(directory, "generation_config.json", {
        **SETTINGS, "eos_token_id": 2, "suppress_tokens": [5], "no_repeat_ngram_size": 0, "length_penalty": 1.0, "bad_words_ids": [],
        "early_stopping": False, "new_of_tomorrow": 3})
    lm.load(directory)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert "has new_of_tomorrow 3, repetition_penalty 1.05, suppress_tokens [5], which transformers' generate applies" in said
    write(directory, "generation_config.json", {"eos_token_id": 2, "temperature": 0.6})
    lm.load(directory)
    assert "warning" not in capsys.readouterr().err
    (directory / "generation_config.json").unlink()  # transformers took them from config.json before it had the file
    write(directory, "config.json", {**read(directory, "config.json"), "repetition_penalty": 1.05, "num_beam_groups": 1, "top_p": 0.5})
    lm.load(directory)
    assert "config.json has repetition_penalty 1.05, which transformers' generate applies" in capsys.readouterr().err


def test_settings_that_change_nothing_are_all_known():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig()
    known = {**defaults.to_dict(), **getattr(defaults, "_get_default_generation_params", dict)()}
    assert not_applied(llava_from_hf(released.V15, released.TINY.vision), {}) is None
    from llavamed_jax.checkpoints import generation_file as g
    assert not set(known) - set(g._NOT_APPLIED) - g._OF_A_CALL - g._WITHOUT_EFFECT
    for key, neutral in g._NOT_APPLIED.items():
        assert known.get(key) in (None, *neutral), key
