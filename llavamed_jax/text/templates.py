"""Prompt templates as data: prompts, training text and exported chat templates are made from this table.

A template is a row of `TEMPLATES`, named `ORIGIN:NAME`: `v1.0` for the code of LLaVA-Med v1.0, `v1.5` for v1.5's, `up`
for upstream LLaVA's (each has them in `llava/conversation.py`), and `hf` for the chat templates that language models
are released with on the Hugging Face hub: SmolLM2-Instruct (`chatml`), ChatML without a system text of its own, as
Yi-Chat and Qwen3-Instruct-2507 have it (`chatml_no_system`), Llama 3 Instruct, Llama 3.1 and 3.2 Instruct,
Qwen2.5-Instruct (`qwen`), Qwen3, and OLMo-2-Instruct (`olmo2`). The same name may stand for different texts in
different origins. Templates with a long example or another project's safety prompt (v1.0's inference template `v1`,
`default`, `llama_2`) and those that no LLaVA-Med uses (`mpt`, the `mmtag` and `direct` ones) are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from llavamed_jax.config import DecoderConfig, LlavaConfig
from llavamed_jax.errors import UserError
from llavamed_jax.text.styles import STYLES, Style

V1 = "v1.0"  # the origin whose text and tokens follow rules of their own (`image_positions.py`)


@dataclass(frozen=True)
class Template:
    """Describes how turns become one string; fields as in the originals' `Conversation`.

    Attributes:
      name: `ORIGIN:NAME`.
      style: a name of `text.styles.STYLES`, such as SINGLE, TWO, LLAMA_2, PLAIN or CHATML.
      system: the default system text; None writes no system turn.
      roles: the names of user and assistant.
      sep: the text that ends a user's turn; without `sep2` also an answer.
      sep2: the text that ends an answer.
      examples: turns that every prompt begins with; training text does not have them.
      is_stripped: whether messages and result are stripped, and an answer ends in a blank too, as in v1.5's TWO (quirk
        Q5).
      procedure: the procedure that finds the supervised tokens, if it is not the style's own.
      after_question: the text that the original's evaluation appends to a question. `render`, the originals'
        `get_prompt`, does not append it.
    """

    name: str
    style: str
    system: str | None
    roles: tuple[str, str]
    sep: str
    sep2: str | None = None
    examples: tuple[str, ...] = ()
    is_stripped: bool = False
    procedure: str | None = None
    after_question: str = ""

    def __post_init__(self):
        if len(self.examples) % 2:
            raise UserError(f"the template {self.name} has {len(self.examples)} examples; questions and answers in "
                            "turn were expected")

    @functools.cached_property
    def form(self) -> Style:
        """The style's pieces. Raises UserError if the style does not exist."""
        if self.style not in STYLES:
            raise UserError(f"the template {self.name} has the style {self.style!r}; one of {', '.join(STYLES)} was "
                            "expected")
        return STYLES[self.style]

    @property
    def words(self) -> dict[str, str]:
        """The values for the pieces of a style, except a turn's text."""
        end = (self.sep2 or self.sep) + " " * self.is_stripped
        return dict(system=self.system or "", user=self.roles[0], assistant=self.roles[1], sep=self.sep, end=end)

    @functools.cached_property
    def labels(self) -> str:
        """The procedure that finds the supervised tokens: v0, v1, llama_2 or plain (`Style.labels`), or exact."""
        return self.procedure or self.form.labels

    @property
    def is_v1(self) -> bool:
        """Whether text, tokens and images follow LLaVA-Med v1.0's rules."""
        return self.name.startswith(f"{V1}:")

    @property
    def is_for_training_only(self) -> bool:
        """Whether the originals train with this template and never generate with it.

        Such a model generates with its default template.
        """
        return self.form.is_for_training_only

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer besides the end-of-sequence id: these models learnt to write `sep` in its place."""
        return (self.sep,) if self.form.stops_at_sep else ()

    @property
    def end_token(self) -> str | None:
        """The special token that ends an answer; None where that is the tokenizer's end-of-sequence token."""
        return self.words["end"] if self.words["end"] in self.form.tokens else None

    def check_tokens(self, id_of: Callable[[str], int | None], tokenizer: str | None) -> None:
        """Raises UserError if a tokenizer lacks a special token that the template writes.

        Args:
          id_of: the tokenizer's id of a token, None for none.
          tokenizer: the tokenizer's file, for the error.
        """
        tokens = self.form.tokens
        lacking = [token for token in tokens if id_of(token) is None]
        if lacking:
            raise UserError(f"the template {self.name} is written with {', '.join(tokens)}, and the tokenizer "
                            f"{tokenizer} has no {', no '.join(lacking)}; the tokenizer that the language model was "
                            "trained with, or another template, was expected")


def _polite(person: str) -> str:
    return (f"A chat between a curious {person} and an artificial intelligence assistant. "
            f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions.")


def _med(*sentences: str) -> str:
    """Returns a system text of v1.0: there is no blank between its sentences, and the models were trained so."""
    return ("You are LLaVA-Med, a large language and vision assistant trained by a group of researchers at Microsoft, "
            "based on the general domain LLaVA architecture.") + "".join(sentences)


_SEES = ("You are able to understand the visual content that the user provides, and assist the user with a variety of "
         "medical and ")
_WITH = " tasks using natural language."
_EXPLAIN = "Follow the instructions carefully and explain your answers in detail."
_S_H, _S_U = _polite("human"), _polite("user")
_S_MED_A = _med("You are designed to assist human with a variety of medical and clinical research" + _WITH,
                "Follow the instructions carefully.")
_S_MED_B = _med(_SEES + "clinical" + _WITH, _EXPLAIN)
_S_MED_C = _med(_SEES + "clinical research" + _WITH, _EXPLAIN)
_S_LLAMA_2 = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
              "user provides, and assist the user with a variety of tasks using natural language.")
_S_SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_S_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_HUMAN, _USER, _NONE, _CHAT = ("Human", "Assistant"), ("USER", "ASSISTANT"), ("", ""), ("user", "assistant")
_RESPONSE = "\n\n### Response:"
_GREETING = "Hi there!  How can I help you today?\n"

_ROWS = [  # name, style, system, roles, sep, sep2, and the fields behind them
    ("v1.5:vicuna_v1", "TWO", _S_U, _USER, " ", "</s>", (), True),
    ("up:vicuna_v1", "TWO", _S_U, _USER, " ", "</s>"),
    ("v1.5:llava_v1", "TWO", _S_H, _USER, " ", "</s>", (), True),
    ("up:llava_v1", "TWO", _S_H, _USER, " ", "</s>"),
    *((f"{origin}:{name}", *row) for origin in ("v1.5", "up") for name, *row in (
        ("llava_v0", "SINGLE", _S_H, _HUMAN, "###"),
        ("mistral_instruct", "LLAMA_2", "", _USER, "", "</s>"),
        ("llava_llama_2", "LLAMA_2", _S_LLAMA_2, _USER, "<s>", "</s>"),
        ("plain", "PLAIN", "", _NONE, "\n"))),
    ("v1.0:v0", "V0", _S_H, _HUMAN, "###"),
    ("v1.0:simple", "SINGLE", _S_H, _HUMAN, "###", None, ("Hi!", _GREETING)),
    ("v1.0:simple_legacy", "SINGLE", _S_MED_A, _HUMAN, "###", None, ("Hi!" + _RESPONSE, _GREETING), False, None,
     _RESPONSE),
    ("v1.0:multimodal", "SINGLE", _S_MED_B, _HUMAN, "###", None, ("Hi!", _GREETING)),
    ("v1.0:vicuna_v1_1", "TWO", _S_U, _USER, " ", "</s>"),
    ("v1.0:llava_v1", "TWO", _S_MED_C, _USER, " ", "</s>"),
    # v1.0's training does not know this template's version, so it would train with the v0 procedure.
    ("v1.0:bair_v1", "TWO", "BEGINNING OF CONVERSATION:", ("USER", "GPT"), " ", "</s>", (), False, "v0"),
    ("up:qwen_1_5", "CHATML", "You are a helpful assistant.", _CHAT, "<|im_end|>"),
    ("hf:chatml", "CHATML", _S_SMOL, _CHAT, "<|im_end|>"),
    ("hf:chatml_no_system", "CHATML", None, _CHAT, "<|im_end|>"),
    ("hf:qwen", "CHATML", _S_QWEN, _CHAT, "<|im_end|>"),
    ("hf:qwen3", "CHATML_NO_THINK", None, _CHAT, "<|im_end|>"),
    ("hf:llama3", "LLAMA_3", None, _CHAT, "<|eot_id|>"),
    ("hf:llama3.1", "LLAMA_3_1", "", _CHAT, "<|eot_id|>"),
    ("hf:olmo2", "OLMO_2", None, ("<|user|>", "<|assistant|>"), "\n", "<|endoftext|>"),
]
VICUNA = "up:vicuna_v1"  # Vicuna's, which needs no special tokens
# The default of a decoder's architecture; another one takes `VICUNA`.
_OF_ARCHITECTURES = {"mistral": "v1.5:mistral_instruct", "qwen2": "hf:qwen", "qwen3": "hf:qwen3",
                     "olmo2": "hf:olmo2"}
TEMPLATES = {row[0]: Template(*row) for row in _ROWS}
# The originals' names for templates with another name here. v1.0 trains `--version v1` with vicuna_v1_1.
_ALIASES = {"v1.0:v1": "v1.0:vicuna_v1_1", **{f"{origin}:{alias}": f"{origin}:{name}" for origin in ("v1.5", "up")
                                              for alias, name in (("v1", "vicuna_v1"), ("v0_plain", "plain"))}}


def get_template(name: str) -> Template:
    """Returns a template by its name.

    Args:
      name: `ORIGIN:NAME`; a bare name is v1.5's, else upstream's, else that of a language model (`hf`).

    Returns:
      The template.

    Raises:
      UserError: the name does not exist; the error lists the names that do.
    """
    for full in () if not isinstance(name, str) else (name,) if ":" in name else tuple(
            f"{origin}:{name}" for origin in ("v1.5", "up", "hf")):
        full = _ALIASES.get(full, full)
        if full in TEMPLATES:
            return TEMPLATES[full]
    raise UserError(f"the template {name!r} does not exist; one of {', '.join(TEMPLATES)} was expected")


def default_template(source: str, architecture: str, is_evaluation: bool = False) -> str:
    """Returns the template's name for a checkpoint that does not name one (docs/interface.md).

    Args:
      source: `LlavaConfig.source`; a bare tokenizer counts as the released model's.
      architecture: the decoder's architecture.
      is_evaluation: whether test questions are asked, for which v1.0 has another template than for chat.

    Returns:
      `ORIGIN:NAME`.
    """
    if source == "llava":
        return "v1.0:simple" if is_evaluation else "v1.0:multimodal"
    if source == "llava_qwen":
        return "up:qwen_1_5"
    return _OF_ARCHITECTURES.get(architecture, VICUNA)


def language_template(decoder: DecoderConfig, has_token: Callable[[str], bool]) -> str | None:
    """Guesses the template of a language model without a chat template, by its kind and its special tokens.

    Args:
      decoder: the language model's config.
      has_token: whether the tokenizer has a token.

    Returns:
      The template's name, or None for a language model without one of these templates.
    """
    is_scaled = decoder.rope_scaling is not None and decoder.rope_scaling.rope_type == "llama3"
    names = {"llama": ("hf:llama3.1" if is_scaled else "hf:llama3", "hf:chatml_no_system"), "qwen3": ("hf:qwen3",),
             "mistral": ("hf:chatml_no_system",), "olmo2": ("hf:olmo2",),
             # Qwen2, whose tokenizer has no such token, was released with upstream's system text.
             "qwen2": ("hf:qwen" if has_token("<tool_call>") else "up:qwen_1_5",)}.get(decoder.architecture, ())
    return next((name for name in names if all(map(has_token, TEMPLATES[name].form.tokens))), None)


def template_of(config: LlavaConfig | None, is_evaluation: bool = False) -> str:
    """Returns the template of the model type that the checkpoint names; for a bare tokenizer the released model's."""
    if config is None:
        return "v1.5:mistral_instruct"
    return default_template(config.source, config.decoder.architecture, is_evaluation)
