"""Chat templates of checkpoints: each form and place, both formats of content, equality with transformers, and hostile ones."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.config import IMAGE_TOKEN, preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text import template_process
from llavamed_jax.text.chat_template import ChatTemplate
from llavamed_jax.text.messages import read_messages
from tests.support import quick_renderer
from tests.text.test_templates import check_questions

pytest.importorskip("jinja2")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad" / "tokenizer.model"
PICTURE = Image.new("RGB", (8, 8))
IMAGE, TEXT = {"type": "image", "image": PICTURE}, {"type": "text", "text": "Is it normal?"}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Templates as they are published beside models, or exported by programs that tune them, and which content each takes.
PARTS = {
    "llava-hf's, with generation tags": """{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in \
m['content'] | selectattr('type', \
'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% if m['role'] != 'assistant' %}{% for c in m['content'] | \
selectattr('type', \
'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% else %}{% for c in m['content'] | selectattr('type', \
'equalto', 'text') %}\
{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if \
add_generation_prompt %}{{ 'ASSISTANT:' \
}}{% endif %}""",
    "interleaved": """{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == \
'image' %}<image>\
{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}{% if \
add_generation_prompt %}<|assistant|>{% endif %}""",
    "either, by a macro": """{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for item \
in content %}\
{{ '<image>' if item['type'] == 'image' else item['text'] }}{% endfor %}{% endif %}{% endmacro %}{% for message in \
messages %}\
{{ message.role }}: {{ write(message.content) }}\n{% endfor %}{{ tools | tojson }}{{ documents is none }}""",
    "either, by a macro that calls it otherwise": """{% macro write(c) %}{% if c is string %}{{ c }}{% else %}{% for item in c %}\
{{ '<image>' if item['type'] == 'image' else item['text'] }}{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}\
{{ m.role }}: {{ write(m.content) }}\n{% endfor %}""",
    "the first part": """{% for message in messages %}{% set content = message['content'] %}{% if message['role'] \
== 'user' %}[INST] \
{% for block in content %}{% if block['type'] == 'text' %}{{ block['text'] }}{% else %}<image>\n{% endif %}{% \
endfor %} [/INST]{% else %}\
 {{ content[0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}""",
    "loop controls and namespaces": """{% set ns = namespace(n=0) %}{% for m in messages %}{% for c in \
m.get('content') %}{% if c.type == 'image' %}\
{% set ns.n = ns.n + 1 %}Picture {{ ns.n }}: <image>\n{% continue %}{% endif %}{{ c.text }}{% endfor %}{% if \
loop.last %}{% break %}{% endif %}\
|{% endfor %}""",
}
STRINGS = {
    "llama's own": """{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + \
message['content'].strip() + \
' [/INST]' }}{% elif message['role'] == 'system' %}{{ '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' }}{% \
else %}{{ ' ' + \
message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "mistral's own": """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set \
rest = messages[1:] %}{% else %}\
{% set system = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}{% if (message['role'] == 'user') \
!= (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if \
message['role'] == 'user' %}\
{{ '[INST] ' + system + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif \
%}{% endfor %}""",
    "joined": """{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content | trim ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""",
}
MIXED = """{% for m in messages %}{% if m.role == 'user' %}{% for c in m.content %}{{ '<image>\n' if c.type == \
'image' else c.text }}{% endfor %}\
{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
TALKS = {
    "one question": [("user", [IMAGE, TEXT])],
    "text alone": [("user", [TEXT])],
    "an image alone": [("user", [IMAGE])],
    "text first": [("user", [TEXT, IMAGE])],
    "two images, and between them text": [("user", [IMAGE, TEXT, IMAGE, {"type": "text", "text": "And this?"}])],
    "a longer talk": [("system", [{"type": "text", "text": "Be brief."}]), ("user", [IMAGE, TEXT]),
                      ("assistant", [{"type": "text", "text": "It is."}]), ("user", [{"type": "text", "text": "Sure {of} 'it'?"}])],
}


def messages_of(talk):
    return [{"role": role, "content": content} for role, content in talk]


def by_transformers(source, messages):
    from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **TOKENS)[0][0]


def by_us(source, messages, **kw):
    return ChatTemplate(source, "FILE", TOKENS, **kw).render(read_messages(messages))


def checkpoint(path, **files):
    """A directory in transformers' layout with these files."""
    path.mkdir(parents=True)
    config = llava_to_hf(preset("llava15-7b"), "transformers")
    del config["llavamed_jax"]
    shutil.copyfile(SAMPLE, path / "tokenizer.model")
    for name, content in {"config.json": config, **files}.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- a process that does not start, and one that is ended: first in the file, since a start takes a second -----------------


@pytest.fixture(scope="module", autouse=True)
def patient():
    """A minute of processor time for a prompt: a slow machine fills a gigabyte in more than three seconds, and would say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_process, "CPU_SECONDS", 60)
        template_process._stop()  # the one that gives three
        yield
    template_process._stop()


def test_without_transformers_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    template_process._stop()
    with pytest.raises(UserError, match="transformers and jinja2, which render chat templates, cannot be imported: ImportError: no such thing"):
        by_us(A, [{"role": "user", "content": "Q"}])
    monkeypatch.undo()
    assert by_us(A, [{"role": "user", "content": "Q"}]) == "A Q"


def test_a_template_that_takes_too_long_is_one_sentence_and_is_not_tried_again(monkeypatch):
    """A power of many digits, which nothing inside of Python can interrupt; what is left of a second is given here, not three."""
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0)
    template_process._stop()  # the one that gives more
    for limit in (100, 1):
        start = time.monotonic()
        with pytest.raises(UserError, match="^the chat template FILE cannot be rendered: it takes more than 0 s of processor time$"):
            by_us("{{ 9 ** (9 ** 9) }}", [{"role": "user", "content": "Q"}])
        assert time.monotonic() - start < limit
    monkeypatch.undo()
    assert by_us(STRINGS["joined"], [{"role": "user", "content": "Q"}]).startswith("<|im_start|>user\nQ")  # and others go on


# ---- what is rendered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", PARTS)
def test_parts_go_to_templates_that_loop_over_content(name, talk):
    messages = messages_of(TALKS[talk])
    plain = [{**m, "content": [{"type": "image"} if p["type"] == "image" else p for p in m["content"]]} for m in messages]
    assert by_us(PARTS[name], messages) == by_transformers(PARTS[name], plain)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", STRINGS)
def test_texts_go_to_templates_that_join_them(name, talk):
    """As vLLM does with them: each image as `<image>` and a new line before the message's text."""
    texts = []
    for role, content in TALKS[talk]:
        images = ["<image>" for part in content if part["type"] == "image"]
        texts.append({"role": role, "content": "\n".join([*images, *(part["text"] for part in content if part["type"] == "text")])})
        if content == [IMAGE]:
            texts[-1]["content"] = "<image>\n"
    assert by_us(STRINGS[name], messages_of(TALKS[talk])) == by_transformers(STRINGS[name], texts)


def test_users_parts_and_assistants_text():
    assert by_us(MIXED, messages_of(TALKS["a longer talk"])[1:]) == "<image>\nIs it normal? It is.</s>Sure {of} 'it'?"


def test_texts_that_place_images_themselves_become_parts():
    message = {"role": "user", "content": [{"type": "text", "text": "Compare <image> and\n<image>\nnow"}, IMAGE, IMAGE]}
    assert by_us(PARTS["interleaved"], [message]) == "<s><|user|>Compare <image> and<image>now</s><|assistant|>"
    assert by_us(PARTS["interleaved"], [{"role": "user", "content": "Q\n<image>"}]) == "<s><|user|>Q<image></s><|assistant|>"
    assert by_us(STRINGS["joined"], [message]).startswith("<|im_start|>user\nCompare <image> and\n<image>\nnow<|im_end|>")


def test_a_template_may_name_images_otherwise():
    for source, text in ((PARTS["interleaved"].replace("<image>", "[IMG]"), "<s><|user|>[IMG]Is it normal?</s><|assistant|>"),
                         (STRINGS["llama's own"], "<s>[INST] [IMG]\nIs it normal? [/INST]")):
        assert by_us(source, messages_of(TALKS["one question"]), marker="[IMG]") == text


@pytest.mark.parametrize("source", {**PARTS, **STRINGS}.values(), ids={**PARTS, **STRINGS})
def test_a_question_is_the_prompt_of_its_message(source, tmp_path):
    check_questions(Processor.load(checkpoint(tmp_path / "a", **{"chat_template.jinja": source})))


def test_what_transformers_templates_may_call():
    source = "{{ strftime_now('%Y') | length }} {{ [1, 'é'] | tojson }} {{ {'a': 1} | tojson(indent=2) }} {{ messages[0].content }}"
    assert by_us(source, [{"role": "user", "content": "Q"}]) == '4 [1, "é"] {\n  "a": 1\n} Q'


def test_a_template_that_changes_texts_is_taken_as_it_is():
    assert by_us("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [{"role": "user", "content": "is it?"}]) == "IS IT?"


def test_a_sequence_begins_once(tmp_path):
    begun = checkpoint(tmp_path / "a", **{"chat_template.jinja": "{{ bos_token }}" + STRINGS["joined"]})
    plain = checkpoint(tmp_path / "b", **{"chat_template.jinja": STRINGS["joined"]})
    first, second = Processor.load(begun), Processor.load(plain)
    message = messages_of(TALKS["one question"])
    assert first.prompt(message) == "<s>" + second.prompt(message)
    assert first.encode(first.prompt(message)) == second.encode(second.prompt(message))
    assert first.encode(first.prompt(message)).count(1) == 1 and first.encode(first.prompt(message)).count(IMAGE_TOKEN) == 1


# ---- where it stands -------------------------------------------------------------------------------------------------

A, B = "A {{ messages[0].content }}", "B {{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": B}, {"name": "default", "template": A}]
PLACES = {
    "chat_template.jinja": {"chat_template.jinja": A},
    "chat_template.json": {"chat_template.json": {"chat_template": A}},
    "named in chat_template.json": {"chat_template.json": {"chat_template": {"default": A, "rag": B}}},
    "tokenizer_config.json": {"tokenizer_config.json": {"chat_template": A}},
    "named in tokenizer_config.json": {"tokenizer_config.json": {"chat_template": NAMED}},
    "processor_config.json": {"processor_config.json": {"chat_template": A}},
    "a folder": {"additional_chat_templates/default.jinja": A, "additional_chat_templates/rag.jinja": B},
    "a file and a folder": {"chat_template.jinja": A, "additional_chat_templates/rag.jinja": B},
    "the processor's before the tokenizer's": {"chat_template.jinja": A, "tokenizer_config.json": {"chat_template": B}},
    "null before one": {"processor_config.json": {"chat_template": None}, "chat_template.jinja": A},
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place(place, tmp_path, capsys):
    processor = Processor.load(checkpoint(tmp_path / "m", **PLACES[place]))
    assert processor.prompt([{"role": "user", "content": "Q"}]) == "A Q" and capsys.readouterr().err == ""


@pytest.mark.parametrize("first, second", [("processor_config.json", "chat_template.json"), ("chat_template.json", "chat_template.jinja")])
def test_two_places_that_differ_are_named(first, second, tmp_path, capsys):
    files = {first: {"chat_template": A}, second: B if second.endswith(".jinja") else {"chat_template": B}}
    processor = Processor.load(checkpoint(tmp_path / "m", **files))
    said = capsys.readouterr().err
    assert f"{first} and " in said and f"{second} hold different chat templates; {first} is used" in said
    assert processor.prompt([{"role": "user", "content": "Q"}]) == "A Q"
    transformers = pytest.importorskip("transformers")
    template = transformers.ProcessorMixin.get_processor_dict(tmp_path / "m")[0]["chat_template"]
    assert template == A


def test_a_template_survives_our_own_tree_and_travels_to_workers(tmp_path):
    import pickle
    processor = Processor.load(checkpoint(tmp_path / "m", **PLACES["named in tokenizer_config.json"]))
    assert pickle.loads(pickle.dumps(processor)).prompt([{"role": "user", "content": "Q"}]) == "A Q"


@pytest.mark.parametrize("files, sentence", [
    ({"chat_template.jinja": ""}, "chat_template.jinja has an empty chat template; a Jinja text was expected"),
    ({"chat_template.json": {"chat_template": " \n"}}, "chat_template.json has an empty chat template"),
    ({"chat_template.json": {"chat_template": 5}}, "chat_template.json has the chat_template 5; a text was expected"),
    ({"tokenizer_config.json": {"chat_template": [5]}}, r"has the chat_template \[5\]; a text was expected"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": A}]}}, r"the chat templates \['rag'\]; one called default"),
    ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": None}]}, "chat_template.json": {}}, None),
    ({"processor_config.json": {"chat_template": {"default": ["x"]}}}, r"has the chat_template \['x'\]; a text was expected"),
    ({"additional_chat_templates/rag.jinja": A}, r"additional_chat_templates has the chat templates \['rag'\]; one called default")])
def test_wrong_files_are_one_sentence(files, sentence, tmp_path):
    path = checkpoint(tmp_path / "m", **files)
    if sentence is None:
        assert Processor.load(path).template_name == "up:vicuna_v1"
        return
    with pytest.raises(UserError, match=sentence) as error:
        Processor.load(path)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf_8(tmp_path):
    path = checkpoint(tmp_path / "m")
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(UserError, match="the chat template .*chat_template.jinja is not UTF-8: .*can't decode byte 0xff"):
        Processor.load(path)


# ---- hostile templates -----------------------------------------------------------------------------------------------

_MEMORY = "cannot be rendered: it needs more than 1024 MiB of memory"
HOSTILE = {
    "division by zero": ("{{ 1 / 0 }}", "cannot be rendered: ZeroDivisionError: division by zero"),
    "syntax": ("{% for %}", "cannot be rendered: TemplateSyntaxError: "),
    "an unknown tag": ("{% frobnicate %}", "cannot be rendered: TemplateSyntaxError: Encountered unknown tag 'frobnicate'"),
    "an unknown filter": ("{{ 'a' | frobnicate }}", "cannot be rendered: TemplateAssertionError: No filter named 'frobnicate'"),
    "include": ("{% include 'x' %}", "cannot be rendered: TypeError: no loader for this environment specified"),
    "import": ("{% import 'os' as os %}", "cannot be rendered: TypeError: no loader"),
    "extends": ("{% extends 'x' %}", "cannot be rendered: TypeError: no loader"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "cannot be rendered: RecursionError: maximum recursion depth"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be rendered: "),
    "attributes of objects": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered: (SecurityError|UndefinedError): "),
    "changing a list": ("{{ messages.append(1) }}", "cannot be rendered: SecurityError: "),
    "a range that is too long": ("{% for i in range(10**9) %}x{% endfor %}", "cannot be rendered: OverflowError: Range too big"),
    "what is not there": ("{{ nothing.at.all }}", "cannot be rendered: UndefinedError: 'nothing' is undefined"),
    "an unknown method": ("{{ messages.frobnicate() }}", "cannot be rendered: UndefinedError: "),
    "a wrong call": ("{{ strftime_now() }}", "cannot be rendered: TypeError: "),
    "a refusal": ("{{ raise_exception('Only \x1b[31m text\nplease.') }}", r"refuses the messages: Only \[31m text please$"),
    "a long refusal": ("{{ raise_exception('x' * 10000) }}", "refuses the messages: x{300}…$"),
    "images left out": ("{{ messages[-1].role }}", "cannot be rendered: it writes 0 <image> for 1 images"),
    "images twice": ("<image><image> Is it normal?", "cannot be rendered: it writes 2 <image> for 1 images"),
    "a huge text": ("{{ 'x' * 10**12 }}", _MEMORY),
    "a huge output": ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", _MEMORY),
    "a large output": ("{{ '<image>' + 'x' * 2**25 }}",
                       "cannot be rendered: it writes 33554439 characters; at most 16777216 were expected"),
    "doubling": ("{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
                 _MEMORY),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_one_sentence(name):
    source, sentence = HOSTILE[name]
    start = time.monotonic()
    with pytest.raises(UserError, match="^the chat template FILE " + sentence) as error:
        by_us(source, messages_of(TALKS["one question"]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and time.monotonic() - start < 100
    assert by_us(STRINGS["joined"], [{"role": "user", "content": "Q"}]).startswith("<|im_start|>user\nQ")  # and others go on


def test_a_prompt_that_ends_the_process_is_refused_alone(monkeypatch):
    class Fragile:
        def ask(self, request):
            return {"died": "it takes too long"} if len(request["messages"][-1]["text"]) > 9 or "always" in request["source"] else {"text": "fine"}
    monkeypatch.setattr(template_process, "_running", Fragile)
    monkeypatch.setattr(template_process, "_hopeless", {})
    question = lambda text, source: by_us(source, [{"role": "user", "content": text}])
    with pytest.raises(UserError, match="FILE cannot be rendered: it takes too long"):
        question("long " * 9, "once")
    assert question("short", "once") == "fine"
    for _ in range(2):
        with pytest.raises(UserError, match="FILE cannot be rendered: it takes too long"):
            question("short", "always")
    assert list(template_process._hopeless) == [("always", "the chat template FILE")]


def test_many_parts_cost_what_their_length_costs():
    """Each is sought behind the one before it, not from the beginning."""
    from llavamed_jax.text import template_child

    class Searched(str):
        def find(self, piece, start=0):
            starts.append(start)
            return super().find(piece, start)

    class Joins:
        def render_jinja_template(talks, **_):
            return [[Searched("".join(part["text"] for part in talks[0][0]["content"]))]]
    starts, parts = [], [{"type": "text", "text": f"{i:07}"} for i in range(40_000)]
    found = template_child.render(Joins, "x", [{"role": "user", "text": "", "parts": parts}], {}, "<image>")
    assert found["text"].endswith("0039999") and starts == list(range(0, 7 * 40_000, 7))


# ---- the process -----------------------------------------------------------------------------------------------------


def child():
    return template_process._process[1]._popen


def test_the_process_is_started_once_and_again_where_it_is_gone():
    message = [{"role": "user", "content": "Q"}]
    assert by_us(A, message) == "A Q"
    first = child()
    assert by_us(B, message) == "B Q" and child() is first
    first.kill()
    with pytest.raises(UserError, match="its process was killed, probably because the system ran out of memory"):
        by_us("gone {{ messages[0].content }}", message)
    assert by_us(A, message) == "A Q" and child() is not first


def test_threads_and_forks_have_their_own_answers():
    def ask(n):
        found[n] = [by_us(A, [{"role": "user", "content": f"{n} {i}"}]) for i in range(20)]
    found = {}
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [f"A {n} {i}" for i in range(20)] for n in range(8)}
    parent = child()
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    worker = fork.Process(target=lambda: queue.put((by_us(A, [{"role": "user", "content": "forked"}]), child().pid)))
    worker.start()
    text, pid = queue.get(timeout=120)
    worker.join(60)
    assert text == "A forked" and pid != parent.pid and parent.poll() is None
    assert by_us(A, [{"role": "user", "content": "here"}]) == "A here"


@pytest.mark.parametrize("way", ["return", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_nothing_is_left_behind(way, tmp_path):
    code = ("import os\nfrom llavamed_jax.text import template_process as p\n"
            "p.render(dict(source='x', messages=[dict(role='user', text='x', parts=[])], tokens={}, marker='<image>'), 'T')\n"
            f"print(p._process[1]._popen.pid, flush=True)\n{'pass' if way == 'return' else way}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(quick_renderer.write(tmp_path))})
    pid = int(done.stdout)
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("the process that renders is still there")


def test_another_version_without_the_private_function(monkeypatch):
    """The ways are tried in turn then; `template_child` is run here, in this process."""
    from llavamed_jax.text import template_child

    class Machinery:
        @staticmethod
        def render_jinja_template(*args, **kw):
            from transformers.utils.chat_template_utils import render_jinja_template
            return render_jinja_template(*args, **kw)

    for source in (*PARTS.values(), *STRINGS.values(), MIXED):
        chat = read_messages(messages_of(TALKS["a longer talk"])[1:])
        given = [dict(role=("user", "assistant")[i % 2], text=turn, parts=parts)
                 for i, (turn, parts) in enumerate(zip(chat.turns, chat.parts, strict=True))]
        reply = template_child.render(Machinery, source, given, TOKENS, "<image>")
        assert reply["text"] == ChatTemplate(source, "FILE", TOKENS).render(chat)
