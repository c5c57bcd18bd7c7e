"""The conversation templates as Jinja, for the processors of exported models.

None begins with the beginning-of-sequence token: the tokenizer adds it, and llama.cpp and vLLM would add a second. The
texts are those of `data.conversation`, images placed as `data.chat` places them; a test renders both.
"""

from __future__ import annotations

from llavamed_jax.config import LlavaConfig

_POLITE = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions.")

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
{%- set system = "SYSTEM" -%}
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
    {{- " " ~ text ~ " </s>" if text else "" -}}
  {%- elif text -%}
    {%- if loop.first and system -%}
      {%- set text = "<<SYS>>\n" ~ system ~ "\n<</SYS>>\n\n" ~ text -%}
    {%- endif -%}
    {{- "[INST] " ~ text ~ " [/INST]" -}}
  {%- endif -%}
{%- endfor -%}
"""
_TWO = r"""
{{- system ~ " " -}}
{%- for message in turns -%}
  {%- set text = text_of(message.content) -%}
  {%- if message.role == "assistant" -%}
    {{- "ASSISTANT: " ~ text ~ "</s>" if text else "ASSISTANT:" -}}
  {%- else -%}
    {{- "USER: " ~ text ~ " " if text else "USER:" -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "ASSISTANT:" -}}
{%- endif -%}
"""
# LLaVA-Med v1.5's own: messages and result are stripped, and a blank follows an answer (quirk Q5).
_TWO_STRIPPED = "{%- set prompt -%}" + (
    _TWO.replace('" ~ text ~ "</s>"', '" ~ text | trim ~ "</s> "').replace('" ~ text ~ " "', '" ~ text | trim ~ " "')
) + "{%- endset -%}\n{{- prompt | trim -}}\n"
_PLAIN = r"""
{%- set text = text_of(turns[0].content) -%}
{{- text ~ "\n" if text else "" -}}
"""
_TEMPLATES = {
    "v1.5:mistral_instruct": (_LLAMA_2, ""), "up:mistral_instruct": (_LLAMA_2, ""),
    "v1.5:vicuna_v1": (_TWO_STRIPPED, _POLITE), "up:vicuna_v1": (_TWO, _POLITE),
    "v1.5:plain": (_PLAIN, ""), "up:plain": (_PLAIN, ""),
}  # fmt: skip


def template_name(cfg: LlavaConfig) -> str:
    """The template that a checkpoint is asked with: its config's own, else by what it came from (INTERFACE.md)."""
    by_source = "v1.5:mistral_instruct" if cfg.decoder.architecture == "mistral" else "up:vicuna_v1"
    name = cfg.template or ("v1.0:multimodal" if cfg.source == "llava" else by_source)
    origin, _, bare = name.rpartition(":")
    return f"{origin or 'v1.5'}:{'vicuna_v1' if bare == 'v1' else bare}"


def chat_template(cfg: LlavaConfig) -> str | None:
    """The Jinja source of a model's template, or None where it exists only in this project."""
    found = _TEMPLATES.get(template_name(cfg))
    if found is None:
        return None
    body, system = found
    marker = "<im_start><image><im_end>" if cfg.use_start_end else "<image>"
    return _HEAD.replace("MARKER", marker).replace("SYSTEM", system).lstrip("\n") + body.lstrip("\n")
