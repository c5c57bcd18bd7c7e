"""Ids against those that the original's slow tokenizers gave, and the files they are read from."""

import json
import pickle
import random
import shutil

import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.text.tokenizer import Tokenizer
from tests.support.original_text import Slow

TEXT = "[INST] What is shown? [/INST] A chest X-ray. </s>[INST] Where? [/INST]"


@pytest.fixture(scope="module")
def mistral(mistral_tokenizer):
    return Tokenizer.load(mistral_tokenizer)


def test_special_ids(mistral):
    assert (mistral.bos_id, mistral.eos_id, mistral.unk_id, mistral.pad_id) == (1, 2, 0, 0)
    assert mistral.vocab_size == 32000
    assert mistral.encode("</s>", bos=False) == [2] and len(mistral.encode("<image>", bos=False)) > 1


def test_known_ids(mistral):
    assert mistral.encode("[INST] ") == [1, 733, 16289, 28793, 28705]
    assert mistral.encode("\nWhat is shown in this image? [/INST]", bos=False) == [
        28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]


def test_text_after_a_special_token_gets_its_own_prefix(mistral):
    # From the mistral_instruct row of A4: "No. </s>" and "[INST] Is" around the id 2.
    assert mistral.encode("side. </s>[INST] Is", bos=False)[-6:] == [28705, 2, 733, 16289, 28793, 1691]


def test_not_legacy_means_no_prefix_after_a_special_token(llama_tokenizer, tmp_path):
    shutil.copyfile(llama_tokenizer, tmp_path / "tokenizer.model")
    assert Tokenizer.load(tmp_path).encode("No.</s>USER: hi") == [1, 1939, 29889, 2, 3148, 1001, 29901, 7251]
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.is_legacy and not Tokenizer.load(tmp_path / "tokenizer.model").is_legacy
    assert tokenizer.encode("No.</s>USER: hi") == [1, 1939, 29889, 2, 11889, 29901, 7251]


def test_decode_inverts_encode_and_skips_special_tokens(mistral):
    for text in ("Yes, on the right side.", "naïve — 5 µm ½", "胸部X線", "two  blanks\nand a line"):
        assert mistral.decode(mistral.encode(text)) == text
    assert mistral.decode([1, *mistral.encode("No.", bos=False), 2, 0]) == "No."
    assert mistral.decode([40000, -200]) == ""  # rows of a padded table, and images, are no text


def test_growing_ids_give_growing_text(mistral):
    ids = mistral.encode("Opacity in the left lower lobe, 胸.", bos=False)
    texts = [mistral.decode(ids[:n]).rstrip("�") for n in range(len(ids) + 1)]
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))


def test_added_tokens_from_every_file_that_names_them(mistral_tokenizer, tmp_path):
    shutil.copyfile(mistral_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": 32000, "<im_end>": 32001}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {"32002": {"content": "<pad>", "special": True}}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 32003
    assert tokenizer.encode("<im_start><im_end>", bos=False) == [32000, 32001]
    assert tokenizer.decode([32000, 32002, 32001]) == "<im_start><im_end>"


def test_the_longest_of_added_tokens_that_begin_alike_is_taken(mistral_tokenizer, tmp_path):
    shutil.copyfile(mistral_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im": 32000, "<im_start>": 32001, "<im_start>s": 32002}))
    assert Tokenizer.load(tmp_path).encode("<im_start><im<im_start>s", bos=False) == [32001, 32000, 32002]


def test_tokenizer_json_alone_gives_the_same_ids(mistral, mistral_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    shutil.copyfile(mistral_tokenizer, tmp_path / "source" / "tokenizer.model")
    transformers.LlamaTokenizer.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").unlink(missing_ok=True)
    fast = Tokenizer.load(tmp_path / "fast")
    assert (fast.bos_id, fast.eos_id, fast.unk_id, fast.vocab_size) == (1, 2, 0, 32000)
    for text in ("Is there a pleural effusion?", "\nWhat is shown?", "naïve 胸", "[INST] "):
        assert fast.encode(text) == mistral.encode(text)
    assert fast.decode(fast.encode("Yes, on the right.")) == "Yes, on the right."


def test_a_tokenizer_travels_to_a_worker_process(mistral):
    assert pickle.loads(pickle.dumps(mistral)).encode(TEXT) == mistral.encode(TEXT)


ALPHABETS = ["abcdefghijklmnopqrstuvwxyz      ", "ACGTX0123456789.,;:()[]<>%/-+=#*'\"", "äéñçßøµ½°²±→…—’“”", "胸部画像肺に異常",
             "лёгкоеправое", "الرئةاليمنى", "फेफड़ा", "🫁🩻👩‍⚕️🇨🇭", "\n\t\r\u00a0\u200b\u3000\ufeff▁", "\x00\x1b\x7f\ue000\U0010ffff",
             "ﬁｆＡ①ⅣÅe\u0301"]  # fmt: skip


def random_text(rng, specials=()):
    pieces = []
    for _ in range(rng.randrange(1, 12)):
        if specials and rng.random() < 0.2:
            pieces.append(rng.choice(specials))
        alphabet = rng.choice(ALPHABETS) if rng.random() < 0.6 else ALPHABETS[0]
        pieces.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(9))))
    return "".join(pieces)


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_3000_random_strings_are_sentencepieces(name, request):
    import sentencepiece
    path = request.getfixturevalue(f"{name}_tokenizer")
    sp, tokenizer, rng = sentencepiece.SentencePieceProcessor(model_file=str(path)), Tokenizer.load(path), random.Random(0)
    texts = [random_text(rng) for _ in range(3000)]
    assert [tokenizer.encode(text) for text in texts] == [[1, *sp.encode(text)] for text in texts]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == [sp.decode(sp.encode(text)) for text in texts]


@pytest.mark.parametrize("name", ["mistral", "llama"])
@pytest.mark.parametrize("manner", ["legacy", "not legacy", "v1.0"])
def test_random_strings_with_special_tokens_are_the_slow_classs(name, manner, request, tmp_path):
    path, rng, added = request.getfixturevalue(f"{name}_tokenizer"), random.Random(1), ["<im_patch>", "<im_start>", "<im_end>"]
    shutil.copyfile(path, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": manner != "not legacy"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({token: 32000 + i for i, token in enumerate(added)}))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer = tokenizer.as_v1([]) if manner == "v1.0" else tokenizer
    theirs = Slow(path, strips=manner == "v1.0", added=added, legacy=manner != "not legacy")
    for _ in range(500):
        # Not legacy, an added token in front is left out: transformers 4.36 put a lone prefix before it, and it never stands there.
        more = [] if manner == "not legacy" else [*added, " <im_start> "]
        text = random_text(rng, ["<s>", "</s>", "<unk>", "<im_", "</s> ", *more])
        assert tokenizer.encode(text) == theirs(text), text


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("bos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_a_tokenizer_that_begins_with_the_end(file, bos, llama_tokenizer, tmp_path):
    """Quirk Q10: v1.0's training with a model path that holds "llama" does this to the tokenizer, and saves it."""
    shutil.copyfile(llama_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / file).write_text(json.dumps({"bos_token": bos}))
    for tokenizer in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path).as_v1(["<im_patch>"])):
        assert tokenizer.encode("hello") == [2, 22172] == Slow(llama_tokenizer, bos="</s>")("hello")
        assert tokenizer.decode([2, 22172]) == "hello"
    (tmp_path / file).write_text(json.dumps({"bos_token": ""}))  # the first conversions of LLaMA wrote that
    assert Tokenizer.load(tmp_path).encode("hello") == [1, 22172]


def test_v1s_tokens_keep_the_ids_they_have(llama_tokenizer, tmp_path):
    shutil.copyfile(llama_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<im_end>": 32002, "<im_patch>": 32000, "<im_start>": 32001}')
    tokenizer = Tokenizer.load(tmp_path).as_v1(["[PAD]", "<im_patch>", "<im_start>", "<im_end>"])
    assert [tokenizer.id_of(token) for token in ("<im_patch>", "<im_start>", "<im_end>", "[PAD]")] == [32000, 32001, 32002, 32003]
    assert tokenizer.id_of("none") is None
    assert tokenizer.encode("a \n<im_end> b", bos=False) == [263, 32002, 289]
    assert tokenizer.encode("a </s> b", bos=False) == Tokenizer.load(tmp_path).encode("a </s> b", bos=False)  # only beside added ones
    assert tokenizer.decode([263, 32003, 32002]) == "a<im_end>"  # what was added here is no text


@pytest.mark.parametrize("make, sentence", [
    (lambda d: d, "holds no tokenizer"), (lambda d: d / "tokenizer.model", "does not exist"),
    (lambda d: (d / "tokenizer.model").write_bytes(b"nonsense") and d, "is not a SentencePiece model"),
    (lambda d: (d / "tokenizer.json").write_text("{") and d, "is not a tokenizer.json")])
def test_bad_files_are_one_sentence(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        Tokenizer.load(make(tmp_path))
