"""`eval.py --endpoint`: any served model is asked the same questions, and a server that fails now and then changes nothing."""

import base64
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.cli import eval as cli
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation.answering import endpoint
from llavamed_jax.evaluation.answering.answerer import Generation
from llavamed_jax.evaluation.answering.ask import ask
from llavamed_jax.evaluation.scoring.predictions import read_predictions
from llavamed_jax.images.load import load_image
from llavamed_jax.openai_client import client
from tests.support.openai_server import OpenAiServer, Raw, yes_or_no
from tests.support.small_sample import small_sample
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
IMAGES = sorted(str(path) for path in (SAMPLE / "images").iterdir())
ARGV = ["--config", f"{ROOT / 'configs/eval/vqa_rad.py'}:demo", "--model", "tiny"]


def sent(body):
    """(text, the image's bytes) of a request's only message."""
    (message,) = body["messages"]
    picture, text = message["content"]
    assert (message["role"], picture["type"], text["type"]) == ("user", "image_url", "text")
    head, _, data = picture["image_url"]["url"].partition(";base64,")
    return text["text"], head.removeprefix("data:"), base64.b64decode(data, validate=True)


def an_answerer(server, **settings):
    return endpoint.Endpoint(client.Service(server.url, "tiny", **{"backoff": 0.01} | settings))


# --- what is sent ---


def test_a_plain_file_is_sent_as_it_is(tmp_path):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    files = {"image/jpeg": Path(IMAGES[0]), "image/png": tmp_path / "a.png", "image/webp": tmp_path / "named_otherwise.jpg"}
    grey.save(files["image/png"])
    grey.convert("RGB").save(files["image/webp"], "WEBP")
    for kind, path in files.items():
        assert endpoint.data_url(str(path)) == f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(IMAGES[0]).save(path, "JPEG", exif=exif)


def deep(path):
    Image.fromarray((np.arange(64, dtype=np.uint16) * 60).reshape(8, 8)).save(path, "PNG")


def transparent(path):
    Image.fromarray(np.full((4, 4, 4), 90, np.uint8)).save(path, "PNG")


def cmyk(path):
    Image.new("CMYK", (8, 8), (10, 200, 30, 40)).save(path, "JPEG")


def moving(path):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 200)]
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], lossless=True)


def bitmap(path):
    Image.open(IMAGES[0]).save(path, "BMP")


def dicom(path):
    pydicom = pytest.importorskip("pydicom")
    path.write_bytes(Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes())


@pytest.mark.parametrize("make", [rotated, deep, transparent, cmyk, moving, bitmap, dicom])
def test_what_servers_read_in_different_ways_is_sent_as_the_pixels_that_a_model_here_sees(make, tmp_path):
    path = tmp_path / "image"
    make(path)
    head, _, data = endpoint.data_url(str(path)).partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/png" and image.mode == "RGB" and not image.getexif()
    assert np.array_equal(np.asarray(image), np.asarray(load_image(str(path))))


def test_one_frame_of_a_file_is_sent_alone(tmp_path):
    moving(tmp_path / "two.webp")
    data = base64.b64decode(endpoint.data_url(f"{tmp_path}/two.webp#frame=2").partition(",")[2])
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (200, 0, 0)


def test_an_image_that_cannot_be_read_fails_its_own_questions_only(tmp_path):
    (tmp_path / "half.jpg").write_bytes(Path(IMAGES[0]).read_bytes()[:2000])
    questions = [("a?", (str(tmp_path / "half.jpg"),)), ("b?", (IMAGES[0],)), ("c?", ("nowhere.jpg",))]
    failed = {}
    with OpenAiServer(yes_or_no) as server:
        found = dict(an_answerer(server).answers(questions, [0, 1, 2], Generation(), failed))
    assert list(found) == [1] and sorted(failed) == [0, 2] and len(server.log) == 1
    assert "is damaged" in str(failed[0]) and "nowhere.jpg does not exist" in str(failed[2])


def test_questions_and_settings_as_they_arrive():
    questions = [("What is it?", (IMAGES[0],)), ("Why?", (IMAGES[1],)), ("What is it?", (IMAGES[0],)), ("What is it?", (IMAGES[1],))]
    with OpenAiServer(lambda body: f"  {sent(body)[0]}\n") as server:
        greedy = an_answerer(server).answers(questions, [0, 1, 2, 3], Generation(max_new_tokens=9, seed=5), {})
        assert {i: answer.text for i, answer in greedy} == {i: text for i, (text, _) in enumerate(questions)}
        assert {(each.body["max_tokens"], each.body["temperature"], "seed" in each.body) for each in server.log} == {(9, 0.0, False)}
        wanted = [(text, "image/jpeg", Path(image).read_bytes()) for text, (image,) in questions]
        assert Counter(sent(each.body) for each in server.log) == Counter(wanted)
        server.log.clear()
        list(an_answerer(server).answers(questions, [1, 2], Generation(temperature=0.7, seed=5), {}))
        drawn = {(sent(each.body)[0], each.body["temperature"], each.body["seed"]) for each in server.log}
        assert drawn == {("Why?", 0.7, 5), ("What is it?", 0.7, 6)}, "the second of two equal questions draws for itself"
    with pytest.raises(UsageError, match="generation.num_beams is 3; 1 was expected with --endpoint"):
        next(an_answerer(server).answers(questions, [0], Generation(num_beams=3), {}))


def test_answers_that_are_not_finished_or_withheld_are_counted(capsys):
    def answer(body):
        finish = {"a": "length", "b": "content_filter", "c": "stop"}[sent(body)[0]]
        return {"choices": [{"message": {"content": None if finish != "stop" else "x"}, "finish_reason": finish}]}

    with OpenAiServer(answer) as server:
        answers = ask(an_answerer(server), [(text, (IMAGES[0],)) for text in "abc"], Generation())
    assert [(each.text, each.finish_reason, each.tokens_cut) for each in answers] == [
        ("", "length", 0), ("", "content_filter", 0), ("x", "stop", 0)]
    said = capsys.readouterr().err
    assert "1 of 3 answers reached max_new_tokens" in said and "1 of 3 answers ended with finish_reason 'content_filter'" in said


TOO_LONG = [{"message": "The prompt is too long.", "code": "context_length_exceeded", "param": "messages"},
            {"message": "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens.", "code": None, "param": None},
            {"message": "the request exceeds the available context size, try increasing it", "code": None, "param": None}]


@pytest.mark.parametrize("refusal", TOO_LONG)
def test_a_prompt_that_is_too_long_costs_its_question_and_not_the_set(refusal, capsys):
    """More such questions in a row than would end a server's run; if no question is answered, a setting is wrong."""
    def answer(body):
        is_long = "long" in sent(body)[0]
        return Raw.response(json.dumps({"error": refusal}).encode(), "400 Bad Request") if is_long else "yes"

    questions = [(f"long {i}", (IMAGES[0],)) for i in range(20)] + [("short", (IMAGES[0],))]
    with OpenAiServer(answer) as server:
        answers = ask(an_answerer(server), questions, Generation())
        assert [(each.text, each.finish_reason, each.has_question) for each in answers] == [("", "prompt_too_long", False)] * 20 + [("yes", "stop", True)]
        assert "the model saw no word of 20 of 21 questions" in capsys.readouterr().err
        with pytest.raises(UserError, match="20 of 20 questions could not be answered.*400 Bad Request"):
            ask(an_answerer(server), questions[:20], Generation())


# --- the command line ---


@pytest.fixture
def hurried(monkeypatch):
    """The command line as it is, with short waits."""
    monkeypatch.setattr(client, "Service", functools.partial(client.Service, backoff=0.01))
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def small():
    """A request is a kilobyte or two."""
    return small_sample()


@pytest.fixture
def four_images(tmp_path):
    """The file that says which images are asked about."""
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps({"images": json.loads((SAMPLE / "held_out.json").read_text())["images"][:4]}))
    return f"--config.data.held_out={held_out}"


def test_faults_change_nothing_but_the_time(hurried, small, four_images, tmp_path, capsys):
    """A whole evaluation with its controls, against a server without faults and one that fails at every fourth request."""
    asks = [*ARGV, f"--config.data.root={small}", four_images, "--control", "image"]
    with OpenAiServer(yes_or_no) as server:
        assert cli.main([*asks, "--endpoint", server.url, "--workdir", str(tmp_path / "calm")]) == 0
        wanted = Counter(each.asked for each in server.log)
    with OpenAiServer(yes_or_no, fault_rate=0.25, slow=60, seed=2220) as server:
        argv = [*asks, "--endpoint", server.url, "--workdir", str(tmp_path / "rough")]
        assert cli.main([*argv, "--timeout", "0.7", "--concurrency", "12"]) == 0
    for name in ("predictions.jsonl", "predictions_control_image.jsonl"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "rough" / name).read_bytes()
    found = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("calm", "rough")]
    addresses, hashes = [each["asked"].pop("endpoint") for each in found], {each.pop("evaluation") for each in found}
    assert found[0] == found[1] and len(hashes) == 2 and addresses[0] != addresses[1] == server.url
    page = (tmp_path / "rough" / "report.html").read_text()
    rows = dict(re.findall("<tr><th>([^<]*)</th><td><code>([^<]*)</code></td></tr>", page))
    faults, again = server.faults_met(), re.fullmatch(r"(\d+) \(.*no reply in time: (\d+).*\)", rows["requests sent again"])
    late = int(again[2]) - faults["slow"]  # on a machine that is very busy a reply may be given up that was on its way
    assert faults.total() > 20 and len(server.log) == wanted.total() + int(again[1]), "once more for each failure, and never else"
    assert int(again[1]) - faults.total() <= late and len(server.asked_without_need(wanted)) <= late

    answers = read_predictions(tmp_path / "rough" / "predictions.jsonl")
    assert {each["model_id"] for each in answers} == {"tiny"} and {each["text"] for each in answers} == {"yes", "no"}
    metrics = json.loads((tmp_path / "rough" / "metrics.json").read_text())
    assert metrics["control"]["kind"] == "image" and metrics["organ"]["n"] > 2
    assert (rows["endpoint"], rows["model"], rows["requests"]) == (server.url, "tiny", str(len(server.log)))
    assert rows["prompt tokens"] == str(7 * wanted.total()) and rows["completion tokens"] == str(wanted.total())
    assert "device" not in rows
    assert "error" not in capsys.readouterr().err


def start(server, workdir, *more):
    command = [sys.executable, "eval.py", *ARGV, "--endpoint", server.url, "--workdir", str(workdir), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for_answers(server, count):
    until = time.monotonic() + 60
    while sum(each.fault is None for each in server.log) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


def kept(workdir):
    """The places of the questions whose answers a partial file holds."""
    lines = (workdir / "predictions.jsonl.partial").read_text().split("\n")[1:-1]
    return [json.loads(line)["question"] for line in lines]


def test_a_killed_evaluation_goes_on_without_asking_again(hurried, small, tmp_path, capsys):
    root = f"--config.data.root={small}"
    with OpenAiServer(yes_or_no, fault_rate=0.1, faults=("429", "500", "malformed", "dropped"), delay=0.1) as server:
        first = start(server, tmp_path, root)
        wait_for_answers(server, 40)
        first.kill()
        first.communicate()
        places, seen = kept(tmp_path), -1
        while seen != len(server.log):  # it still reads what was sent before the end
            seen = len(server.log)
            time.sleep(0.5)
        asked_before = Counter(each.asked for each in server.log if each.fault is None)
        server.log.clear()
        server.delay = 0.0
        assert cli.main([*ARGV, root, "--endpoint", server.url, "--workdir", str(tmp_path)]) == 0
        assert f"{len(places)} answers of an earlier start are reused" in capsys.readouterr().err
    assert 30 <= len(places) <= 40 + 8, "each answer is on the disk soon after it came"
    samples = read_predictions(tmp_path / "predictions.jsonl")
    answered = [each for each in server.log if each.fault is None and sent(each.body)[0] != "Which organ system is shown in this image?"]
    assert len(answered) == len(samples) - len(places), "exactly those that were not kept"
    again = Counter(each.asked for each in answered) & asked_before
    assert again.total() <= 8, "of what was asked before only what was under way"
    folder = small / "images"
    for each in samples:
        ((_, request),) = endpoint._requests([(each["prompt"], (str(folder / each["metadata"]["image"]),))], [0], {})
        assert each["text"] == yes_or_no({"messages": request}), "each answer stands at its own question"


def test_a_signal_stops_it_with_every_answer_kept(tmp_path):
    with OpenAiServer(yes_or_no, delay=0.1) as server:
        run = start(server, tmp_path)
        wait_for_answers(server, 12)
        server.delay = 30
        wait_for_answers(server, 16)  # the next ones are asked, since what was asked before is kept
        begun = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - begun < 20, "requests that are under way are cancelled"
    places = kept(tmp_path)
    assert run.returncode == 75 and len(places) >= 8
    assert said.endswith(f"stopped; {len(places)} answers are kept in {tmp_path}: run again to continue\n")


@pytest.mark.parametrize(("more", "status", "sentence"), [
    (["--endpoint", "http://127.0.0.1:1/v1"], 1, "http://127.0.0.1:1/v1 (model 'tiny') cannot be reached: Connection refused"),
    (["--endpoint", "SERVER", "--model", "huge"], 1, "answers 404 Not Found: The model `huge` does not exist"),
    (["--endpoint", "SERVER/nowhere"], 1, "answers 404 Not Found: Resource not found"),
    (["--endpoint", "SERVER", "--config.generation.num_beams=3"], 2, "OpenAI's protocol has no beam search"),
    (["--endpoint", "SERVER", "--model", ""], 2, "--endpoint needs --model NAME"),
    (["--endpoint", ""], 2, "the address '' is not valid"),
    (["--endpoint", "SERVER", "--dtype", "float32"], 2, "--dtype is for a model that is loaded here"),
    (["--endpoint", "SERVER", "--checkpoint", "x"], 2, "not allowed with argument"),
    (["--endpoint", "SERVER", "--concurrency", "0"], 2, "concurrency is 0; at least 1 was expected"),
    (["--endpoint", "SERVER", "--concurrency", "many"], 2, "--concurrency: invalid int value: 'many'"),
    (["--predictions", "x"], 2, "--model can be used only with --endpoint")])
def test_mistakes_are_one_sentence(hurried, more, status, sentence, tmp_path, capsys):
    with OpenAiServer(yes_or_no) as server:
        more = [word.replace("SERVER", server.url) for word in more]
        assert cli.main(instead([*ARGV, "--workdir", str(tmp_path / "w")], more)) == status
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert not server.log and not (tmp_path / "w").exists()


@pytest.mark.parametrize("what", ["nobody listens", "a wrong key", "no such model", "a redirect", "errors alone", "nobody judges"])
def test_where_nothing_was_answered_the_workdir_is_as_before(what, hurried, tmp_path, monkeypatch, capsys):
    """A new one is gone, and one that is there keeps what it holds, an earlier start's answers of another model among it."""
    def answer(body):
        if what == "a redirect":
            return Raw.response(b"", "307 Go", {"Location": "http://elsewhere.invalid/"})
        return Raw.response(b"", "400 No" if what == "errors alone" else "200 OK")

    with OpenAiServer(answer, key="right" if what == "a wrong key" else None) as server:
        url = "http://127.0.0.1:1" if what.startswith("nobody") else server.url
        words = instead(ARGV, ["--endpoint", url, "--model", "huge" if what == "no such model" else "tiny", "--control", "image"])
        if what == "nobody judges":
            (tmp_path / "p.jsonl").write_text("".join(
                json.dumps({"question_id": sample.question_id, "text": "yes"}) + "\n" for sample in read_vqa_rad(SAMPLE, "test", "clean")))
            words = ["--config", ARGV[1].removesuffix(":demo"), f"--config.data.root={SAMPLE}", "--predictions", str(tmp_path / "p.jsonl"),
                     "--config.judge.model=tiny", f"--config.judge.endpoint={url}"]
        assert cli.main([*words, "--workdir", str(tmp_path / "new")]) == 1
        assert not (tmp_path / "new").exists()
        old = tmp_path / "old"
        old.mkdir()
        (old / "notes.txt").write_text("mine")
        (old / "predictions.jsonl.partial").write_text('{"answers of": "another model"}\n')
        before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in old.iterdir()}
        assert cli.main([*words, "--workdir", str(old)]) == 1
        assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in old.iterdir()} == before
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_key_that_is_refused_is_not_printed(hurried, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    with OpenAiServer(yes_or_no, key="another") as server:
        assert cli.main([*ARGV, "--workdir", str(tmp_path), "--endpoint", server.url]) == 1
    said = "".join(capsys.readouterr())
    assert "answers 401 Unauthorized: Incorrect API key provided: [key]" in said and "secret" not in said


def test_nothing_of_jax_or_torch_is_imported(small, four_images, tmp_path):
    """A machine that only asks a server, or only scores, needs no accelerator's software, and waits for none to be imported."""
    code = ("import sys\n"
            "class Absent:  # not None in sys.modules, which scipy takes for a module\n"
            "    def find_spec(name, path=None, target=None):\n"
            "        if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'optax'): raise ImportError(name)\n"
            "sys.meta_path.insert(0, Absent)\n"
            "from llavamed_jax.cli.eval import main\n"
            "middle = sys.argv.index('and')\n"
            "sys.exit(main(sys.argv[1:middle]) or main(sys.argv[middle + 1:])\n"
            "         or not {'torch', 'google.cloud.storage'}.isdisjoint(sys.modules))")
    common = ["--config", str(ROOT / "configs/eval/vqa_rad.py"), f"--config.data.root={small}", four_images, "--workdir"]
    with OpenAiServer(yes_or_no) as server:
        asks = [*common, str(tmp_path / "asked"), "--endpoint", server.url, "--model", "tiny"]
        scores = [*common, str(tmp_path / "scored"), "--predictions", str(tmp_path / "asked" / "predictions.jsonl")]
        done = subprocess.run([sys.executable, "-c", code, *asks, "and", *scores], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked" / "report.html").exists() and (tmp_path / "scored" / "report.html").exists()
