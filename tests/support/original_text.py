"""The originals' way from a conversation to text, ids and labels, written a second time.

Source: `llava/conversation.py` and `llava/train/train.py` of LLaVA-Med v1.0 and of LLaVA.

It works as they do and as the code under test does not: on whole lists of ids with every patch token in them, cut into pieces
by a scanner, looked up piece by piece. It is judged by the known answers of the original's code first.
"""

import dataclasses
import functools
from pathlib import Path

import sentencepiece

IGNORE, IMAGE = -100, -200
PATCH, START, END, PAD = "<im_patch>", "<im_start>", "<im_end>", "[PAD]"


# ---- tokenizers ----------------------------------------------------------------------------------------------------


@functools.cache
def _pieces(model, more):
    return sentencepiece.SentencePieceProcessor(model_proto=Path(model).read_bytes() + more)


class Slow:
    """transformers' slow LLaMA tokenizer; `strips` is the manner of 4.28 (v1.0), without it that of 4.36 (v1.5 and upstream).

    Not `legacy`, a text begins with one prefix and no piece gets another: SentencePiece's own is off, and since it then drops a
    blank in front, a piece that begins with one is encoded behind the unknown token, which is taken away again.
    """

    def __init__(self, model, strips=False, added=(), bos="<s>", legacy=True):
        # Messages of protocol buffers that are joined are merged: normalizer_spec.add_dummy_prefix becomes false.
        no_prefix = b"" if legacy else b"\x1a\x02\x18\x00"
        self.sp = _pieces(model, no_prefix)
        self.core = {token: self.sp.piece_to_id(token) for token in ("<unk>", "<s>", "</s>")}
        self.added = {token: self.sp.vocab_size() + i for i, token in enumerate(added)}
        self.special = self.core | self.added
        self.strips, self.bos, self.legacy = strips, self.special[bos], legacy
        self.unk = self.core["<unk>"]

    def pieces(self, text):
        """The text cut at special tokens, the longest at each place."""
        found, plain, at = [], "", 0
        while at < len(text):
            here = [token for token in self.special if text.startswith(token, at)] if text[at] in "<[" else []
            if here:
                found, plain = found + [plain, max(here, key=len)], ""
                at += len(found[-1])
            else:
                plain, at = plain + text[at], at + 1
        found = [piece for piece in [*found, plain] if piece]
        for i, piece in enumerate(found):
            if self.strips and piece in self.added:
                if i + 1 < len(found):
                    found[i + 1] = found[i + 1].lstrip()
                if i:
                    found[i - 1] = found[i - 1].rstrip()
        return [piece for piece in found if piece]

    def __call__(self, text):
        if text and not self.legacy:
            text = "▁" + text.replace("▁", " ")
        out, unknown = [], len(self.sp.encode("<unk>", out_type=str))
        for piece in self.pieces(text):
            if piece in self.special:
                out.append(piece)
            elif not self.legacy and piece.startswith(("▁", " ")):
                out += self.sp.encode("<unk>" + piece, out_type=str)[unknown:]
            else:
                out += self.sp.encode(piece, out_type=str)
        if not self.legacy and len(out) > 1 and out[0] == "▁" and out[1] in self.core:
            del out[0]
        return [self.bos, *(self.special.get(p) or self.sp.piece_to_id(p) for p in out)]

    def with_images(self, text):
        """`tokenizer_image_token`: each chunk between images by itself, begun anew."""
        first, *others = [self(chunk) for chunk in text.split("<image>")]
        out = list(first)
        for chunk in others:
            out += [IMAGE, *chunk[1:]]
        return out


# ---- conversations -------------------------------------------------------------------------------------------------

HUMANS = ("A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
          "polite answers to the human's questions.")
USERS = HUMANS.replace("human", "user")
MED = ("You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, based on the general "
       "domain LLaVA architecture.")
SEEING = ("You are able to understand the visual content that the user provides, and assist the user with a variety of medical and "
          "clinical {}tasks using natural language.Follow the instructions carefully and explain your answers in detail.")
LLAMA_2 = ("You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and "
           "assist the user with a variety of tasks using natural language.")
HELLO = "Hi there!  How can I help you today?\n"


@dataclasses.dataclass
class Conversation:
    style: str
    system: str
    roles: tuple
    sep: str
    sep2: str = None
    begun: tuple = ()
    version: str = "Unknown"
    origin: str = ""

    def prompt(self, messages):
        """`get_prompt`; None is the open place."""
        messages = list(enumerate([*self.begun, *messages]))
        if self.style == "SINGLE":
            said = [f"{self.roles[i % 2]}: {m}{self.sep}" if m else f"{self.roles[i % 2]}:" for i, m in messages]
            return "".join([self.system, self.sep, *said])
        if self.style == "TWO" and self.origin == "v1.5":
            ends = (self.sep, self.sep2 + " ")
            said = [f"{self.roles[i % 2]}: {m.strip()}{ends[i % 2]}" if m else f"{self.roles[i % 2]}:" for i, m in messages]
            return "".join([self.system, self.sep, *said]).strip()
        if self.style == "TWO":
            ends = (self.sep, self.sep2)
            said = [f"{self.roles[i % 2]}: {m}{ends[i % 2]}" if m else f"{self.roles[i % 2]}:" for i, m in messages]
            return "".join([self.system, self.sep, *said])
        if self.style == "LLAMA_2":
            text = ""
            for i, m in messages:
                if m and i == 0 and self.system:
                    m = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{m}"
                if m:
                    text += f" {m} {self.sep2}" if i % 2 else f"{self.sep}[INST] {m} [/INST]"
            return text.lstrip(self.sep)
        raise AssertionError(self.style)


def _later(origin):
    """The conversations that v1.5 and upstream share."""
    user, human = ("USER", "ASSISTANT"), ("Human", "Assistant")
    rows = {"vicuna_v1": Conversation("TWO", USERS, user, " ", "</s>", version="v1"),
            "llava_v1": Conversation("TWO", HUMANS, user, " ", "</s>", version="v1"),
            "llava_v0": Conversation("SINGLE", HUMANS, human, "###", version="v0"),
            "mistral_instruct": Conversation("LLAMA_2", "", user, "", "</s>", version="llama_v2"),
            "llava_llama_2": Conversation("LLAMA_2", LLAMA_2, user, "<s>", "</s>", version="llama_v2"),
            "plain": Conversation("PLAIN", "", ("", ""), "\n")}
    return {f"{origin}:{name}": dataclasses.replace(row, origin=origin) for name, row in rows.items()}


_HUMAN = ("Human", "Assistant")
CONVERSATIONS = {
    "v1.0:v0": Conversation("SINGLE", HUMANS, _HUMAN, "###"),
    "v1.0:simple": Conversation("SINGLE", HUMANS, _HUMAN, "###", begun=("Hi!", HELLO)),
    "v1.0:simple_legacy": Conversation("SINGLE", MED + "You are designed to assist human with a variety of medical and clinical research "
                                       "tasks using natural language.Follow the instructions carefully.", _HUMAN, "###",
                                       begun=("Hi!\n\n### Response:", HELLO)),
    "v1.0:multimodal": Conversation("SINGLE", MED + SEEING.format(""), _HUMAN, "###", begun=("Hi!", HELLO)),
    "v1.0:vicuna_v1_1": Conversation("TWO", USERS, ("USER", "ASSISTANT"), " ", "</s>", version="v1"),
    "v1.0:llava_v1": Conversation("TWO", MED + SEEING.format("research "), ("USER", "ASSISTANT"), " ", "</s>", version="v1"),
    "v1.0:bair_v1": Conversation("TWO", "BEGINNING OF CONVERSATION:", ("USER", "GPT"), " ", "</s>"),
    **_later("v1.5"), **_later("up"),
}  # fmt: skip


# ---- labels --------------------------------------------------------------------------------------------------------


def example(name, model, source, patches=256, start_end=True, legacy=True, max_length=2048):
    """ids and labels of a LLaVA conversation as the original's data set gives them; v1.0's images with every patch token."""
    conversation = CONVERSATIONS[name]
    if not name.startswith("v1.0:"):
        tokenizer = Slow(model, legacy=legacy)
        source = [dict(turn, value=_to_the_front(str(turn["value"]))) for turn in source]
        return _dispatch(conversation, source, tokenizer, tokenizer.with_images, max_length)
    tokenizer = v1_tokenizer(name, model, start_end)
    block = f"{START * start_end}{PATCH * patches}{END * start_end}"
    source = [dict(turn, value=str(turn["value"]).replace("<image>", block)) for turn in source]
    return _dispatch(conversation, source, tokenizer, lambda text: tokenizer(text)[:max_length], max_length, tokenizer)


def v1_tokenizer(name, model, start_end=True):
    """The tokenizer that v1.0's training makes of LLaMA's."""
    return Slow(model, strips=True, added=[*([PAD] if name == "v1.0:v0" else []), PATCH, *([START, END] if start_end else [])])


def _to_the_front(text):
    if "<image>" not in text:
        return text
    return ("<image>\n" + text.replace("<image>", "").strip()).strip()


def _dispatch(conversation, source, tokenizer, encode, max_length, length_of=None):
    def length(text):
        return len((length_of or encode)(text))
    if conversation.style == "PLAIN":
        ids = encode("<image>" + source[1]["value"] + conversation.sep)
        return ids, [IGNORE, IGNORE] + ids[2:]
    if conversation.style == "LLAMA_2" or conversation.version == "v1":
        return _rounds(conversation, source, tokenizer, encode, length, max_length)
    return _v0(conversation, source, encode, length, max_length)


def _v0(conversation, source, encode, length, max_length):
    header, roles = conversation.system + "\n\n", {"human": conversation.roles[0], "gpt": conversation.roles[1]}
    turns = [f"### {roles.get(turn['from'].lower(), 'unknown')}: {turn['value']}\n" for turn in source]
    ids = encode(header + "".join(turns) + "### ")
    target = list(ids)
    at = min(length(header), max_length)
    target[:at] = [IGNORE] * len(target[:at])
    for turn, text in zip(source, turns, strict=True):
        n = min(length(text), max_length)
        if turn["from"] == "human":
            target[at + 2:at + n] = [IGNORE] * len(target[at + 2:at + n])
        at += n
    return ids, target


def _rounds(conversation, source, tokenizer, encode, length, max_length):
    if source[0]["from"] != "human":
        source = source[1:]
    text = conversation.prompt([turn["value"] for turn in source])
    ids = encode(text)
    target, total = list(ids), sum(i != tokenizer.unk for i in ids)  # unk is what they pad with
    separator = "[/INST] " if conversation.style == "LLAMA_2" else conversation.sep + conversation.roles[1] + ": "
    at, target[0] = 1, IGNORE
    for i, part in enumerate(text.split(conversation.sep2)):
        pieces = part.split(separator)
        if part == "" or len(pieces) != 2:
            break
        n, question = length(part), length(pieces[0] + separator) - 2
        if i and conversation.style == "TWO" and not tokenizer.legacy:
            n, question = n - 1, question - 1
        target[at:at + question] = [IGNORE] * len(target[at:at + question])
        at += n
    target[at:] = [IGNORE] * len(target[at:])
    return ids, [IGNORE] * len(ids) if at < max_length and at != total else target
