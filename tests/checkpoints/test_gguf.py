"""A GGUF file becomes a language model's directory of transformers, to the bit, and a decoder for `convert build`."""

import json
import re
import sys
import tracemalloc

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed")

from llavamed_jax.checkpoints.assemble.build import build  # noqa: E402
from llavamed_jax.checkpoints.gguf.directory import import_decoder, read_decoder  # noqa: E402
from llavamed_jax.checkpoints.open import open_checkpoint  # noqa: E402
from llavamed_jax.checkpoints.torch.files import read_weights  # noqa: E402
from llavamed_jax.cli.convert import main  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.processor import Processor  # noqa: E402
from tests.support import byte_level, gguf_files, tiny  # noqa: E402

TYPES = [kind for kind in gguf.GGMLQuantizationType
         if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
         or kind in gguf.quants._type_traits]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tiny.gguf"


# --- weights ---------------------------------------------------------------------------------------------------------


def blocks(kind, shape, rng):
    """Random bytes of a type, only such as stand for finite numbers, and what the library makes of them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    wanted = int(np.prod(shape)) // block
    with np.errstate(all="ignore"):
        drawn = rng.integers(0, 256, (2 * wanted + 64, size), np.uint8)
        values = gguf.quants.dequantize(drawn, kind)
    data = drawn[np.isfinite(values).all(-1)][:wanted].reshape(shape[0], -1)
    assert data.shape[1] * block == shape[1] * size
    return data, gguf.quants.dequantize(data, kind)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_the_librarys_to_the_bit(kind, file, tmp_path):
    """Every matrix of the model is of the type; queries and keys come back in transformers' order."""
    cfg = gguf_files.config(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True)
    rng, tensors, raw = np.random.default_rng(0), tiny.drawn(tiny.decoder_shapes(cfg), dtype=np.float32), {}
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2]:
        if kind.name in ("F32", "F16"):
            data = tensors[name].astype(np.float32 if kind.name == "F32" else np.float16)
            raw[gguf_files.name_of(name)], values = data, data.astype(np.float32)
        else:
            data, values = blocks(kind, tensors[name].shape, rng)
            raw[gguf_files.name_of(name)] = (data, kind)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:  # undone in the slowest possible way, row by row
            half = 256 // 4 // 2
            order = [head * 2 * half + 2 * (row % half) + row // half for head in range(heads) for row in range(2 * half)]
            values = values[order]
        tensors[name] = values
    gguf_files.model(file, cfg, tensors={name: t for name, t in tensors.items() if t.ndim == 1}, more=raw)
    assert read_decoder(file).file.types == sorted({"F32", kind.name})
    import_decoder(file, tmp_path / "out")
    found = read_weights(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, wanted in tensors.items():
        values = found[name].load()
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values.view(np.uint32), wanted.view(np.uint32), name)


def test_there_are_as_many_types_as_the_page_says():
    assert len(TYPES) == 26  # 24 and float32, float16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_a_cast(dtype, file, tmp_path):
    import ml_dtypes
    tensors = gguf_files.model(file)
    assert main(["import-decoder", str(file), "--out", str(tmp_path / "out"), "--dtype", dtype]) == 0
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for name, tensor in read_weights(tmp_path / "out").items():
        assert tensor.dtype == kind
        np.testing.assert_array_equal(tensor.load(), tensors[name].astype(kind), name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_tensors_are_read_one_after_another(file, tmp_path):
    """The most memory that arrays take is that of two tensors (one is written, the next one read), not of the model."""
    cfg = gguf_files.config(hidden_size=256, intermediate_size=2048, num_hidden_layers=6)
    tensors = gguf_files.model(file, cfg)
    largest, total = max(t.nbytes for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    import_decoder(file, tmp_path / "first")  # imports what it needs
    tracemalloc.start()
    try:
        import_decoder(file, tmp_path / "second")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 15 * largest
    assert peak < 4 * largest, f"{peak / 1e6:.1f} MB, and the largest tensor has {largest / 1e6:.1f}"


def test_weights_that_are_not_numbers_are_refused(file, tmp_path, capsys):
    tensors = tiny.drawn(tiny.decoder_shapes(gguf_files.config()), dtype=np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    gguf_files.model(file, tensors=tensors)
    assert main(["import-decoder", str(file), "--out", str(tmp_path / "out")]) == 1
    assert re.search(r"error: .*tiny.gguf: model.layers.1.mlp.up_proj.weight holds 1 NaN among", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# --- config ----------------------------------------------------------------------------------------------------------


def config_of(file, tmp_path):
    import_decoder(file, tmp_path / "out")
    return json.loads((tmp_path / "out" / "config.json").read_text())


def test_metadata_become_the_config(file, tmp_path):
    gguf_files.model(file, gguf_files.config(rope_theta=5e5, rms_norm_eps=1e-5))
    found = config_of(file, tmp_path)
    wanted = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64, intermediate_size=96,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
                  rope_theta=5e5, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=[2, 0],
                  pad_token_id=2, hidden_act="silu", attention_bias=False, dtype="float32")
    assert {key: found[key] for key in wanted} == wanted
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == dict(
        bos_token_id=1, eos_token_id=[2, 0], pad_token_id=2)


def test_every_id_that_ends_a_sequence_is_kept(file, tmp_path):
    """The file's own come first; <|endoftext|> (0) and <|im_end|> (2) end a sequence by their texts, as in llama.cpp."""
    gguf_files.model(file, metadata={"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2})
    assert config_of(file, tmp_path)["eos_token_id"] == [2, 7, 0]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 0]


@pytest.mark.parametrize("kind, ends", [(gguf_files.CONTROL, True), (gguf_files.USER_DEFINED, True), (gguf_files.NORMAL, False)])
@pytest.mark.parametrize("text", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|end_of_text|>", "</s>"])
def test_an_end_of_turn_is_found_by_its_text(text, kind, ends, file):
    """Llama 3's file names <|end_of_text|> or <|eot_id|> as its end, and not the other one."""
    tokens, kinds, merges = gguf_files.byte_level_vocabulary(special=("<s>", "<end>", "<role>"))
    gguf_files.model(file, gguf_files.config(vocab_size=len(tokens) + 1), tokens=[*tokens, text], kinds=[*kinds, kind], merges=merges)
    assert read_decoder(file).config.eos_ids == ((2, len(tokens)) if ends else (2,))


def test_ids_that_a_file_lacks_stay_open(file, tmp_path):
    gguf_files.model(file, drop=[f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding", "unknown")])
    found = config_of(file, tmp_path)
    assert [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, [2, 0], None]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [2, 0]}


@pytest.mark.parametrize("name", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_counts_of_every_layer_may_be_a_list(name, file, tmp_path):
    """llama.cpp writes a list where a model may differ from layer to layer."""
    plain = gguf_files.metadata_of(gguf_files.config())[f"llama.{name}"]
    gguf_files.model(file, metadata={f"llama.{name}": [plain, plain]})
    assert config_of(file, tmp_path)["num_key_value_heads"] == 2
    gguf_files.model(file, metadata={f"llama.{name}": [plain, 2 * plain]})
    with pytest.raises(UserError, match=f"llama.{name} \\[{plain}, {2 * plain}\\]; the same number for all layers"):
        read_decoder(file)


def llama3_divisors(theta, head_dim, factor, low, high, original):
    """`convert_hf_to_gguf.py`'s loop, in float32 as there."""
    out = []
    for frequency in (np.float32(1) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))):
        wavelength = np.float32(2 * np.pi) / frequency
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("head_dim, theta, factor, low, high, original", [
    (128, 5e5, 8.0, 1.0, 4.0, 8192), (64, 5e5, 32.0, 1.0, 4.0, 8192), (128, 5e5, 8.0, 1.0, 4.0, 4096),
    (64, 1e5, 4.0, 1.0, 8.0, 2048), (128, 5e5, 8.0, 2.0, 4.0, 8192), (16, 1e4, 8.0, 1.0, 4.0, 32), (8, 1e4, 8.0, 1.0, 4.0, 512),
    (128, 1e6, 16.0, 1.0, 2.5, 131072), (128, 5e5, 8.0, 1.0, 32.0, 8192)])
def test_llama_3s_scaling_comes_from_its_tensor(head_dim, theta, factor, low, high, original, file):
    """The frequencies are those of the config that the converter read, whatever numbers describe them."""
    cfg = gguf_files.config(head_dim=head_dim, hidden_size=4 * head_dim, rope_theta=theta)
    divisors = llama3_divisors(theta, head_dim, factor, low, high, original)
    gguf_files.model(file, cfg, more={"rope_freqs.weight": divisors})
    found = read_decoder(file).config.rope_scaling
    assert (found.rope_type, found.factor) == ("llama3", factor)
    again = llama3_divisors(theta, head_dim, found.factor, found.low_freq_factor, found.high_freq_factor,
                            found.original_max_position_embeddings)
    np.testing.assert_allclose(1 / again, 1 / divisors, atol=2e-6, rtol=0)
    if head_dim >= 64 and low == 1:
        assert (found.low_freq_factor, found.high_freq_factor, found.original_max_position_embeddings) == (low, high, original)


def test_divisors_that_do_nothing_or_divide_all_alike(file):
    gguf_files.model(file, more={"rope_freqs.weight": np.ones(8, np.float32)})
    assert read_decoder(file).config.rope_scaling is None
    gguf_files.model(file, more={"rope_freqs.weight": np.full(8, 4, np.float32)})
    found = read_decoder(file).config.rope_scaling
    assert (found.rope_type, found.factor) == ("linear", 4.0)


def test_linear_scaling_in_either_spelling(file):
    for metadata in ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {"llama.rope.scale_linear": 4.0},
                     {"llama.rope.scaling.factor": 4.0}):
        gguf_files.model(file, metadata=metadata)
        found = read_decoder(file).config.rope_scaling
        assert (found.rope_type, found.factor) == ("linear", 4.0), metadata
    gguf_files.model(file, metadata={"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert read_decoder(file).config.rope_scaling is None


def test_keys_that_are_not_known_are_named(file, capsys):
    gguf_files.model(file, metadata={"llama.attention.mystery": 3.0, "llama.tensor_data_layout": "Meta AI original pth"})
    read_decoder(file)
    warning = capsys.readouterr().err
    assert "warning: " in warning and "has llama.attention.mystery in its metadata" in warning and "layout" not in warning


# --- parity ----------------------------------------------------------------------------------------------------------

# Each value of each setting; what a setting does in the file does not depend on the others.
KINDS = {
    "grouped, llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                         "original_max_position_embeddings": 32}},
    "every head has keys, biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "tied, free head width, linear": {"tie_word_embeddings": True, "head_dim": 24, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24}}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, file, tmp_path):
    """A model of transformers, written as GGUF by llama.cpp's rules: built here, and imported for transformers itself."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    import jax
    import transformers

    from llavamed_jax.checkpoints.load import load_params
    from llavamed_jax.models.llava import Llava
    from tests.support.hf import randomise
    changes = dict(KINDS[kind])
    scaling = changes.pop("rope_scaling", {})
    cfg = gguf_files.config(**{"head_dim": 16, **changes})
    keys = {key: value for key, value in cfg.items() if key not in ("model_type", "architectures")}
    config = transformers.AutoConfig.for_model(cfg["model_type"], **keys, attn_implementation="eager",
                                               rope_parameters={"rope_type": "default", "rope_theta": 1e4, **scaling})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, 3, 1 / 8 if cfg["tie_word_embeddings"] else 1)  # logits of about 1, for which the tolerance is meant
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()
               if not (name == "lm_head.weight" and cfg["tie_word_embeddings"])}
    metadata, more = {}, {}
    if scaling.get("rope_type") == "linear":
        metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    elif scaling:
        more = {"rope_freqs.weight": llama3_divisors(1e4, 16, 8.0, 1.0, 4.0, 32)}
    gguf_files.model(file, cfg, tensors, metadata, more=more)
    tiny.save_clip(tmp_path / "clip")
    checkpoint, _ = build(file, tmp_path / "clip", "linear", tmp_path)
    import_decoder(file, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert again.dtype == torch.float32
    ids = np.random.default_rng(0).integers(0, cfg["vocab_size"], (2, 48)).astype(np.int32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids).long()).logits.numpy()
        theirs = again(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_array_equal(theirs, wanted)
    ours = jax.jit(Llava(checkpoint.config).apply)({"params": load_params(checkpoint)}, ids)
    np.testing.assert_allclose(ours, wanted, atol=2e-5, rtol=0)


# --- build -----------------------------------------------------------------------------------------------------------


def test_build_equals_build_of_the_imported_directory(file, tmp_path, capsys):
    gguf_files.model(file, metadata={"general.license": "apache-2.0", "tokenizer.chat_template": "{{ messages }}"})
    tiny.save_clip(tmp_path / "clip")
    assert main(["import-decoder", str(file), "--out", str(tmp_path / "decoder")]) == 0
    for source in (file, tmp_path / "decoder"):
        assert main(["build", "--decoder", str(source), "--vision", str(tmp_path / "clip"), "--projector", "mlp2x_gelu",
                     "--out", str(tmp_path / f"built-{source.name}")]) == 0
    assert capsys.readouterr().out.count("tiny.gguf: Tiny, F32, licence apache-2.0\n") == 2
    one, other = (open_checkpoint(tmp_path / f"built-{name}") for name in ("tiny.gguf", "decoder"))
    assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name), name)
    assert {name: path.read_bytes() for name, path in one.files.items()} == {
        name: path.read_bytes() for name, path in other.files.items()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= one.files.keys()
    processor = Processor.load(tmp_path / "built-tiny.gguf")
    assert processor.tokenizer.decode(processor.tokenizer.encode("the lung isn't 12 日")) == "the lung isn't 12 日"
    assert processor.tokenizer.eos_id == 2 and not processor.tokenizer.has_bos


def test_the_template_is_that_of_the_files_chat_template(file, tmp_path, capsys):
    gguf_files.model(file, metadata={"tokenizer.chat_template": byte_level.SMOLLM2})
    tiny.save_clip(tmp_path / "clip")
    assert main(["build", "--decoder", str(file), "--vision", str(tmp_path / "clip"), "--projector", "linear",
                 "--out", str(tmp_path / "built")]) == 0
    assert "template: hf:chatml, which writes the prompts of the decoder's chat template" in capsys.readouterr().out
    processor = Processor.load(tmp_path / "built")
    assert processor.template_name == "hf:chatml"
    assert processor.prompt([{"role": "user", "content": "Is it?"}]).endswith("<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n")


def test_image_tokens_are_added_behind_the_files_tokens(file, tmp_path):
    gguf_files.model(file)
    tiny.save_clip(tmp_path / "clip")
    rows = gguf_files.config()["vocab_size"]
    assert main(["build", "--decoder", str(file), "--vision", str(tmp_path / "clip"), "--projector", "linear", "--add_image_tokens",
                 "--out", str(tmp_path / "built")]) == 0
    tokenizer = Processor.load(tmp_path / "built").tokenizer
    assert tokenizer.encode("<im_patch><im_start><im_end>", bos=False) == [rows, rows + 1, rows + 2]


# --- bad files -------------------------------------------------------------------------------------------------------


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * share)])


def moved_tensor(file):
    """A tensor's offset points behind the end of the file."""
    content = bytearray(file.read_bytes())
    name = b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8 + 4  # name, dimensions, their sizes, type
    content[at:at + 8] = (10**12).to_bytes(8, "little")
    file.write_bytes(content)


def typed_tensor(file, kind):
    content = bytearray(file.read_bytes())
    name = b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at:at + 4] = kind.to_bytes(4, "little")
    file.write_bytes(content)


def replaced(file, old, new):
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))


def with_metadata(**changes):
    return lambda file: gguf_files.model(file, metadata={key.replace("__", "."): value for key, value in changes.items()})


def without(*keys):
    return lambda file: gguf_files.model(file, drop=keys)


def with_tensors(**more):
    return lambda file: gguf_files.model(file, more={key.replace("__", "."): value for key, value in more.items()})


TOKENS = gguf_files.byte_level_vocabulary()[0]
BAD = {
    "no file": (lambda f: f.unlink(), "tiny.gguf does not exist; a GGUF file was expected"),
    "an empty file": (lambda f: f.write_bytes(b""), r"tiny.gguf is not a GGUF file: it begins with b'', where b'GGUF' was expected"),
    "other magic": (lambda f: f.write_bytes(b"PK\3\4" * 99), r"is not a GGUF file: it begins with b'PK"),
    "a pointer": (lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of git-lfs"),
    "magic alone": (lambda f: f.write_bytes(b"GGUF"), r"is not a complete GGUF file: it has 4 bytes, but its header describes 8"),
    "version 1": (lambda f: f.write_bytes(b"GGUF\1\0\0\0" + bytes(99)), "version 1"),
    "a header cut": (lambda f: cut(f, 0.02), "is not a complete GGUF file: it has .* bytes, but its header describes"),
    "tensors cut": (lambda f: cut(f, 0.7), "is not a complete GGUF file: it has .* bytes, but its header describes"),
    "an offset beyond the end": (moved_tensor, r"is not a complete GGUF file: it has .* bytes, but its header describes 1,000,0"),
    "a type that is not known": (lambda f: typed_tensor(f, 999), "is not a complete GGUF file: 999 is not a valid"),
    "a type of indices": (lambda f: typed_tensor(f, 24), "blk.1.ffn_up.weight in .* is of type I8, which the gguf library does not"),
    "an endless list": (lambda f: replaced(f, (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + len(TOKENS).to_bytes(8, "little"),
                                           (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (2**60).to_bytes(8, "little")),
                        "is not a complete GGUF file"),
    "a big-endian file": (lambda f: gguf_files.write(f, "llama", {}, {"x": np.ones(4, np.float32)}, endianess=gguf.GGUFEndian.BIG),
                          "is a big-endian GGUF file; a little-endian one was expected"),
    "shards": (with_metadata(split__count=3, split__no=0), r"is one of 3 shards \(split.count\); one whole file was expected"),
    "an adapter": (with_metadata(general__type="adapter"), "has general.type 'adapter'; model was expected"),
    "another architecture": (lambda f: gguf_files.write(f, "gemma2", {}, {"x": np.ones(4, np.float32)}),
                             "has general.architecture 'gemma2'; llama.* was expected"),
    "no size": (without("llama.embedding_length"), "lacks llama.embedding_length in its metadata; a whole number was expected"),
    "no eps": (without("llama.attention.layer_norm_rms_epsilon"), "lacks llama.attention.layer_norm_rms_epsilon"),
    "no depth": (without("llama.block_count"), "lacks llama.block_count"),
    "no heads": (with_metadata(llama__attention__head_count=0), "has llama.attention.head_count 0; a whole number of at least 1"),
    "a text for a number": (with_metadata(llama__block_count="two"), "has llama.block_count 'two'; a whole number was expected"),
    "heads that do not fit": (with_metadata(llama__attention__head_count_kv=3), "4 query heads are not a multiple of 3"),
    "part of a head rotated": (with_metadata(llama__rope__dimension_count=8), "has llama.rope.dimension_count 8; 16, the width of a head"),
    "values of another width": (with_metadata(llama__attention__value_length=8), "has llama.attention.value_length 8; 16"),
    "experts": (with_metadata(llama__expert_count=8), "has llama.expert_count 8; none, or 0, was expected"),
    "a window": (with_metadata(llama__attention__sliding_window=64), "has llama.attention.sliding_window 64; none, or 0"),
    "not causal": (with_metadata(llama__attention__causal=False), "has llama.attention.causal False; none, or True"),
    "yarn": (with_metadata(llama__rope__scaling__type="yarn"), "has llama.rope.scaling.type 'yarn'; none or linear was expected"),
    "two scalings": (lambda f: gguf_files.model(f, metadata={"llama.rope.scale_linear": 2.0},
                                                more={"rope_freqs.weight": np.full(8, 2, np.float32)}), "beside rope_freqs.weight; one of them"),
    "divisors of nothing known": (with_tensors(rope_freqs__weight=np.array([1, 3, 2, 5, 4, 8, 1, 2], np.float32)),
                                  r"rope_freqs.weight in .* is \[1.0, 3.0.*the divisors of Llama 3's scaling were expected"),
    "divisors of another width": (with_tensors(rope_freqs__weight=np.ones(5, np.float32)), r"rope_freqs.weight in .* is \[5\]; \[8\]"),
    "a tensor too few": (without("blk.1.ffn_up.weight"), r"does not fit its metadata; 1 tensor missing: blk.1.ffn_up.weight|missing: model"),
    "no embedding": (without("token_embd.weight"), "holds no token_embd.weight; the tensors of a whole model"),
    "a tensor too many": (with_tensors(blk__0__ffn_gate_inp__weight=np.ones((4, 64), np.float32)),
                          r"1 tensor unexpected: blk.0.ffn_gate_inp.weight \[4, 64\]"),
    "another shape": (with_tensors(output_norm__weight=np.ones(65, np.float32)), r"misshapen: output_norm.weight is \[65\] where \[64\]"),
    "another vocabulary": (with_metadata(llama__vocab_size=7), "has llama.vocab_size 7 and .* rows in token_embd.weight"),
    "an id without a row": (with_metadata(tokenizer__ggml__eos_token_id=99999), "has tokenizer.ggml.eos_token_id 99999; an id below"),
    "no tokenizer": (without("tokenizer.ggml.model"), "lacks tokenizer.ggml.model in its metadata; a text was expected"),
    "another tokenizer": (with_metadata(tokenizer__ggml__model="bert"), "has tokenizer.ggml.model 'bert'; gpt2 or llama was expected"),
    "no rule": (without("tokenizer.ggml.pre"), "lacks tokenizer.ggml.pre"),
    "another rule": (with_metadata(tokenizer__ggml__pre="tekken"), "has tokenizer.ggml.pre 'tekken'; one of smollm, llama-bpe, qwen2 was expected"),
    "no merges": (without("tokenizer.ggml.merges"), "lacks tokenizer.ggml.merges"),
    "a merge of three": (with_metadata(tokenizer__ggml__merges=["a b c"]), "has 'a b c' in tokenizer.ggml.merges; two tokens"),
    "a merge of strangers": (with_metadata(tokenizer__ggml__merges=["zebra crossing"]), "has a tokenizer that cannot be built: .*zebra"),
    "fewer tokens than rows": (with_metadata(tokenizer__ggml__tokens=TOKENS[:-1], tokenizer__ggml__token_type=[1] * (len(TOKENS) - 1),
                                             tokenizer__ggml__merges=["t h"]), "tokens and .* rows in token_embd.weight; the same number"),
    "fewer kinds than tokens": (with_metadata(tokenizer__ggml__token_type=[1, 2]), "tokens and 2 values in tokenizer.ggml.token_type"),
    "an odd kind": (with_metadata(tokenizer__ggml__token_type=[9] * len(TOKENS)), "has 9 in tokenizer.ggml.token_type; 1 to 6"),
    "a token twice": (with_metadata(tokenizer__ggml__tokens=[*TOKENS[:-1], TOKENS[5]]), "twice in tokenizer.ggml.tokens"),
    "tokens that are numbers": (with_metadata(tokenizer__ggml__tokens=[1] * len(TOKENS)), "has tokenizer.ggml.tokens .*a list of texts"),
    "a blank before texts": (with_metadata(tokenizer__ggml__add_space_prefix=True), "add_space_prefix true; false was expected"),
    "a beginning without its id": (lambda f: gguf_files.model(f, metadata={"tokenizer.ggml.add_bos_token": True},
                                                              drop=["tokenizer.ggml.bos_token_id"]), "lacks tokenizer.ggml.bos_token_id"),
}


# Every key that changes what is computed: a value that does nothing, and one that does.
CHANGING = {
    "attention.sliding_window": (0, 4096), "attention.causal": (True, False), "attention.clamp_kqv": (0.0, 8.0),
    "attention.max_alibi_bias": (0.0, 8.0), "attention.scale": (0.0, 0.125), "attn_logit_softcapping": (0.0, 50.0),
    "final_logit_softcapping": (0.0, 30.0), "expert_count": (0, 8), "expert_used_count": (0, 2), "logit_scale": (0.0, 0.0625),
    "residual_scale": (0.0, 1.5), "embedding_scale": (0.0, 12.0), "rope.scaling.attn_factor": (1.0, 1.2),
    "use_parallel_residual": (False, True)}


@pytest.mark.parametrize("key", CHANGING)
def test_a_setting_that_changes_what_is_computed_is_refused(key, file, capsys):
    neutral, other = CHANGING[key]
    gguf_files.model(file, metadata={f"llama.{key}": neutral})
    read_decoder(file)
    assert "warning" not in capsys.readouterr().err
    gguf_files.model(file, metadata={f"llama.{key}": other})
    with pytest.raises(UserError, match=re.escape(f"has llama.{key} {other}; none, or {neutral}, was expected")):
        read_decoder(file)


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence_and_leave_nothing(case, file, tmp_path, capsys):
    damage, sentence = BAD[case]
    gguf_files.model(file)
    damage(file)
    tiny.save_clip(tmp_path / "clip")
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in (["import-decoder", str(file)],
                    ["build", "--decoder", str(file), "--vision", str(tmp_path / "clip"), "--projector", "linear"]):
        assert main([*command, "--out", str(tmp_path / "out")]) == (2 if case == "no file" else 1)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert re.search(sentence, error), error
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_is_told_of_the_file_in_it(file, tmp_path, capsys):
    gguf_files.model(file)
    tiny.save_clip(tmp_path / "clip")
    assert main(["build", "--decoder", str(tmp_path), "--vision", str(tmp_path / "clip"), "--projector", "linear",
                 "--out", str(tmp_path / "out")]) == 1
    assert "holds no config.json" in (error := capsys.readouterr().err) and f"or the file {file}" in error
    assert main(["import-decoder", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "is a directory; a file was expected" in capsys.readouterr().err


def test_without_the_library_the_extra_is_named(file, tmp_path, capsys, monkeypatch):
    from llavamed_jax.checkpoints.gguf import file as gguf_file
    gguf_files.model(file)
    gguf_file._reader_class.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["import-decoder", str(file), "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'llavamed-jax[gguf]'" in capsys.readouterr().err
    gguf_file._reader_class.cache_clear()
