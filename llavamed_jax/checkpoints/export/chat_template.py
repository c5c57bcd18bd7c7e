"""The conversation templates as Jinja, for the processors of exported models.

None begins with the beginning-of-sequence token: the tokenizer adds it, and llama.cpp and vLLM would add a second. The
texts are those of `text.conversation`, images placed as `text.messages` places them; a test renders both.
"""

from __future__ import annotations

import json

from llavamed_jax.config import LlavaConfig
from llavamed_jax.text.templates import Template, default_template, get_template

# A message's text, its images before it unless it places them itself; then the system's message apart from the turns.
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
_LLAMA_2 = r"""
{%- for message in turns -%}
  {%- set text = text_of(message.content) -%}
  {%- if message.role == "assistant" -%}
    {{- " " ~ text ~ " " ~ AFTER_ANSWER if text else "" -}}
  {%- elif text -%}
    {%- if loop.first and system -%}
      {%- set text = "<<SYS>>\n" ~ system ~ "\n<</SYS>>\n\n" ~ text -%}
    {%- endif -%}
    {{- ("" if loop.first else SEPARATOR) ~ "[INST] " ~ text ~ " [/INST]" -}}
  {%- endif -%}
{%- endfor -%}
"""
# The styles SINGLE and TWO. STRIPPED is LLaVA-Med v1.5's own way (quirk Q5): messages and result are stripped.
_ROLES = r"""
{{- system ~ SEPARATOR -}}
{%- for message in turns -%}
  {%- set text = text_of(message.content) -%}
  {%- if message.role == "assistant" -%}
    {{- ASSISTANT ~ (": " ~ textSTRIPPED ~ AFTER_ANSWER if text else ":") -}}
  {%- else -%}
    {{- USER ~ (": " ~ textSTRIPPED ~ SEPARATOR if text else ":") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ASSISTANT ~ ":" -}}
{%- endif -%}
"""
_PLAIN = r"""
{%- set text = text_of(turns[0].content) -%}
{{- text ~ SEPARATOR if text else "" -}}
"""
_BODIES = {"LLAMA_2": _LLAMA_2, "SINGLE": _ROLES, "TWO": _ROLES, "PLAIN": _PLAIN}


def template_name(cfg: LlavaConfig) -> str:
    """The template that a checkpoint is asked with: its config's own, else by what it came from (INTERFACE.md)."""
    return get_template(cfg.template or default_template(cfg.source, cfg.decoder.architecture)).name


def chat_template(cfg: LlavaConfig) -> str | None:
    """The Jinja source of a model's template, or None for v1.0's: image and text of these reach no model of transformers."""
    template = get_template(template_name(cfg))
    if template.is_v1:
        return None
    marker = "<im_start><image><im_end>" if cfg.use_start_end else "<image>"
    return _HEAD.replace("MARKER", marker).replace("SYSTEM", json.dumps(template.system)).lstrip("\n") + _body(template)


def _body(template: Template) -> str:
    after_answer = (template.sep2 or template.sep) + " " * template.is_stripped
    words = {"SEPARATOR": template.sep, "AFTER_ANSWER": after_answer, "ASSISTANT": template.roles[1], "USER": template.roles[0]}
    body = _BODIES[template.style].replace("STRIPPED", " | trim" if template.is_stripped else "")
    for name, word in words.items():
        body = body.replace(name, json.dumps(word))
    body = body.lstrip("\n")
    return "{%- set prompt -%}" + body + "{%- endset -%}\n{{- prompt | trim -}}\n" if template.is_stripped else body
