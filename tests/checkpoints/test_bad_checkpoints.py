"""Checkpoints that are wrong: truncated, incomplete, lying or of another model. One sentence each, and nothing is written."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.torch import write
from llavamed_jax.cli.convert import main
from llavamed_jax.errors import UserError
from tests.support import released, tiny
from tests.support.released import TINY, v15_tensors
from tests.support.tiny import v1_tensors


@pytest.fixture
def v15(tmp_path):
    return released.save_v15(tmp_path)


@pytest.fixture
def v1(tmp_path):
    return tiny.save_v1(tmp_path)


def edited(directory, **changes):
    """Rewrites a checkpoint's file: name=None drops a tensor, name=array sets it."""
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_one_error_lists_what_is_missing_unexpected_and_misshapen(v15):
    edited(v15, **{"model.norm.weight": None, "model.image_newline": np.zeros(48, np.float32),
                   "model.layers.1.self_attn.k_proj.weight": np.zeros((48, 48), np.float32)})
    with pytest.raises(UserError) as error:
        open_checkpoint(v15)
    text = str(error.value)
    assert "1 tensor missing: model.norm.weight [48]" in text
    assert "1 tensor unexpected: model.image_newline [48]" in text
    assert "1 tensor misshapen: model.layers.1.self_attn.k_proj.weight is [48, 48] where [24, 48] was expected" in text


def test_a_long_list_is_cut_with_its_count(v15):
    edited(v15, **{n: None for n in v15_tensors() if ".layers.0." in n})
    with pytest.raises(UserError, match=r"25 tensors missing: (?:[^,]+ \[[^]]*\], ){7}[^,]+ \[[^]]*\] and 17 more"):
        open_checkpoint(v15)


def test_buffers_are_ignored_by_name_and_nothing_else_is(v15):
    edited(v15, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
                   "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None]})
    assert len(open_checkpoint(v15).tensors) == len(names.specs(open_checkpoint(v15).config))
    edited(v15, **{"model.layers.0.self_attn.rotary_emb.scale": np.zeros(6, np.float32)})
    with pytest.raises(UserError, match="unexpected: model.layers.0.self_attn.rotary_emb.scale"):
        open_checkpoint(v15)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


BAD_INPUT = {
    "no directory": (shutil.rmtree, "is not a directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config is not valid JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds a JSON list; an object"),
    "other architecture": (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert'; llava_mistral"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights; .safetensors or pytorch_model"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "model.safetensors is not a complete safetensors file"),
    "integer weights": (lambda d: edited(d, **{"model.norm.weight": np.zeros(48, np.int32)}), "model.norm.weight in .* is of type I32"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(case, v15):
    damage, sentence = BAD_INPUT[case]
    damage(v15)
    with pytest.raises(UserError, match=sentence) as error:
        open_checkpoint(v15)
    assert "\n" not in str(error.value)


def test_a_missing_shard_and_an_index_that_is_wrong(v15, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 50_000)
    export(open_checkpoint(v15), tmp_path / "many", "llava")
    shutil.copytree(tmp_path / "many", tmp_path / "wrong")
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    (tmp_path / "many" / shards[1]).unlink()
    with pytest.raises(UserError, match=f"the shard .*{shards[1]} is missing"):
        open_checkpoint(tmp_path / "many")
    file = tmp_path / "wrong" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.ghost"] = shards[0]
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="names model.ghost in .*, which does not hold such tensors"):
        open_checkpoint(tmp_path / "wrong")


@pytest.mark.parametrize("path", ["preset:huge", "someone/some-model", "nowhere/at/all"])
def test_paths_that_mean_nothing(path):
    with pytest.raises(UserError, match="expected|HF_HUB_OFFLINE is set"):
        open_checkpoint(path)


def test_a_failed_export_leaves_nothing(v15, tmp_path):
    checkpoint = open_checkpoint(v15)

    def fail(names_):
        yield from names_[:20]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        export(checkpoint, tmp_path / "out", "llava", fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-tower", "v15"]


def test_an_export_does_not_overwrite_and_a_linear_projector_does_not_fit_transformers(v15, tmp_path):
    checkpoint = open_checkpoint(v15)
    with pytest.raises(UserError, match="exists and is not empty"):
        export(checkpoint, v15, "llava")
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty", "llava")
    with pytest.raises(UserError, match="only a two-layer projector; use --layout llava"):
        export(random_checkpoint(TINY.replace(projector_type="linear")), tmp_path / "linear", "transformers")
    assert not (tmp_path / "linear").exists()


def shard(directory, index=None):
    """Two shards in the place of one file; the index may be given."""
    (directory / "model.safetensors").unlink()
    names = list(v1_tensors())
    weight_map = {}
    for i in range(2):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: v1_tensors()[name] for name in names[i::2]}, directory / file)
        weight_map |= dict.fromkeys(names[i::2], file)
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**weight_map, **index}}))


def twice(directory):
    shard(directory)
    save_file({"model.norm.weight": np.zeros(48, np.float16)}, directory / "model-extra.safetensors")


def without_index_and_shard(directory):
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def directory_for_shard(directory):
    shard(directory)
    (directory / "model-00001-of-00002.safetensors").unlink()
    (directory / "model-00001-of-00002.safetensors").mkdir()


def pointer(directory):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 15000000000\n"
    (directory / "model.safetensors").write_text(text)


def retyped(directory, name, dtype):
    """One tensor of numbers of eight bits, which numpy does not write."""
    content = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    data = b""
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        values = content[start + first:start + (last if key != name else first + int(np.prod(entry["shape"])))]
        entry |= {"data_offsets": [len(data), len(data) + len(values)]} | ({"dtype": dtype} if key == name else {})
        data += values
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def adapter(directory):
    (directory / "model.safetensors").unlink()
    (directory / "adapter_config.json").write_text("{}")


def projector_alone(directory):
    (directory / "model.safetensors").unlink()
    (directory / "mm_projector.bin").write_bytes(b"")


BAD_FILES = {
    "a tensor in two files": (twice, "model-extra.safetensors holds model.norm.weight, which another file there holds too"),
    "a shard too few, without an index": (without_index_and_shard, "the shard .*model-00002-of-00002.safetensors is missing"),
    "an index that names a ghost": (lambda d: shard(d, {"model.ghost": "model-00001-of-00002.safetensors"}),
                                    "names model.ghost in model-00001-of-00002.safetensors, which does not"),
    "an index that names no file": (lambda d: shard(d, {"model.ghost": 7}), "has no weight_map that names a file for each tensor"),
    "truncated": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
                  "model.safetensors is not a complete safetensors file"),
    "an index that leads elsewhere": (lambda d: shard(d, {"model.ghost": "../other.safetensors"}),
                                      "names the file '../other.safetensors'; the name of a file beside it was expected"),
    "an index that leads to the root": (lambda d: shard(d, {"model.ghost": "/etc/passwd"}), "names the file '/etc/passwd'"),
    "an index that names every file": (lambda d: shard(d, {"model.ghost": "*"}), "names the file '.'; the name of a file beside it"),
    "an index of a name too long": (lambda d: shard(d, {"model.ghost": "a" * 5000}), "names the file 'a{80}'"),
    "shards without end": (lambda d: shard(d, {"model.ghost": "model-00001-of-99999999.safetensors"}),
                           "the shard .*model-00001-of-99999999.safetensors is missing"),
    "a directory in a shard's place": (directory_for_shard, "the shard .*model-00001-of-00002.safetensors is missing"),
    "a pointer of git-lfs": (pointer, "model.safetensors is a pointer of git-lfs, not the file itself: `git lfs pull`"),
    "a name that a terminal obeys": (lambda d: edited(d, **{"model.\n\x1b[31mghost": np.zeros(3, np.float16)}),
                                     r"holds a tensor named 'model.\\n\\x1b\[31mghost'; names without control characters"),
    "eight bits": (lambda d: retyped(d, "model.norm.weight", "F8_E4M3"), "model.norm.weight in .* is of type F8_E4M3; one of F64, F32"),
    "an adapter": (adapter, "holds an adapter .adapter_config.json.; a whole model's weights were expected: `convert merge-lora` makes them"),
    "a projector": (projector_alone, "holds only a projector .mm_projector.bin.*`convert build --decoder BASE"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_sentence(case, v1):
    damage, sentence = BAD_FILES[case]
    damage(v1)
    with pytest.raises(UserError, match=sentence) as error:
        open_checkpoint(v1)
    assert "\n" not in str(error.value)


def test_two_shards_are_the_same_as_one_file(v1, tmp_path):
    whole = open_checkpoint(v1)
    tensors = {name: whole.read(name).copy() for name in whole.tensors}
    shard(v1, {})
    again = open_checkpoint(v1)
    assert all(again.read(name).tobytes() == array.tobytes() for name, array in tensors.items())


BAD_CONFIGS = {
    "no shape": ({"hidden_size": None, "rms_norm_eps": None}, "config.json lacks hidden_size, rms_norm_eps"),
    "no heads of a mistral": ({"model_type": "llava_mistral"}, "config.json lacks num_key_value_heads"),
    "no tower": ({"model_type": "llava_llama", "mm_vision_tower": None}, "config.json lacks mm_vision_tower"),
    "a word for a number": ({"num_hidden_layers": "two"}, "num_hidden_layers 'two'; a whole number of at least 1"),
    "a negative number": ({"vocab_size": -73}, "vocab_size -73; a whole number of at least 1"),
    "another architecture": ({"model_type": "mpt"}, "model_type 'mpt'; llava_mistral, llava_llama, llava_qwen or llava was expected"),
    "rope that changes with a text's length": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}},
                                               "rope_scaling is .'type': 'dynamic'.*plain rotary embedding, linear or llama3 was expected"),
    "scaled rope without a factor": ({"rope_scaling": {"type": "linear"}}, "the decoder's rope_scaling of type linear lacks factor"),
    "a factor that is no number": ({"rope_scaling": {"type": "linear", "factor": "two"}}, "rope_scaling.factor 'two'; a number was"),
    "a factor of nothing": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor 0.0; a finite number above 0"),
    "rope of another kind for each layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters is "),
    "llama3 the wrong way round": ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
                                   "low_freq_factor 4.0 and high_freq_factor 1.0; the first below the second was expected"),
    "a part of the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; 1 .rotation of whole heads. was"),
    "another activation": ({"hidden_act": "mish"}, "hidden_act is 'mish'; one of silu, swish, gelu"),
    "a bias that is no word": ({"attention_bias": "yes"}, "attention_bias 'yes'; true or false was expected"),
    "another projector": ({"mm_projector_type": "cabstract"}, "the projector type is 'cabstract'"),
    "another selection": ({"mm_vision_select_feature": "cls"}, "the vision feature selection is 'cls'; patch or cls_patch"),
    "layers without end": ({"num_hidden_layers": 10**12}, "num_layers 1000000000000; a whole number from 1 to 1000"),
    "a projector without end": ({"mm_projector_type": "mlp99999999x_gelu"}, "the projector type is 'mlp99999999x_gelu'; linear"),
    "a digit that is no number": ({"mm_projector_type": "mlp²x_gelu"}, "the projector type is 'mlp²x_gelu'"),
    "an eps below 0": ({"rms_norm_eps": -1e-5}, "rms_norm_eps -1e-05; a finite number above 0"),
    "a theta without end": ({"rope_theta": 10**400}, "rope_theta 10{79}…; a finite number was expected"),
    "an eps that is none": ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan; a finite number was expected"),
    "a factor without end": ({"rope_scaling": {"type": "linear", "factor": -float("inf")}}, "rope_scaling.factor -inf; a finite"),
    "a window of nothing": ({"model_type": "llava_mistral", "num_key_value_heads": 2, "sliding_window": 0},
                            "sliding_window 0; a whole number of at least 1 was expected"),
    "no room for a token": ({"tokenizer_model_max_length": 0}, "max_length 0; a whole number of at least 1"),
    "a layer too far": ({"mm_vision_select_layer": -9}, "feature layer -9 does not exist in a tower of 3 layers"),
    "a tower at several scales": ({"s2": True}, "s2 is True .a tower at several scales.; one scale was expected"),
    "a resampler": ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'; a projector without a resampler was expected"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres' .LLaVA-1.6 and later."),
    "at most so many tiles": ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
    "tiles of LLaVA-NeXT": ({"image_aspect_ratio": "highres"}, "image_aspect_ratio is 'highres'"),
    "no ratio": ({"image_aspect_ratio": [1, 1]}, r"image_aspect_ratio is \[1, 1\]; pad or square was expected"),
    "an id beyond all tables": ({"eos_token_id": 10**30}, "eos_token_id 1000.*at most 2147483647 were expected"),
    "one of several ids beyond all tables": ({"eos_token_id": [2, 10**30]}, "more_eos_ids .*at most 2147483647 were expected"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_one_sentence(case, v1):
    change, sentence = BAD_CONFIGS[case]
    config = {key: value for key, value in {**json.loads((v1 / "config.json").read_text()), **change}.items() if value is not None}
    (v1 / "config.json").write_text(json.dumps(config))
    for read in (open_checkpoint, read_config):
        with pytest.raises(UserError, match=sentence) as error:
            read(v1)
        assert "\n" not in str(error.value)


# --- what is written ---------------------------------------------------------------------------------------------------------------


def converted(checkpoint, out, capsys):
    """Exit status and complaint of an import."""
    status = main(["import", "--checkpoint", str(checkpoint), "--out", str(out)])
    error = capsys.readouterr().err
    assert status == 0 or (error.startswith("error: ") and error.count("\n") == 1), error
    return status, error


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda root: root / "v15" / "tree", "tree lies inside .*v15, which is an input; a directory outside it was expected"),
    (lambda root: (root / "file").write_text("mine") and root / "file", "file exists and is not empty; a new directory was expected"),
    (lambda root: (root / "file").write_text("mine") and root / "file" / "out", "out cannot be written: "),
    (lambda root: root / ("a" * 300), "cannot be written: File name too long"),
    (lambda root: f"{root}/a\0b", "contains a NUL character"),
    (lambda root: os.symlink("loop", root / "loop") or root / "loop", "cannot be written: "),
])
def test_places_where_nothing_can_be_written(make, sentence, v15, tmp_path, capsys):
    out = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, error = converted(v15, out, capsys)
    assert status == (2 if "NUL" in sentence else 1) and re.search(sentence, error), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_leads_where_it_leads(is_there, v15, tmp_path, capsys):
    if is_there:
        (tmp_path / "elsewhere").mkdir()
    os.symlink("elsewhere", tmp_path / "out")
    assert converted(v15, tmp_path / "out", capsys)[0] == 0
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "model" / "config.json").is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_while_it_is_written(number, v15, tmp_path, monkeypatch, capsys):
    write_shard, count = write._write_shard, iter(range(9))

    def fail(*args):
        write_shard(*args)
        if next(count) == 0:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(write, "_write_shard", fail)
    status, error = converted(v15, tmp_path / "out", capsys)
    assert status == 1 and error == f"error: {tmp_path}/out/base cannot be written: {os.strerror(number)}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-tower", "v15"]


TEXT = {
    "a tokenizer of other bytes": ("tokenizer.model", b"garbage", "tokenizer.model is not a SentencePiece model"),
    "settings that are no JSON": ("generation_config.json", b"{", "generation_config.json is not valid JSON"),
    "another tokenizer beside it": ("tokenizer.json", b"{}", "tokenizer.json is not a tokenizer.json: "),
    "a chat template of other bytes": ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    "settings that are a list": ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a JSON list; an object was expected"),
}


@pytest.mark.parametrize("case", TEXT)
def test_texts_that_cannot_be_read_stop_before_anything_is_written(case, v15, tmp_path, capsys):
    name, content, sentence = TEXT[case]
    (v15 / name).write_bytes(content)
    status, error = converted(v15, tmp_path / "out", capsys)
    assert status == 1 and sentence in error
    assert not (tmp_path / "out").exists()


def test_ids_without_a_row_are_said(v15, tmp_path, capsys):
    shutil.copyfile(Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model", v15 / "tokenizer.model")
    status, error = converted(v15, tmp_path / "out", capsys)
    assert (status, error) == (0, "warning: the tokenizer has 1024 pieces and the embedding table 70 rows; ids from 70 on have no row\n")
    (v15 / "added_tokens.json").write_text('{"<pad>": "last"}')
    status, error = converted(v15, tmp_path / "again", capsys)
    assert status == 1 and "the added tokens of the tokenizer in " in error


def test_settings_that_are_not_obeyed_are_said(v15, tmp_path, capsys):
    config = json.loads((v15 / "config.json").read_text())
    assert converted(v15, tmp_path / "quiet", capsys) == (0, "")
    (v15 / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1, "quantization_config": {"load_in_8bit": True}}))
    status = main(["import", "--checkpoint", str(v15), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.splitlines()
    assert status == 0 and said == [
        f"warning: {v15}: config.json has attention_dropout 0.1; this project trains without dropout",
        f"warning: {v15}: config.json has quantization_config, which is not applied: the weights are taken as they are in the files"]
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["extra"]["attention_dropout"] == 0.1
