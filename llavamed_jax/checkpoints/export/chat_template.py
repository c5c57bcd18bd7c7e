"""Writes the conversation templates as Jinja, for the processors of exported models.

A template begins with the beginning-of-sequence token only if the tokenizer adds none (OLMo-2's): llama.cpp and vLLM
would add a second. Qwen3's has no `enable_thinking`: an empty think block always stands before the answer to generate.
The pieces are those of `text.styles`, from which `text.conversation` makes this project's prompts; images are placed as
`text.messages` places them. A test compares both renderings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from string import Formatter

from llavamed_jax.config import LlavaConfig
from llavamed_jax.text.conversation import FIRST_MESSAGE, ONE_MESSAGE
from llavamed_jax.text.templates import Template, default_template, get_template

# A message's text, after its images unless the text places them itself; then the system message, apart from the turns.
_HEAD = r"""
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- set text = content | selectattr("type", "equalto", "text") | map(attribute="text") | join("\n") -%}
    {%- set images = content | rejectattr("type", "equalto", "text") | list | length -%}
    {%- if images and "<image>" not in text -%}
      {{- "MARKER\n" * images ~ text | trim -}}
    {%- else -%}
      {{- text -}}
    {%- endif -%}
  {%- endif -%}
{%- endmacro -%}
{%- set system = SYSTEM -%}
{%- set turns = messages -%}
{%- if messages[0].role == "system" -%}
  {%- set system = text_of(messages[0].content) -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
"""
_TURNS = r"""
{{- OPENING -}}
{%- for message in turns -%}
  {%- set text = text_of(message.content) -%}
  {%- if message.role == "assistant" -%}
    {{- ANSWER -}}
  {%- else -%}
    {{- QUESTION -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- PLACE -}}
{%- endif -%}
"""


def template_name(cfg: LlavaConfig) -> str:
    """Returns the name of a checkpoint's template: its config's own, else by its origin (docs/interface.md)."""
    return get_template(cfg.template or default_template(cfg.source, cfg.decoder.architecture)).name


def chat_template(cfg: LlavaConfig) -> str | None:
    """Returns the Jinja source of a model's template; None for v1.0's, which no transformers model can use."""
    template = get_template(template_name(cfg))
    if template.is_v1:
        return None
    marker = "<im_start><image><im_end>" if cfg.use_start_end else "<image>"
    system = "none" if template.system is None else _literal(template.system)
    return _HEAD.replace("MARKER", marker).replace("SYSTEM", system).lstrip("\n") + _body(template)


def _body(template: Template) -> str:
    """Returns the turns' Jinja source, from the pieces of the template's style (`text.styles`)."""
    style, examples = template.form, template.examples
    head = _expression(style.head, template)
    opening = [_literal(style.begin)] if style.begin else []
    opening.append(f'({head} if system is not none else "")' if template.system is None else head)
    for i, text in enumerate(examples):
        piece = style.answer if i % 2 else style.question
        if i:
            opening.append(_expression(piece, template, text))
        else:
            opening.append(_first(template, text))

    question = _expression(style.question, template)
    if not examples and (style.first or style.first_with_system):
        question = f"({_first(template)} if loop.first else {question})"
    empty_question = _expression(style.empty_question, template)
    if style.needs_first and not examples:
        refusal = _literal(f"the template {template.name} {FIRST_MESSAGE}")
        empty_question = f"(raise_exception({refusal}) if loop.first else {empty_question})"
    answer = _answer(template, is_last=False)
    if style.last_answer is not None:
        answer = f"({_answer(template, is_last=True)} if loop.last else {answer})"
    empty_answer = _expression(style.empty_answer, template)
    if style.is_single:
        refusal = _literal(f"the template {template.name} {ONE_MESSAGE}")
        question, answer = (f"({each} if loop.first else raise_exception({refusal}))" for each in (question, answer))

    pieces = {"OPENING": " ~ ".join(opening), "ANSWER": _written(template, answer, empty_answer),
              "QUESTION": _written(template, question, empty_question), "PLACE": empty_answer}
    body = re.sub("|".join(pieces), lambda found: pieces[found[0]], _TURNS).lstrip("\n")
    if template.after_question:
        text = "text_of(message.content)"
        after = f' ~ ("" if message.role == "assistant" else {_literal(template.after_question)})'
        body = body.replace(f"set text = {text} ", f"set text = {text}{after} ")
    return "{%- set prompt -%}" + body + "{%- endset -%}\n{{- prompt | trim -}}\n" if template.is_stripped else body


def _written(template: Template, piece: str, empty: str) -> str:
    """Returns the expression of a turn; if the style writes no empty turns, another one for a turn without text."""
    return piece if template.form.writes_empty else f"({piece} if text else {empty})"


def _first(template: Template, text: str | None = None) -> str:
    with_system, without = (_expression(template.form.first_question(has), template, text) for has in (True, False))
    return without if with_system == without else f"({with_system} if system else {without})"


def _answer(template: Template, is_last: bool) -> str:
    """Returns the expression of an answer; where the style has reasoning, as `conversation` splits an answer."""
    style, more = template.form, {}
    if style.thought_end is not None:
        end, begin = _literal(style.thought_end), _literal(style.thought_end.replace("/", ""))
        said = f'(text.split({end}) | last).lstrip("\\n")'
        thought = f'(text.split({end}) | first).rstrip("\\n").split({begin})[-1].strip("\\n")'
        more = {"text": said if is_last else f"({said} if {end} in text else text)",
                "thought": f'({thought} if {end} in text else "")'}
    return _expression(style.answer_at(is_last), template, variables=more)


def _expression(piece: str, template: Template, text: str | None = None,
                variables: Mapping[str, str] | None = None) -> str:
    """Returns a piece of a style as a Jinja expression in `text` and `system`.

    A given `text` becomes a constant; `variables` has other expressions for a turn's text and reasoning.
    """
    words = {**template.words, "system": None, "text": text, "thought": None}
    is_trimmed = template.is_stripped or template.form.is_trimmed
    variables = {"system": "system | trim" if template.form.is_trimmed else "system",
                 "text": "text | trim" if is_trimmed else "text", **(variables or {})}
    if text is not None and is_trimmed:
        words["text"] = text.strip()
    found: list[str] = []
    constant = ""
    for literal, name, _, _ in Formatter().parse(piece):
        constant += literal + ((words[name] or "") if name else "")
        if name and words[name] is None:
            found += [_literal(constant), variables[name]] if constant else [variables[name]]
            constant = ""
    if constant or not found:
        found.append(_literal(constant))
    return " ~ ".join(found)


def _literal(text: str) -> str:
    """Returns a text as a Jinja literal, without numeric escapes, which in Jinja would be halves of surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
