"""The tokenizer of a GGUF file, by the rule that the file names: held to pipelines that are written here once more."""

import json
import random

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed")

from llavamed_jax.checkpoints.gguf.directory import import_decoder  # noqa: E402
from llavamed_jax.cli.convert import main  # noqa: E402
from llavamed_jax.text.tokenizer import Tokenizer  # noqa: E402
from tests.support import gguf_files, tiny  # noqa: E402
from tests.support.training_runs import SAMPLE  # noqa: E402

CHARACTERS = "abcdefghijklmnopqrst LMNRS  0123456789 .,;:!?'\n\r\t  \u00e9u\u0308\u00f1\u65e5\u672c\U0001f600_-()[]{}<>|/\\\"\u00b2\u00bd\u2167\u0663\u2581\u017f\u200b"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]


def strings(count, more=SPECIAL, seed=0):
    rng = random.Random(seed)
    words = ["lung", " heart", " isn't", " THERE'S", " 12", "345678", "\n\n", "  ", " \n ", " na\u00efve", "'\u017f", "e\u0301"]
    for _ in range(count):
        parts = [rng.choice(rng.choice([CHARACTERS, words])) for _ in range(rng.randint(0, 30))]
        if rng.random() < 0.2:
            parts.insert(rng.randint(0, len(parts)), rng.choice(more))
        yield "".join(parts)


def pipeline(pre, tokens, merges, special, plain=()):
    """The model's own `tokenizer.json`: SmolLM2's, Llama 3's, Qwen2's."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    split = {"smollm": pre_tokenizers.Digits(individual_digits=True),
             "llama-bpe": pre_tokenizers.Split(Regex(
                 r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                 behavior="isolated"),
             "qwen2": pre_tokenizers.Split(Regex(
                 r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                 behavior="isolated")}[pre]
    out = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        out.normalizer = normalizers.NFC()
    out.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")])
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    out.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return out


def imported(tmp_path, cfg=None, **metadata):
    gguf_files.model(tmp_path / "tiny.gguf", cfg, metadata={f"tokenizer.{key.replace('__', '.')}": value for key, value in metadata.items()})
    import_decoder(tmp_path / "tiny.gguf", tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens with digits in a row, a word that no merge makes, and one that is cut out of texts without being special."""
    tokens, kinds, merges = gguf_files.byte_level_vocabulary()
    more = ["34", "345", "12", "\u0120lungheart", "<tool>", "[PAD7]"]
    new = [token for token in more if token not in tokens]
    kind = {"<tool>": gguf_files.USER_DEFINED, "[PAD7]": gguf_files.UNUSED}
    return ([*tokens, *new], [*kinds, *(kind.get(token, gguf_files.NORMAL) for token in new)],
            [*merges, *(pair for pair in (("3", "4"), ("34", "5"), ("1", "2")) if pair not in merges)])


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_ids_are_those_of_the_models_own_pipeline(pre, vocabulary, tmp_path):
    tokens, kinds, merges = vocabulary
    directory = imported(tmp_path, gguf_files.config(vocab_size=len(tokens)), ggml__pre=pre, ggml__tokens=tokens, ggml__token_type=kinds,
                         ggml__merges=[" ".join(pair) for pair in merges])
    ours, theirs = Tokenizer.load(directory), pipeline(pre, tokens, merges, SPECIAL[:3], SPECIAL[3:])
    others = {name: pipeline(name, tokens, merges, SPECIAL[:3], SPECIAL[3:]) for name in ("smollm", "llama-bpe", "qwen2") if name != pre}
    differing = dict.fromkeys(others, 0)
    for text in [*strings(1500), "lungheart", " lungheart x", "345 1234567", "a[PAD7]b", "<tool>1<|im_end|>\n"]:
        wanted = theirs.encode(text).ids
        assert ours.encode(text) == wanted, repr(text)
        assert ours.decode(wanted) == theirs.decode(wanted), repr(text)
        for name, other in others.items():
            differing[name] += other.encode(text).ids != wanted
    assert min(differing.values()) > 100  # the strings tell the rules apart
    assert ours.vocab_size == len(tokens) - 1  # without the padding of the table, which stands for no text


def test_transformers_reads_the_same_tokenizer(tmp_path, vocabulary):
    transformers = pytest.importorskip("transformers")
    directory = imported(tmp_path, ggml__add_bos_token=True, ggml__pre="llama-bpe")
    ours, theirs = Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in strings(200, SPECIAL[:3]):
        assert ours.encode(text) == theirs(text).input_ids
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("pre, said, wanted", [
    ("smollm", None, False), ("qwen2", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", True, True)])
def test_a_text_begins_as_the_file_says_or_as_its_rule_does(pre, said, wanted, tmp_path):
    gguf_files.model(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": pre, **({} if said is None else {
        "tokenizer.ggml.add_bos_token": said})}, drop=["tokenizer.ggml.add_bos_token"] if said is None else ())
    import_decoder(tmp_path / "tiny.gguf", tmp_path / "decoder")
    tokenizer = Tokenizer.load(tmp_path / "decoder")
    assert tokenizer.has_bos is wanted
    assert tokenizer.encode("a")[:-1] == ([1] if wanted else [])


def test_a_text_ends_as_the_file_says(tmp_path):
    tokenizer = Tokenizer.load(imported(tmp_path, ggml__add_eos_token=True))
    assert tokenizer.encode("a")[-1] == 2 and tokenizer.encode("a", bos=False)[-1] != 2


def test_the_chat_templates_lie_where_transformers_looks(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    directory = imported(tmp_path, chat_template=template, chat_templates=["rag", "../evil", "default"],
                         **{"chat_template.rag": "{{ messages }}", "chat_template.../evil": "x", "chat_template.default": "y"})
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.chat_template == {"default": template, "rag": "{{ messages }}"}
    assert theirs.apply_chat_template([{"role": "user", "content": "Is it?"}], tokenize=False) == "<|im_start|>user\nIs it?<|im_end|>\n"
    assert "a chat template named '../evil', which is left out" in capsys.readouterr().err
    assert not (tmp_path / "evil.jinja").exists()


# --- SentencePiece -----------------------------------------------------------------------------------------------------


def of_sentencepiece(model, more=(), decoder=()):
    """What convert_hf_to_gguf.py's `_create_vocab_sentencepiece` writes: every piece, its score, its kind; then added tokens.

    `decoder` is the `added_tokens_decoder` of tokenizer_config.json, id -> (text, is_special), which it obeys since July 2024.
    """
    import sentencepiece
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens, kinds, scores = [], [], []
    for i in range(pieces.vocab_size()):
        tokens.append(pieces.id_to_piece(i))
        scores.append(pieces.get_score(i))
        kinds.append(gguf_files.UNKNOWN if pieces.is_unknown(i) else gguf_files.CONTROL if pieces.is_control(i) else
                     gguf_files.UNUSED if pieces.is_unused(i) else gguf_files.BYTE if pieces.is_byte(i) else gguf_files.NORMAL)
    for text, kind in more:
        tokens.append(text)
        scores.append(-1000.0)
        kinds.append(kind)
    for i, (text, is_special) in dict(decoder).items():
        tokens[i], kinds[i], scores[i] = text, gguf_files.CONTROL if is_special else gguf_files.USER_DEFINED, -1000.0
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}


def write_sentencepiece(path, metadata, **changes):
    cfg = gguf_files.config(vocab_size=len(metadata["tokenizer.ggml.tokens"]), hidden_size=16, intermediate_size=16)
    gguf_files.write(path, "llama", {**gguf_files.metadata_of(cfg), **metadata, **changes}, gguf_files.as_in_gguf(
        tiny.drawn(tiny.decoder_shapes(cfg), dtype=np.float16), cfg))
    return path


SPECIAL_OF_LLAMA = {0: ("<unk>", True), 1: ("<s>", True), 2: ("</s>", True)}  # added_tokens_decoder of Llama 2 and Mistral 0.2


def check_pieces(model, tmp_path, decoder=(), **changes):
    metadata = of_sentencepiece(model, [("<|im_start|>", gguf_files.CONTROL), ("<tool  x>", gguf_files.USER_DEFINED)], decoder)
    import_decoder(write_sentencepiece(tmp_path / "tiny.gguf", metadata, **changes), tmp_path / "decoder")
    before, again = Tokenizer.load(model), Tokenizer.load(tmp_path / "decoder")
    assert (again.bos_id, again.eos_id, again.unk_id, again.has_bos) == (1, 2, 0, True)
    for text in [*strings(400, ["<s>", "</s>", "<unk>"]), "  a  b ", "", "\u2581x"]:
        assert again.encode(text) == before.encode(text), repr(text)
        ids = before.encode(text, bos=False)
        assert again.decode(ids) == before.decode(ids), repr(text)
    size = before.vocab_size
    assert again.encode("a<|im_start|>b<tool  x>c") == [
        *before.encode("a"), size, *before.encode("b", bos=False), size + 1, *before.encode("c", bos=False)]


def test_mistrals_pieces_come_back(mistral_tokenizer, tmp_path):
    check_pieces(mistral_tokenizer, tmp_path, SPECIAL_OF_LLAMA)


# Before July 2024; and without the id of the unknown token, which is then 0.
@pytest.mark.parametrize("decoder, changes", [({}, {}), (SPECIAL_OF_LLAMA, {"tokenizer.ggml.unknown_token_id": None})])
def test_pieces_of_other_files_come_back(decoder, changes, tmp_path):
    check_pieces(SAMPLE / "tokenizer.model", tmp_path, decoder, **changes)


def test_llamas_pieces_come_back(llama_tokenizer, tmp_path):
    check_pieces(llama_tokenizer, tmp_path, SPECIAL_OF_LLAMA)


def test_the_unknown_token_is_the_one_that_the_file_names(tmp_path):
    decoder = {0: ("<pad>", True), 1: ("<s>", True), 2: ("</s>", True), 300: ("<odd>", True)}
    metadata = of_sentencepiece(SAMPLE / "tokenizer.model", decoder=decoder) | {"tokenizer.ggml.unknown_token_id": 300}
    import_decoder(write_sentencepiece(tmp_path / "tiny.gguf", metadata), tmp_path / "decoder")
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "decoder" / "tokenizer.model"))
    assert model.unk_id() == 300 and model.is_control(0) and Tokenizer.load(tmp_path / "decoder").unk_id == 300


@pytest.mark.parametrize("has_prefix", [True, False])
def test_transformers_reads_the_same_ids_of_pieces(has_prefix, tmp_path, capsys):
    """Its defaults differ: text behind a special token, the blank before a text. (A text that begins with a blank gets no other in 5.)"""
    transformers = pytest.importorskip("transformers")
    metadata = of_sentencepiece(SAMPLE / "tokenizer.model", decoder=SPECIAL_OF_LLAMA) | {"tokenizer.ggml.add_space_prefix": has_prefix}
    import_decoder(write_sentencepiece(tmp_path / "tiny.gguf", metadata), tmp_path / "decoder")
    ours, theirs = Tokenizer.load(tmp_path / "decoder"), transformers.AutoTokenizer.from_pretrained(tmp_path / "decoder")
    assert "warning" not in capsys.readouterr().err
    for text in ["a", "Is there a fracture?", "lung</s>a", "</s>a", "a</s>b</s>", "12 mm\n\u65e5", "x<unk>y"]:
        assert ours.encode(text) == theirs(text).input_ids, repr(text)
    marked = [piece.startswith("\u2581") for piece in theirs.tokenize("</s>lung") + theirs.tokenize("lung")]
    assert any(marked) is has_prefix and len(theirs) == ours.vocab_size


def test_no_blank_is_put_before_a_text_if_the_file_says_so(tmp_path):
    metadata = of_sentencepiece(SAMPLE / "tokenizer.model")
    write_sentencepiece(tmp_path / "tiny.gguf", metadata, **{"tokenizer.ggml.add_space_prefix": False})
    import_decoder(tmp_path / "tiny.gguf", tmp_path / "decoder")
    tokenizer = Tokenizer.load(tmp_path / "decoder")
    assert tokenizer.decode(tokenizer.encode(" lung", bos=False)) == " lung"
    assert tokenizer.encode("lung", bos=False) != Tokenizer.load(SAMPLE / "tokenizer.model").encode("lung", bos=False)
    assert tokenizer.encode(" lung", bos=False) == Tokenizer.load(SAMPLE / "tokenizer.model").encode("lung", bos=False)


BAD = {
    "no scores": ({"tokenizer.ggml.scores": None}, "lacks tokenizer.ggml.scores"),
    "fewer scores": ({"tokenizer.ggml.scores": [0.0, 1.0]}, "2 values in tokenizer.ggml.scores; the same number"),
    "a rule": ({"tokenizer.ggml.pre": "llama-bpe"}, "has tokenizer.ggml.pre 'llama-bpe' for a tokenizer of SentencePiece; default was"),
    "a normaliser": ({"tokenizer.ggml.remove_extra_whitespaces": True}, "has tokenizer.ggml.remove_extra_whitespaces, which LLaMA's"),
    "no unknown token": ({"tokenizer.ggml.token_type": [1] * 259},
                         "has no token of kind 2 (unknown) in tokenizer.ggml.token_type, and '<unk>' with the id 0 (tokenizer.ggml.unknown"),
    "two unknown tokens": ({"tokenizer.ggml.token_type": [2, 2, 3, *[6] * 256]}, "has 2 tokens of kind 2 (unknown)"),
    "the fallback's scores": ({"tokenizer.ggml.token_type": [3, 3, 3, *[1] * 256], "tokenizer.ggml.scores": [-1000.0] * 259},
                              "has the score -1000 for all tokens in tokenizer.ggml.scores, so nothing says how a text is split"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pieces_are_one_sentence(case, tmp_path, capsys):
    changes, sentence = BAD[case]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * 259,
                "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    file = write_sentencepiece(tmp_path / "tiny.gguf", metadata)
    assert main(["import-decoder", str(file), "--out", str(tmp_path / "good")]) == 0
    assert json.loads((tmp_path / "good" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    assert Tokenizer.load(tmp_path / "good").encode("a") == [1, 3 + ord("\u2581".encode()[:1]), 3 + 0x96, 3 + 0x81, 3 + ord("a")]
    capsys.readouterr()
    write_sentencepiece(file, metadata, **changes)
    assert main(["import-decoder", str(file), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error, error
    assert not (tmp_path / "out").exists()
