"""Small byte-level BPE tokenizers whose files are those of SmolLM2, Llama 3, Qwen2, Qwen2.5, Qwen3 and OLMo-2, and the chat templates of these models.

Pre-tokenizers, special tokens, post-processors and `tokenizer_config.json` are as released; the merges are learnt here from a few
lines, so that a vocabulary has hundreds of pieces and not 150,000.
"""

import functools
import json
from pathlib import Path

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QWEN2 = SMOLLM2.replace("a helpful AI assistant named SmolLM, trained by Hugging Face", "a helpful assistant.")
# Without its branches for tools, which no message here has.
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Qwen3-…-Instruct-2507's, without its branches for tools: neither a system text of its own nor a think block.
QWEN3_2507 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Yi-Chat's, OpenHermes's and SmolLM-Instruct's (the first).
CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content "
    "%}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}")
# 3.1's and 3.2's without tools; 3.2's takes the day from the clock where no `date_string` is given.
LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}{% elif "
    "message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}{% if not loop.last "
    "%}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% "
    "endif %}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>", "<|image_pad|>"]
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# name -> chat template, special tokens, plain added tokens, whether they come first, and the roles of `tokenizer_config.json`.
KINDS = {
    "smollm2": (SMOLLM2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], [], True,
                ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"), "GPT2Tokenizer"),
    "qwen2": (QWEN2, _QWEN, [], False, (None, "<|im_end|>", "<|endoftext|>", None), "Qwen2Tokenizer"),
    "qwen2.5": (QWEN25, _QWEN, ["<tool_call>", "</tool_call>"], False, (None, "<|im_end|>", "<|endoftext|>", None), "Qwen2Tokenizer"),
    "qwen3": (QWEN3, _QWEN, ["<tool_call>", "</tool_call>", "<think>", "</think>"], False,
              (None, "<|im_end|>", "<|endoftext|>", None), "Qwen2Tokenizer"),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"], [],
               False, ("<|begin_of_text|>", "<|eot_id|>", None, None), "PreTrainedTokenizerFast"),
}
KINDS["qwen3-2507"] = (QWEN3_2507, *KINDS["qwen3"][1:])
KINDS["llama3.1"] = (LLAMA31, *KINDS["llama3"][1:])
TEMPLATES = {"hf:chatml": "smollm2", "hf:qwen": "qwen2.5", "hf:qwen3": "qwen3", "hf:llama3": "llama3", "hf:llama3.1": "llama3.1",
             "up:qwen_1_5": "qwen2", "hf:chatml_no_system": "qwen3-2507", "hf:olmo2": "olmo2"}
# Its tokenizer splits digits by threes, as Llama 3's, and puts no beginning before a text: the template does.
KINDS["olmo2"] = (OLMO2, ["<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "<|pad|>"], [], False,
                  ("<|endoftext|>", "<|endoftext|>", "<|pad|>", "<|endoftext|>"), "GPT2Tokenizer")
TEXT = """Is there a pneumothorax in the left lung? No, the left lung is clear. What modality is shown? A chest X-ray, PA view.
user assistant system think Which organ is enlarged? The heart, by 12 mm. Cutting Knowledge Date: December 2023
The image shows a CT of the abdomen in the axial plane, with contrast.  What is the size of the lesion? About 2.5 cm x 3.1 cm.

Yes\n\n\nno\n    answer the question using a single word or phrase. 胸部X光片显示什么？ Где это? В лёгком.\n\n"""


def _tokenizer(kind):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: I001
    _, special, plain, is_first, roles, _ = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind.startswith("llama3")))
    if kind == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    else:
        split = Regex(_SPLIT.replace("DIGITS", "{1,3}" if kind.startswith(("llama3", "olmo")) else ""))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"),
                                                           pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=special if is_first else [])
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind.startswith("llama3"):
        bos = roles[0]
        begins = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1",
                                               special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begins])
    return tokenizer


@functools.cache
def _files(kind):
    template, special, _, _, roles, name = KINDS[kind]
    tokenizer = _tokenizer(kind)
    added = {str(i): dict(content=token.content, lstrip=False, normalized=False, rstrip=False, single_word=False, special=token.special)
             for i, token in sorted(tokenizer.get_added_tokens_decoder().items())}
    config = {"added_tokens_decoder": added, **dict(zip(_ROLES, roles, strict=True)), "additional_special_tokens": special[1:3],
              "chat_template": template, "clean_up_tokenization_spaces": False, "model_max_length": 32768, "tokenizer_class": name}
    if name == "Qwen2Tokenizer":
        config |= {"add_bos_token": False, "add_prefix_space": False, "errors": "replace", "split_special_tokens": False}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}


def save(directory: Path, kind: str) -> Path:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a directory, and returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in _files(kind).items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def theirs(directory: Path, kind: str):
    """The same tokenizer in transformers, which follows the file as it is."""
    from transformers import PreTrainedTokenizerFast
    roles = {role: token for role, token in zip(_ROLES, KINDS[kind][4], strict=True) if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), **roles)
    tokenizer.chat_template = KINDS[kind][0]
    return tokenizer
