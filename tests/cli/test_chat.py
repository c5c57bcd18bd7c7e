"""The terminal chat: its commands, what an error or Ctrl-C leaves of a conversation, and one run of the real program."""

import os
import select
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from llavamed_jax import chat, config
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image
from llavamed_jax.text.messages import read_messages

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "samples" / "vqa_rad" / "tokenizer.model"
TINY = LlavaConfig(VisionConfig(32, 64, 2, 2, 28, 14), DecoderConfig(1024, 32, 64, 1, 4, 2, 8, 1e-5, 1e4, 256, architecture="mistral"),
                   max_length=100, template="v1.5:mistral_instruct")


class FakeModel:
    """Answers with the number of the question and keeps what it was asked; `script` may raise between two pieces of an
    answer, `before` ahead of the first."""

    name, tower = "fake", "the tensors in the checkpoint"

    def __init__(self, script=None, before=None):
        self.processor = SimpleNamespace(images=lambda paths: [load_image(path) for path in paths], prompt=lambda messages: "",
                                         encode=lambda text: [1])
        self.script, self.before, self.asked, self.settings = script or {}, before or {}, [], []

    def stream(self, messages, **settings):
        read_messages(messages)  # what the real one refuses
        self.asked.append(messages)
        self.settings.append(settings)
        if self.before.get(len(self.asked)):
            raise self.before[len(self.asked)]
        yield f"answer {len(self.asked)}"
        if len(self.asked) in self.script:
            raise self.script[len(self.asked)]
        yield ", whole"


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs the program with the lines typed; returns the exit status, what was printed and the error lines."""
    def run(model, *lines, flags=()):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(chat.common, "load_assistant", lambda args: model)
        status = chat.main(["--checkpoint", "x", *flags])
        printed = capsys.readouterr()
        return status, printed.out, printed.err.splitlines()
    return run


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a b.png")
    return str(tmp_path / "a b.png")


def content(message):
    return [part.get("text", part.get("image")) for part in message["content"]]


def test_a_conversation_grows_and_an_image_goes_with_the_next_message_alone(talk, picture):
    model = FakeModel()
    flags = ["--image", picture, "--max_new_tokens", "7", "--seed", "3", "--temperature", "0"]
    status, out, errors = talk(model, "What?", "  Where? ", f"/image  {picture} ", "And here?", flags=flags)
    assert (status, errors) == (0, [])
    assert out.splitlines()[1:] == ["answer 1, whole", "answer 2, whole", "1 image for the next message", "answer 3, whole"]
    last = model.asked[-1]
    assert [m["role"] for m in last] == ["user", "assistant"] * 2 + ["user"]
    assert [content(m) for m in last[::2]] == [[picture, "What?"], ["Where?"], [picture, "And here?"]]
    assert [m["content"] for m in last[1::2]] == ["answer 1, whole", "answer 2, whole"]
    assert model.settings == [dict(max_new_tokens=7, temperature=0.0, seed=3)] * 3


@pytest.mark.parametrize("end", [(), ("",), (KeyboardInterrupt(),)])
def test_the_end_of_input_ends_with_0(talk, end):
    model = FakeModel()
    assert talk(model, "What?", *end)[0] == 0
    assert len(model.asked) == 1


def test_clear_forgets_messages_and_waiting_images(talk, picture):
    model = FakeModel()
    _, out, _ = talk(model, "What?", f"/image {picture}", "/clear", "New?")
    assert [content(m) for m in model.asked[-1]] == [["New?"]] and "a new conversation" in out.splitlines()


def test_several_images_and_a_system_text(talk, picture):
    """Names with spaces, in quotes too; /clear keeps what the program was started with."""
    model = FakeModel()
    flags = ["--image", picture, "--image", picture, "--system", "Be brief."]
    _, out, _ = talk(model, "What?", f"/image '{picture}'", f'/image "{picture}"', "Where?", "/clear", "New?", flags=flags)
    assert "2 images for the next message" in out.splitlines()
    system = {"role": "system", "content": "Be brief."}
    assert [content(m) for m in model.asked[1][1::2]] == [[picture, picture, "What?"], [picture, picture, "Where?"]]
    assert [asked[0] for asked in model.asked] == [system] * 3 and len(model.asked[-1]) == 2


def test_what_is_not_said_is_the_originals_and_a_tilde_is_home(talk, picture, monkeypatch):
    model = FakeModel()
    monkeypatch.setenv("HOME", os.path.dirname(picture))
    status, _, errors = talk(model, f"/image ~/{os.path.basename(picture)}", "What?")
    assert (status, errors, content(model.asked[0][0])) == (0, [], [picture, "What?"])
    assert model.settings == [dict(max_new_tokens=512, temperature=0.2, seed=0)]


def test_unknown_commands_and_an_image_without_a_name_print_the_help(talk):
    model = FakeModel()
    status, out, errors = talk(model, "/nonsense", "/image")
    assert (status, errors, model.asked) == (0, [], [])
    assert out.splitlines()[1:] == [chat.HELP] * 2


def test_an_image_that_cannot_be_read_is_said_at_once_and_not_kept(talk, tmp_path):
    model = FakeModel()
    (tmp_path / "text.png").write_text("no image")
    status, _, errors = talk(model, f"/image {tmp_path / 'absent.png'}", f"/image {tmp_path / 'text.png'}", "What?")
    assert status == 0 and len(errors) == 2
    assert errors[0].startswith("error: ") and "absent.png does not exist" in errors[0] and "is not an image" in errors[1]
    assert content(model.asked[-1][0]) == ["What?"]
    assert talk(model, flags=["--image", "absent.png"])[0] == 2


def test_an_error_keeps_the_conversation_and_the_image_that_waits(talk, picture):
    model = FakeModel({2: UserError("the prompt has 9999 positions; at most 7 were expected")})
    status, _, errors = talk(model, "What?", f"/image {picture}", "Too long", "Shorter")
    assert status == 0 and errors == ["error: the prompt has 9999 positions; at most 7 were expected"]
    assert [content(m) for m in model.asked[-1][::2]] == [["What?"], [picture, "Shorter"]]


def test_messages_that_do_not_fit_are_one_sentence(talk, picture):
    """A marker typed by hand, for which there is no image."""
    status, _, errors = talk(FakeModel(), f"/image {picture}", "<image> and <image>?", "Fine?")
    assert status == 0 and errors == ["error: message 0 has 1 images for 2 <image> markers"]


def test_control_c_stops_an_answer_and_keeps_what_was_said(talk):
    model = FakeModel({1: KeyboardInterrupt()})
    status, out, _ = talk(model, "What?", "Go on")
    assert status == 0 and "answer 1\nanswer 2, whole" in out
    assert [m["content"] for m in model.asked[-1][1::2]] == ["answer 1"]


def test_control_c_before_the_first_word_takes_the_question_back(talk, picture):
    """No empty answer stays in the conversation, and the image still waits."""
    model = FakeModel(before={2: KeyboardInterrupt()})
    status, out, _ = talk(model, "What?", f"/image {picture}", "Never mind", "Where?")
    assert status == 0 and "(stopped; the question was removed)" in out.splitlines()
    assert [m["role"] for m in model.asked[-1]] == ["user", "assistant", "user"]
    assert [content(m) for m in model.asked[-1][::2]] == [["What?"], [picture, "Where?"]]


def test_an_answer_that_is_its_end_alone_is_said_and_kept(talk):
    model = FakeModel()
    model.stream = lambda messages, **_: model.asked.append(messages) or iter(())
    _, out, _ = talk(model, "What?", "Why?")
    assert out.splitlines()[1:] == ["(an empty answer)"] * 2
    assert [m["content"] for m in model.asked[-1][1::2]] == [""]


# What a person sees: the program in a terminal of its own, with a model that takes its time.
TERMINAL = """
import sys, time
from types import SimpleNamespace
from llavamed_jax import chat

def stream(messages, **settings):
    if messages[-1]["content"][-1]["text"] == "slow":
        print("thinking", flush=True)
        time.sleep(60)
    yield "caf\u00e9 \u65e5\u672c "
    time.sleep(60 if messages[-1]["content"][-1]["text"] == "long" else 0)
    yield "| ".join(m["content"] for m in messages[1::2]) + "."

chat.common.load_assistant = lambda args: SimpleNamespace(
    name="fake", stream=stream, processor=SimpleNamespace(prompt=lambda messages: "", encode=lambda text: [1]))
sys.exit(chat.main(["--checkpoint", "x"]))
"""


def in_a_terminal(script, **environment):
    """Waits for each text and types what belongs to it; returns the exit status and all that was shown.

    A Ctrl-C is typed again where nothing follows it for a second: CPython looks for signals before it waits for a line, so that
    one which comes between the prompt and the wait is first seen when the line is there (a person presses again, too).
    """
    pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", TERMINAL], {**os.environ, "PYTHONPATH": str(ROOT), **environment})
    shown, at, typed_last = b"", 0, b""
    for text, typed in [*script, (None, b"")]:
        while text is None or text not in shown[at:]:
            try:
                for _ in range(120):
                    if select.select([terminal], [], [], 1)[0]:
                        break
                    if typed_last == b"\x03":
                        os.write(terminal, typed_last)
                more = os.read(terminal, 4096) if select.select([terminal], [], [], 0)[0] else b""
            except OSError:  # Linux's way to say that the other end is closed
                more = b""
            if not more:
                break
            shown += more
        assert text is None or text in shown[at:], shown.decode(errors="replace")
        at = len(shown)
        os.write(terminal, typed)
        typed_last = typed
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.replace(b"\r", b"").decode()


def test_in_a_terminal_control_c_stops_the_answer_and_not_the_program():
    status, shown = in_a_terminal([
        (b"you: ", b"slow\n"), (b"thinking", b"\x03"), (b"you: ", b"long\n"), ("日本 ".encode(), b"\x03"),
        (b"you: ", b"\x03"), (b"you: ", "é\n".encode()), (b"you: ", b"\x04")], LC_ALL="C.UTF-8")
    assert status == 0, shown
    shown = shown.replace("^C", "").replace("you: \n", "")  # "^C" is written at times of its own, and what it throws away may be twice
    assert "(stopped; the question was removed)\nyou: long\ncafé 日本 \nyou: é\ncafé 日本 café 日本 .\n" in shown


def test_a_terminal_without_unicode_shows_question_marks():
    status, shown = in_a_terminal([(b"you: ", b"What?\n"), (b"you: ", b"\x04")], LC_ALL="C.UTF-8", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert status == 0 and "\ncaf? ?? .\nyou: " in shown


@pytest.mark.parametrize("flags, sentence", [
    (["--max_new_tokens", "0"], "--max_new_tokens is 0; at least 1"), (["--seed", "-1"], "--seed is -1; at least 0"),
    (["--temperature", "nan"], "--temperature is nan; at least 0"), (["--temperature", "inf"], "--temperature is inf; at least 0"),
    (["--temperature", "-0.1"], "--temperature is -0.1")])
def test_settings_out_of_range_are_a_wrong_command_line(talk, flags, sentence):
    status, out, errors = talk(FakeModel(), "What?", flags=flags)
    assert (status, out) == (2, "") and len(errors) == 1 and errors[0].startswith(f"error: {sentence}")


def test_a_model_that_cannot_read_is_refused_before_the_first_question(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked for a question"))
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    assert chat.main(["--checkpoint", "preset:tiny"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[1:] == [
        "error: this checkpoint has no tokenizer files; give one with tokenizer=PATH (--tokenizer PATH)"]


def test_the_program_on_a_model_of_random_weights(picture, monkeypatch, capsys):
    """Names the tower that was used, refuses a long question in one sentence, and answers the next one."""
    monkeypatch.setitem(config.PRESETS, "tiny", TINY)
    lines = iter(["why " * 200, "What is shown?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = ["--tokenizer", str(TOKENIZER), "--image", picture, "--max_new_tokens", "3"]
    assert chat.main(["--checkpoint", "preset:tiny", *flags]) == 0
    printed = capsys.readouterr()
    tower, error = printed.err.splitlines()
    assert tower == "preset:tiny: vision tower: random weights"
    assert error.startswith("error: the prompt has ") and "at most 100 were expected" in error
    assert printed.out.startswith("preset:tiny, research use only") and len(printed.out.splitlines()) >= 2
