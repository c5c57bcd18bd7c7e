"""The worked examples of docs/architecture.md do what the page says: each is read from the page and registered."""

import ast
import functools
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.checkpoints.export.chat_template import chat_template
from llavamed_jax.cli import eval as eval_command
from llavamed_jax.cli.common import load_config
from llavamed_jax.config import IGNORE, preset
from llavamed_jax.datasets import detect, registry
from llavamed_jax.datasets.sample import CLOSED, OPEN, VqaSample
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation import questions
from llavamed_jax.evaluation.report import report, tensorboard
from llavamed_jax.evaluation.scoring import registry as metric_registry
from llavamed_jax.evaluation.scoring import score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.processor import Processor
from llavamed_jax.text import styles, templates
from llavamed_jax.text.conversation import render

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TOKENIZER = ROOT / "samples" / "vqa_rad" / "tokenizer.model"


def example(title: str, number: int = 0) -> str:
    """A block of Python under a heading of the page."""
    section = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[number]


@pytest.fixture
def template(monkeypatch):
    (row,) = ast.literal_eval(example("A template").strip().rstrip(",") + ",")
    monkeypatch.setitem(templates.TEMPLATES, row[0], templates.Template(*row))
    return row[0]


def test_a_template_is_one_row(template):
    processor = Processor.load(TOKENIZER, template=template, image_size=96, image_mode="pad")
    text = processor.prompt([{"role": "user", "content": "Which organ?"}])
    assert text == "Answer in one word. USER: Which organ? ASSISTANT:"
    ids, labels = processor.training_example(
        [{"from": "human", "value": "Which organ?"}, {"from": "gpt", "value": "Lung."}]
    )
    supervised = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE]
    assert [label for label in labels if label != IGNORE] == supervised
    assert processor.decode(supervised).strip() == "Lung." and supervised[-1] == processor.tokenizer.eos_id


def test_a_template_that_is_not_registered_is_refused_with_those_that_are(template, monkeypatch):
    assert templates.get_template(template).system == "Answer in one word."
    monkeypatch.delitem(templates.TEMPLATES, template)
    with pytest.raises(templates.UserError, match="'mine:one_word' does not exist; one of v1.5:vicuna_v1"):
        templates.get_template(template)


MINE = {  # what no template of ours has: other roles, separators, quotes, braces, examples, words that end a question, blanks
    "roles and quotes": templates.Template("mine:a", "TWO", 'Say "yes"\\or {no}. \U0001fac1 {{ x }}', ("THE USER's", "ASSISTANT {0}"),
                                           "\n%}", "<end>"),
    "one separator for both": templates.Template("mine:b", "TWO", "S", ("Q", "A"), "\n"),
    "two separators in SINGLE": templates.Template("mine:c", "SINGLE", "S", ("Q", "A"), "###", "</s>"),
    "stripped SINGLE": templates.Template("mine:d", "SINGLE", " S ", ("Q", "A"), "\n", "</s>", is_stripped=True),
    "examples": templates.Template("mine:e", "TWO", "S", ("Q", "A"), " ", "</s>", ("Hi!", " Hello. ")),
    "stripped examples": templates.Template("mine:f", "TWO", "S", ("Q", "A"), " ", "</s>", (" Hi!", "Hello. "), True),
    "examples in LLAMA_2": templates.Template("mine:g", "LLAMA_2", "S", ("", ""), "<s>", "</s>", ("Hi!", "Hello.")),
    "examples in LLAMA_2 without a system": templates.Template("mine:h", "LLAMA_2", "", ("", ""), "<s>", "</s>", ("Hi!", "Hello.")),
    "a bracket between turns": templates.Template("mine:i", "LLAMA_2", "", ("", ""), "[x]", "</s>"),
    "words after a question": templates.Template("mine:j", "TWO", "S", ("Q", "A"), " ", "</s>", after_question=" Answer in one word."),
    "captions with a system": templates.Template("mine:k", "PLAIN", "S: ", ("", ""), "\n"),
    "v1.0's training text": templates.Template("mine:l", "V0", "S", ("Human", "Assistant"), "###"),
    "a style of one's own": templates.Template("mine:m", "CHATML", "Be brief.", ("user", "assistant"), "<|im_end|>\n"),
}
CHATML = styles.Style(
    "v1", head="<|im_start|>system\n{system}{sep}", question="<|im_start|>{user}\n{text}{sep}",
    answer="<|im_start|>{assistant}\n{text}{end}", empty_answer="<|im_start|>{assistant}\n", first="<|first|>{text}{sep}")
PICTURE = {"type": "image", "image": Image.new("RGB", (8, 8))}
TALKS = [
    [("user", [{"type": "text", "text": " What is shown? "}, PICTURE])],
    [("user", "Is it {normal}?"), ("assistant", ' No: "a nodule". '), ("user", "  Where?\n")],
    [("system", "Answer in 'one' word."), ("user", "Which side?")],
    [("system", ""), ("user", "Q1"), ("assistant", ""), ("user", "Q2")],
    [("user", ""), ("assistant", "A"), ("user", "Q")],
    [("user", "Q"), ("assistant", "A"), ("user", "")],
]


def both_ways(template, messages):
    """What a Processor writes, and what transformers writes of the exported chat template; or that each refuses."""
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    plain = [{**m, "content": [{"type": "image"} if part["type"] == "image" else part for part in m["content"]]
              if isinstance(m["content"], list) else m["content"]} for m in messages]
    source = chat_template(replace(preset("v15-7b"), template=template.name))
    processor = Processor.load(TOKENIZER, template=template.name, image_size=96)
    found = []
    for write in (lambda: processor.prompt(messages),
                  lambda: rendering.render_jinja_template([plain], chat_template=source,
                                                          add_generation_prompt=template.labels != "plain")[0][0]):
        try:
            found.append(write())
        except Exception as error:
            found.append((error.args[0].split(", ")[0],))
    return found


@pytest.mark.parametrize("name", MINE)
def test_a_template_is_exported_as_it_is_asked(name, monkeypatch):
    template = MINE[name]
    monkeypatch.setitem(styles.STYLES, "CHATML", CHATML)
    monkeypatch.setitem(templates.TEMPLATES, template.name, template)
    written = 0
    for talk in TALKS:
        ours, theirs = both_ways(template, [{"role": role, "content": content} for role, content in talk])
        assert ours == theirs, talk
        written += isinstance(ours, str)
    assert written == (2 if template.form.is_single else 5 if template.form.needs_first and not template.examples else 6)


def test_templates_that_cannot_work_say_so(monkeypatch):
    with pytest.raises(UserError, match="mine:x has 1 examples; questions and answers in turn"):
        templates.Template("mine:x", "TWO", "", ("Q", "A"), " ", "</s>", ("Hi!",))
    with pytest.raises(UserError, match="mine:x has the style 'THREE'; one of SINGLE, TWO, LLAMA_2, PLAIN, V0, CHATML, .* was expected"):
        render(templates.Template("mine:x", "THREE", "", ("Q", "A"), " "), ["Q"])
    for style in ("TWO", "LLAMA_2"):
        monkeypatch.setitem(templates.TEMPLATES, "mine:x", templates.Template("mine:x", style, "", ("Q", "A"), " "))
        processor = Processor.load(TOKENIZER, template="mine:x", image_size=96)
        with pytest.raises(UserError, match=r"mine:x has no end-of-answer text \(sep2\)"):
            processor.training_example([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])


def test_a_style_of_ones_own_writes_what_it_says(monkeypatch):
    monkeypatch.setitem(styles.STYLES, "CHATML", CHATML)
    turns = ["Is it?", "No.", "Sure?", None]
    assert render(MINE["a style of one's own"], turns, "S") == (
        "<|im_start|>system\nS<|im_end|>\n<|first|>Is it?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nSure?"
        "<|im_end|>\n<|im_start|>assistant\n")


# ---- a data set ------------------------------------------------------------------------------------------------------

CARDS = [
    {"split": "train", "image": "a.png", "questions": [{"id": 1, "question": "Where is it?", "answer": "left"}]},
    {"split": "train", "image": "b.png", "questions": [{"id": 2, "question": "Is it?", "answer": "yes"}]},
    {"split": "test", "image": "c.png", "questions": [{"id": 3, "question": "Which organ?", "answer": "lung"},
                                                      {"id": 4, "question": "Is it normal?", "answer": "no"}]},
    {"split": "test", "image": "d.png", "questions": [{"id": 5, "question": "Is it large?", "answer": "yes"}]},
]


@pytest.fixture
def cards(tmp_path):
    """The folder of a set whose reader the package does not have; the reader is registered from a file of its own."""
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "cards.py").write_text(example("A data set"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("cards", tmp_path / "reader" / "cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert registry.register(module.DATA_SET) is registry.register(module.DATA_SET)  # a notebook's cell may run twice
    root = tmp_path / "set"
    root.mkdir()
    (root / "cards.json").write_text(json.dumps(CARDS), encoding="utf-8")
    for index, name in enumerate("abcd"):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(root / f"{name}.png")
    yield root
    registry.SETS.pop("cards", None)


def test_a_data_set_is_trained_on_under_its_own_layout(cards):
    assert detect.layout_of(cards) == "cards"
    for data in (str(cards), [{"path": str(cards), "weight": 2}]):
        training = read_training(data)
        assert [turn["value"] for turn in list(training.readable())[0]["conversations"]] == ["<image>\nWhere is it?", "left"]
        assert training.num_records == 2 and len(training) == (2 if isinstance(data, str) else 4)
        assert list(training.found) == ["cards train: 2 questions on 2 images, 1 open, 1 closed"]
    with pytest.raises(UserError, match=r"the folder .* holds none of the known data sets: .*, Cards \(cards.json\)"):
        read_training(cards.parent / "reader")


def test_a_data_set_is_asked_and_scored_under_its_name(cards, tmp_path):
    """By the command, with predictions in a model's place; recipes of other sets name it with `data.name`."""
    cfg = load_config("configs/eval/llava_med.py", ["data.name=cards", f"data.root={cards}"])
    samples, training = questions.load_samples("cards", cfg.data.root, "test", "clean", **questions.further(cfg.data))
    assert [sample.answer for sample in samples] == ["lung", "no", "yes"] and len(training) == 2
    assert questions.describe(cfg, samples) == "cards test: 3 questions on 2 images, 1 open, 2 closed"
    assert questions.source_files(cfg.data) == [cards / "cards.json"]
    predictions = tmp_path / "p.jsonl"
    rows = [dict(question_id=s.question_id, prompt=s.question, text=t, answer_id=str(n), model_id="m", metadata={})
            for n, (s, t) in enumerate(zip(samples, ("lung", "no", "no"), strict=True))]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert eval_command.main(["--config", "configs/eval/llava_med.py", "--config.data.name=cards", f"--config.data.root={cards}",
                              "--predictions", str(predictions), "--workdir", str(tmp_path / "w")]) == 0
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["split"], metrics["n_open"], metrics["n_closed"]) == ("cards", "test", 1, 2)
    assert "Evaluation on Cards, test split" in (tmp_path / "w" / "report.html").read_text()
    assert metrics["strict"]["closed_accuracy"] == 50.0 and metrics["strict"]["open_exact"] == 100.0
    assert eval_command.main(["--config", "configs/eval/llava_med.py", "--config.data.name=cards", f"--config.data.root={cards}",
                              "--write_llava", str(tmp_path / "out.json")]) == 0
    assert len(read_training(tmp_path / "out.json")) == 3


def test_what_is_wrong_with_a_data_set_is_said_as_of_any_other(cards):
    with pytest.raises(UserError, match=r"looks like Cards \(cards.json\): data.name=cards"):
        questions.load_samples("slake", str(cards), "test", "clean")
    with pytest.raises(UsageError, match="data.split is 'validation'; train or test was expected for cards"):
        questions.load_samples("cards", str(cards), "validation", "clean")
    with pytest.raises(UsageError, match="the splits of cards have no common images"):
        questions.load_samples("cards", str(cards), "test", "clean", held_out="x.json")
    with pytest.raises(UserError, match="the name 'slake' already belongs to SLAKE; another name"):
        registry.register(registry.DataSet("slake", "Mine", "x", read=lambda selected: []))
    (cards / "d.png").unlink()
    with pytest.raises(UserError, match="d.png does not exist"):
        questions.load_samples("cards", str(cards), "test", "clean")
    del registry.SETS["cards"]
    with pytest.raises(UsageError, match="data.name is 'cards'; vqa_rad or slake"):
        questions.load_samples("cards", str(cards), "test", "clean")


@pytest.mark.parametrize("read, sentence", [
    (lambda selected: 1 / 0, "^the reader of Mine failed on SET: ZeroDivisionError: division by zero$"),
    (lambda selected: [{"question": "Q"}], "^the reader of Mine returned {'question': 'Q'} for SET; a list of VqaSample was expected$"),
    (lambda selected: None, "^the reader of Mine failed on SET: TypeError")])
def test_what_a_reader_of_ones_own_does_wrong_is_one_sentence(read, sentence, cards, monkeypatch):
    monkeypatch.chdir(cards.parent)
    Path("SET").mkdir()
    monkeypatch.setitem(registry.SETS, "mine", registry.DataSet("mine", "Mine", "SET", read, is_at=lambda path: path.name == "SET"))
    for use in (lambda: read_training("SET"), lambda: questions.load_samples("mine", "SET", "test", "clean")):
        with pytest.raises(UserError, match=sentence):
            use()


def test_a_recipe_of_ones_own_registers_its_set(cards, tmp_path, monkeypatch):
    """By the page's second example, which stands beside the reader, in a folder that is not on `sys.path`."""
    del registry.SETS["cards"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cards", raising=False)
    (tmp_path / "reader" / "mine.py").write_text(example("A data set", 1), encoding="utf-8")
    for _ in range(2):
        cfg = load_config(f"{tmp_path}/reader/mine.py", [f"data.root={cards}"])
        assert len(questions.load_samples(cfg.data.name, cfg.data.root, cfg.data.split, cfg.protocol)[0]) == 3
        assert cfg.judge.model == ""
    monkeypatch.delitem(sys.modules, "cards")


@pytest.mark.parametrize("change, sentence", [
    (lambda card: card | {"split": "dev"}, "the split of row 2 of .*cards.json is 'dev'; one of train, test was expected"),
    (lambda card: {"split": "test", "image": "c.png"}, "row 2 of .*cards.json has no 'questions'; {split, image, questions} was"),
    (lambda card: card | {"questions": "Q"}, "row 2 of .*cards.json has the questions 'Q'; a list was expected"),
    (lambda card: card | {"questions": {"id": 3}}, "row 2 of .*cards.json has the questions a dict; a list was expected"),
    (lambda card: card | {"questions": [{"id": 3, "question": "Q", "answer": "A"}, 5]},
     r"questions\[1\] of row 2 of .*cards.json has no 'answer'"),
    (lambda card: card | {"questions": [{"id": 3, "question": " ", "answer": "A"}]},
     r"questions\[0\] of row 2 of .*cards.json has an empty question"),
    (lambda card: 7, "row 2 of .*cards.json has no 'split'")])
def test_a_malformed_row_of_the_example_is_named(change, sentence, cards):
    rows = [change(card) if index == 2 else card for index, card in enumerate(CARDS)]
    (cards / "cards.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        questions.load_samples("cards", str(cards), "test", "clean")


def test_the_example_refuses_a_split_that_it_does_not_have(cards):
    with pytest.raises(UserError, match="the split is 'validation'; one of train, test was expected"):
        registry.SETS["cards"].questions(registry.Selection(cards, "validation"))


@pytest.mark.parametrize("name", ["slake", "parquet", "captions"])
@pytest.mark.parametrize("read", [lambda selected: [], functools.partial(list, ())], ids=["function", "partial"])
def test_a_set_of_the_package_keeps_its_name(name, read, monkeypatch):
    """Whatever kind of callable reads it."""
    own = replace(registry.SETS[name], read=functools.partial(registry.SETS[name].read))
    monkeypatch.setitem(registry.SETS, name, own)
    assert registry.register(own) is own
    with pytest.raises(UserError, match=f"the name '{name}' already belongs to {own.label}; another name was expected for the data set"):
        registry.register(registry.DataSet(name, "Mine", "x", read))
    assert registry.SETS[name] is own


def test_the_first_registered_set_wins(cards):
    """Also after it was registered again."""
    second = registry.register(replace(registry.SETS["cards"], name="cards_2"))
    try:
        registry.register(replace(registry.SETS["cards"], label="Cards again"))
        assert detect.layout_of(cards) == "cards"
        del registry.SETS["cards"]
        assert detect.layout_of(cards) == "cards_2"
    finally:
        registry.SETS.pop(second.name)


# ---- a metric --------------------------------------------------------------------------------------------------------

SAMPLES = [
    VqaSample(1, Path("a.png"), "Where?", "left lung", OPEN),
    VqaSample(2, Path("b.png"), "What?", "liver", OPEN),
    VqaSample(3, Path("c.png"), "Is it normal?", "yes", CLOSED),
]


def answers(*texts: str) -> AnswerSet:
    return AnswerSet(SAMPLES, [{"question_id": i, "text": text} for i, text in enumerate(texts, 1)])


@pytest.fixture
def metric(monkeypatch):
    found = {}
    exec(compile(example("A metric"), "form.py", "exec"), found)
    monkeypatch.setattr(metric_registry, "METRICS", [*metric_registry.METRICS, found["METRICS"]])
    return found["METRICS"]


def test_a_metric_is_a_file_and_a_line(metric):
    """Two open answers, of which the first is longer than its gold: 50 %; and wherever numbers are shown."""
    own, other = answers("in the left lung", "liver", "yes"), answers("lung", "liver", "no")
    found = score.score(own, dataset="mine", split="test")
    assert (
        found["form"]["is_brief"] == 50 and found["form"]["is_brief_low"] == 0 and found["form"]["is_brief_high"] == 100
    )
    assert score.compare(own, other)["form"]["is_brief"]["difference"] == -50
    page = report.render(found | {"asked": {}}, own)
    assert "Brief answers" in page and "at most as many words as the gold answer" in page
    assert dict(tensorboard.scalars(found))["form/is_brief"] == 50


def test_without_it_nothing_of_it_is_there():
    found = score.score(answers("left", "liver", "yes"), dataset="mine", split="test")
    assert "form" not in found and set(found) >= {"paper", "strict"} and "captions" not in found


def test_a_metric_of_a_kind_that_does_not_occur_is_left_out(metric):
    closed = AnswerSet(SAMPLES[2:], [{"question_id": 3, "text": "yes"}])
    assert "form" not in score.score(closed, dataset="mine", split="test")


def test_two_metrics_of_one_name_are_refused(metric, monkeypatch):
    monkeypatch.setattr(metric_registry, "METRICS", [*metric_registry.METRICS, metric])
    with pytest.raises(ValueError, match="several metrics are called is_brief; each name once was expected"):
        score.score(answers("left", "liver", "yes"))
