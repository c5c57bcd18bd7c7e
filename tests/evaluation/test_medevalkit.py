"""`scoring=medevalkit`: the toolkit's rules on hand-made cases, its prompts to the character, its judge, and its switches.

With `MEDEVALKIT=DIR`, a checkout of the toolkit at 9b12e3b, and the packages rouge, mathruler, pylatexenc and tenacity, the last test runs the
toolkit's own scorers beside ours on 2,000 generated answers.
"""

import importlib
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation import published, run, toolkit
from llavamed_jax.evaluation.scoring import medevalkit as rules
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.utils.files import to_jsonl, write_text
from tests.support.chat_set import ROOT, SAMPLE
from tests.support.openai_server import OpenAiServer


@pytest.mark.parametrize("text, gold, is_right", [
    ("Yes", "yes", True), ("yes, clearly", "yes", True), ("No.", "no", True), ("normal", "no", True), ("not sure", "no", True), ("I know", "no", True),
    ("yes, normal", "yes", False), ("yes and no", "no", False), ("", "no", False), ("The answer is yes", "yes", True), ("n.o", "no", True),
    ("\\boxed{yes} no", "yes", True), ("<answer>no</answer> yes", "no", True), ("maybe", "yes", False), ("no answer: yes", "yes", True)])
def test_yes_or_no_is_a_part_of_a_word(text, gold, is_right):
    assert rules.is_yes_no_right(text, gold) is is_right


@pytest.mark.parametrize("text, gold, is_right", [
    ("Left Lung.", "left lung", True), ("left  lung", "left lung", False), ("**Answer**: left lung", "left lung", False),
    ("**Answer**:left lung", "left lung", True), ("左肺", "左肺", True), ("", "", True), ("boxed lung", "none", False)])
def test_closed_answers_equal_the_gold(text, gold, is_right):
    assert rules.is_closed_right(text, gold) is is_right


def test_the_numbers_of_an_open_answer():
    right = rules.open_numbers("left lung", "Left lung")
    assert right["em"] == 1 and right["bleu1"] == 1 and right["rougel"] == pytest.approx(1, abs=1e-7)
    near = rules.open_numbers("the left lung lung", "left lung")
    assert [near[name] for name in ("em", "bleu1", "precision", "recall", "f1")] == pytest.approx([0, 0.5, 2 / 3, 1, 0.8])
    permuted = rules.open_numbers("the left lung lung", "left lung", True)
    assert [permuted[name] for name in ("precision", "recall", "f1")] == pytest.approx([0.8, 2 / 3, 1])
    assert {**permuted, "precision": 0, "recall": 0, "f1": 0} == {**near, "precision": 0, "recall": 0, "f1": 0}
    for empty in ("", ".", "..."):
        assert sum(rules.open_numbers(empty, "left lung")[name] for name in ("rouge1", "rouge2", "rougel", "f1")) == 0


LINES = ["A. left lung", "B. right lung", "C. no finding"]


@pytest.mark.parametrize("text, place", [
    ("B", 1), ("b.", 1), ("B. right lung", 1), ("B: left lung", 0), ("right lung", 1), ("The answer is B.", 1), ("because\n\nB. x", 1),
    ("B\n\nbecause", 1), ("(B)", None), ("", 0), ("A or B", None), ("Answer: C", 2), ("C. NO FINDING", 2), ("\\boxed{B}", 1)])
def test_choices(text, place):
    found = [rules.is_choice_right(text, right, LINES) for right in range(3)]
    assert sum(found) <= 1
    if place is not None:
        assert found[place], found


@pytest.mark.parametrize("text, place", [
    ("(B)", 1), ("A B", 1), ("(A) or (C)", 2), ("it is the right lung that we all see", 1), ("B.", 1), ("<answer>C</answer>", 2), ("b", None),
    ("\\boxed{B} <answer>C</answer>", 2), ("<answer>\\boxed{C}</answer> \\boxed{A}", 2), ("\\boxed{<answer>B</answer>}", 1), ("<answer>A", None),
    ("\\boxed{A} or \\boxed{C}", 2), ("\\boxed{C", None)])
def test_mmmus_own_reading_takes_the_last_letter_or_guesses(text, place):
    options = ("left lung", "right lung", "no finding")
    guesses = {rules.mmmu_choice(text, options, random.Random(seed)) for seed in range(30)}
    assert guesses == ({0, 1, 2} if place is None else {place})


@pytest.mark.parametrize("reply, is_right", [
    ("<think>x</think>\n<judge>0</judge>", True), ("<judge>1</judge>", False), ("0", True), ("1", False), ("", False), ("correct", False),
    ("<judge>0", False), ("<judge> 0 </judge>", True), ("<judge>0</judge><judge>0</judge>", False), ("it is 0", False)])
def test_a_verdict_without_its_tag_is_read_whole(reply, is_right):
    assert rules.read_verdict(reply) is is_right


@pytest.mark.parametrize("reply, said", [
    ("<think>x</think>\n<judge>0</judge>", True), ("<judge> 1 </judge>", False), ("0", True), ("1\n", False), ("", None), ("correct", None),
    ("<think>they express", None), ("<judge>0", None), ("<judge>0</judge><judge>0</judge>", None), ("<judge>2</judge>", None)])
def test_a_reply_without_a_verdict_is_not_read(reply, said):
    assert rules.stated_verdict(reply) is said


def test_the_prompts():
    assert rules.prompt("Is it?", "yes_no") == "Is it?\nPlease output 'yes' or 'no'(no extra output)."
    assert rules.prompt("Q", "closed") == "Q\nAnswer the question using a single word or phrase."
    assert rules.prompt("Q", "open") == "Q\nPlease answer the question concisely." and rules.prompt("问", "open", "zh") == "问\n请简要回答该问题。"
    text = rules.judge_prompt("{Q}", "A", "R")
    assert text.startswith("\nYour task is to determine whether") and text.endswith("<judge>0</judge>\n    ")
    assert "The question is: {Q}\n\nThe standard answer: A\n\nThe user's answer: R\n\n" in text and "<judge>{0/1}</judge>" in text


# ---- the protocol ----

def config(name, **changes):
    values = {"data.root": "x", "scoring": "medevalkit"} | changes
    return load_config(str(ROOT / "configs" / "eval" / f"{name}.py"), [f"{key}={value}" for key, value in values.items()])


ASKED = [VqaSample(1, "a.png", "Is it?", "Yes", "CLOSED"), VqaSample(2, "a.png", "CT or MR?", "CT", "CLOSED"),
         VqaSample(3, "b.png", "Where?", "Left lung", "OPEN"), VqaSample(4, "b.png", "在哪?", "左肺", "OPEN", language="zh")]
TEXTS = ["yes", "ct", "the lung", "左肺"]


class Verdicts:
    """A judge in memory that says that every answer is right."""

    def __init__(self):
        self.read, self.service = [], type("Service", (), {"where": "here"})

    def verdicts(self, prompts, title):
        self.read = list(prompts)
        return [toolkit.Verdict(True, first_reply="<judge>0</judge>") for _ in prompts]

    def estimate(self, prompts):
        return "nothing"

    def summary(self, verdicts):
        return {"model": "m"}


def scored(name, has_judge=False, **changes):
    kit = toolkit.MedEvalKit(config(name, **changes), ASKED, None)
    kit.judge = Verdicts() if has_judge else None
    lines = [{"question_id": sample.question_id, "text": text} for sample, text in zip(ASKED, TEXTS, strict=True)]
    return kit, kit.score(AnswerSet(kit.asked, lines), "test").metrics


def test_the_sets_divide_their_questions_differently():
    rad, slake = (toolkit.MedEvalKit(config(name), ASKED, None) for name in ("vqa_rad", "slake"))
    assert [rad.kind(sample) for sample in ASKED] == ["yes_no", "open", "open", "open"]
    assert [slake.kind(sample) for sample in ASKED] == ["closed", "closed", "open", "open"]
    assert rad.asked[0].question.endswith("(no extra output).") and rad.asked[1].question.endswith("\nPlease answer the question concisely.")
    assert slake.asked[0].question.endswith("a single word or phrase.") and slake.asked[3].question == "在哪?\n请简要回答该问题。"


@pytest.mark.parametrize("name, has_judge, changes, all_, open_, closed", [
    ("vqa_rad", False, {}, 75, 200 / 3, 100), ("vqa_rad", True, {}, 100, 100, 100),
    ("slake", False, {}, 75, 50, 100), ("slake", True, {}, 100, 100, 100), ("slake", True, {"medevalkit.slake_twice": True}, 150, 100, 200),
    ("pathvqa", True, {}, 100, 100, 100), ("pathvqa", True, {"medevalkit.pathvqa_drop": True}, 75, 100, 0)])
def test_what_counts(name, has_judge, changes, all_, open_, closed):
    kit, table = scored(name, has_judge, **changes)
    assert [table[f"{key}accuracy"] for key in ("", "open_", "closed_")] == pytest.approx([all_, open_, closed])
    assert table["n"] == table["n_open"] + table["n_closed"] == 4 and "reason" in table["published"]
    if has_judge:
        assert len(kit.judge.read) == (4 if "medevalkit.slake_twice" in changes else table["n_open"])
        assert ("answer: Left lung\n" in kit.judge.read[-2]) is (name == "slake"), "only SLAKE's gold answers keep their case"


def test_slakes_yes_with_a_capital(monkeypatch):
    monkeypatch.setattr("tests.evaluation.test_medevalkit.TEXTS", ["yes it is", "ct", "x", "x"])
    assert [scored("slake", **changes)[1]["closed_accuracy"] for changes in ({}, {"medevalkit.slake_case": True})] == [100, 50]


def test_permuted_numbers_are_a_switch():
    plain, permuted = (scored("vqa_rad", **changes)[1] for changes in ({}, {"medevalkit.permuted_f1": True}))
    assert [permuted[name] for name in ("precision", "recall", "f1")] == [plain[name] for name in ("f1", "precision", "recall")]
    assert permuted["switches"] == {"permuted_f1": True}


def test_published_numbers_stand_beside_the_whole_set_only():
    assert published.medevalkit("vqa_rad", "test", 451, True, []) == {
        "model": "LLaVA-Med v1.5, not fine-tuned", "accuracy": 53.7, "low": 50.7, "high": 56.7,
        "source": "MedEvalKit, assets/mm_eval.png (Lingshu's table)"}
    for args, why in ((("slake", "test", 2094, True, []), "no number"), (("vqa_rad", "test", 450, True, []), "450 questions"),
                      (("vqa_rad", "test", 451, False, []), "judge.model"), (("pathvqa", "test", 6719, True, ["pathvqa_drop"]), "pathvqa_drop")):
        assert why in published.medevalkit(*args)["reason"]


def test_an_evaluation_has_a_block_of_its_own(tmp_path, capsys):
    """Through the command's own path, with a judge whose replies are cut, empty, or without a tag, once or always."""
    bodies = []

    def judge(body):
        bodies.append(text := body["messages"][0]["content"])
        number = len({each.partition("Your last reply")[0] for each in bodies}) - 1
        if "Your last reply" in text:
            return "<judge>0</judge>" if "answer: yes\n" in text else "still nothing"
        return ["<judge>0</judge>", "<think>They express", "", "right", "<judge>1</judge>"][number % 5]

    with OpenAiServer(judge) as server:
        changes = {"data.root": SAMPLE, "data.held_out": "", "judge.model": "tiny", "judge.endpoint": server.url, "judge.concurrency": 1}
        own = run.open_evaluation(config("vqa_rad", **changes), tmp_path / "run")
        write_text(tmp_path / "p.jsonl", to_jsonl({"question_id": s.question_id, "prompt": s.question, "text": "Yes, normal" if i % 3 else "yes"}
                                                  for i, s in enumerate(own.samples)))
        metrics = run.score_file(own, tmp_path / "p.jsonl")
        said = capsys.readouterr()
        count = len(bodies)
        assert run.score_file(own, tmp_path / "p.jsonl")["medevalkit"] == metrics["medevalkit"] and len(bodies) == count, "nothing is paid for twice"
    table = metrics["medevalkit"]
    assert table["n"] == len(own.samples) and 0 < table["open_accuracy"] < 100 and "judged" not in metrics
    assert table["n_closed"] == sum(str(s.answer).lower() in ("yes", "no") for s in own.samples)
    lines = [json.loads(line) for line in (tmp_path / "run" / "medevalkit.jsonl").read_text().splitlines()]
    assert sum(line["counts"] for line in lines) == pytest.approx(table["accuracy"] * len(lines) / 100)
    judged = [line for line in lines if "judged" in line]
    cut = [line for line in judged if "first_judge_text" in line]
    assert len(cut) == table["n_unreadable"] == table["judge"]["n_asked_again"] > 0 and not any(line["judged"] for line in cut)
    unscored = [line["question_id"] for line in judged if line["read"] is None]
    assert table["unscored"] == unscored and len(unscored) == table["n_unscored"] and 0 < len(unscored) < len(cut)
    read = [line["read"] for line in judged if line["read"] is not None]
    assert table["open_accuracy_read"] == pytest.approx(100 * sum(read) / len(read))
    assert table["open_accuracy"] == pytest.approx(100 * sum(line["judged"] for line in judged) / len(judged))
    report = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert "As MedEvalKit 9b12e3b scores" in report and f"{len(cut)} first replies of the judge hold no verdict" in report
    summary = own.scorer.summary(metrics)
    assert "all, as MedEvalKit scores" in summary and f"{len(cut)} first replies of the judge hold no verdict" in summary
    assert "warning: unscored" in said.err and "the judge was asked again" in said.err


def test_what_the_toolkit_does_not_have_is_refused():
    with pytest.raises(UsageError, match="scoring is 'theirs'; ours, medevalkit, lmms_eval or vlmevalkit was expected"):
        run.open_evaluation(config("vqa_rad", scoring="theirs"), "x")
    cfg = config("vqa_rad")
    cfg.data.name = "parquet"
    with pytest.raises(UsageError, match="no protocol for parquet"):
        toolkit.MedEvalKit(cfg, ASKED, None)
    cfg.data.name, cfg.data.split = "mmmu_med", "test"
    with pytest.raises(UsageError, match="data.split is 'test'; another split of mmmu_med was expected with scoring=medevalkit"):
        toolkit.MedEvalKit(cfg, ASKED, None)


# ---- the toolkit itself, beside ours ----

GOLDS = ["yes", "no", "Yes", "No", "left lung", "Right upper lobe", "normal", "left lung. right lung.", "3.5 cm", "左肺", "是的", "it"]
WORDS = "yes no normal not know unknown nodule left right lung lobe upper heart effusion The A . answer 是 否 左肺".split()


def generated(rng, gold):
    """Half of the answers are near the gold answer."""
    if rng.random() < 0.5:
        form = rng.choice(["{}", "{}.", " {} ", "The answer is {}", "**Answer**: {}.", "<answer>{}</answer>", "\\boxed{{{}}}", "Answer: {}\n", "{} and more",
                           "It is {}.", "Final answer: {}", "<answer>{}", "boxed {}", "答案:{}", "<answer>{}</answer> <answer>x</answer>", "{}, not sure"])
        return form.format(rng.choice([gold, gold.lower(), gold.upper()]))
    return rng.choice(["", ".", "..."]) if rng.random() < 0.06 else " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 14)))


@pytest.fixture
def theirs(monkeypatch):
    """The toolkit's modules, without the packages of its models, and a judge that replies at random."""
    folder = os.environ.get("MEDEVALKIT")
    if not folder:
        pytest.skip("MEDEVALKIT names no checkout of MedEvalKit")
    import nltk.translate.meteor_score  # noqa: F401  (before torch is replaced)
    import tqdm.asyncio  # noqa: F401

    for name in ("torch", "datasets", "google", "google.genai"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torch"].Tensor = ModuleType  # scipy asks for it
    sys.modules["google"].genai = sys.modules["google.genai"]
    sys.modules["datasets"].load_dataset = sys.modules["datasets"].load_from_disk = None
    monkeypatch.setenv("api_key", "none")
    for name in ("", ".VQA_RAD", ".SLAKE", ".PATH_VQA"):
        module = ModuleType(f"kit{name}")
        module.__path__ = [str(Path(folder, "utils", name[1:]))]
        monkeypatch.setitem(sys.modules, f"kit{name}", module)
    base = ModuleType("kit.base_dataset")
    base.BaseDataset = object
    monkeypatch.setitem(sys.modules, "kit.base_dataset", base)
    return lambda name: importlib.import_module(f"kit.{name}")


REPLIES = ["<judge>0</judge>", "<think>a</think><judge>1</judge>", "0", "1", "", "<judge> 0 </judge>", "right", "<judge>0"]


@pytest.mark.parametrize("name, module, switches", [
    ("vqa_rad", "VQA_RAD", {"permuted_f1": True}), ("pathvqa", "PATH_VQA", {"permuted_f1": True, "pathvqa_drop": True}),
    ("slake", "SLAKE", {"permuted_f1": True, "slake_twice": True, "slake_case": True})])
@pytest.mark.parametrize("has_judge", [False, True])
def test_the_toolkits_own_scorers_agree(theirs, monkeypatch, name, module, switches, has_judge):
    """Question by question and in every sum, on answers on which the toolkit does not stop."""
    rng, own = random.Random(7), theirs(f"{module}.{module}")
    samples, texts = [], []
    while len(samples) < 2000:
        gold = rng.choice(GOLDS)
        text = generated(rng, gold)
        kind = rng.choice(["OPEN", "CLOSED"])
        if rules._rouge(rules.parsed(rules.unwrapped(text)), gold) == (0, 0, 0) and not rules.parsed(rules.unwrapped(text)).strip(" ."):
            continue  # the toolkit stops on such an answer
        samples.append(VqaSample(len(samples), f"{len(samples) // 9}.png", f"Q {gold}?", gold, kind, language="zh" if gold == "左肺" else "en"))
        texts.append(text)
    kit = toolkit.MedEvalKit(config(name, **{f"medevalkit.{key}": value for key, value in switches.items()}), samples, None)
    replies = [rng.choice(REPLIES) for _ in samples]

    class Random(Verdicts):
        def verdicts(self, prompts, title):
            self.read = list(prompts)
            return [toolkit.Verdict(rules.stated_verdict(reply), first_reply=reply) for reply in replies[:len(prompts)]]

    kit.judge = Random() if has_judge else None
    read = []
    monkeypatch.setattr(own, "judger", type("Judge", (), {"generate_outputs": lambda self, messages: read.extend(messages) or replies[:len(messages)]})())
    monkeypatch.setenv("use_llm_judge", str(has_judge))
    scorer = getattr(own, module)(None, "x", "x")
    rows = [{"response": text, "answer": s.answer, "question": s.question, "lang": s.language, "answer_type": s.answer_type}
            for s, text in zip(samples, texts, strict=True)]
    wanted, marked = scorer.cal_metrics(rows)
    found = kit.score(AnswerSet(kit.asked, [{"question_id": s.question_id, "text": text} for s, text in zip(samples, texts, strict=True)]), "test")
    if has_judge:
        assert [message["content"] for (message,) in read] == kit.judge.read
    for key, part in (("", "total metrics"), ("open_", "open"), ("closed_", "close")):
        assert found.metrics[f"{key}accuracy"] == pytest.approx(100 * wanted[part]["right"] / wanted[part]["total"])
    assert [found.metrics[key] for key in rules.OPEN_NUMBERS] == pytest.approx([100 * wanted["open"][key] for key in rules.OPEN_NUMBERS])
    for line, row in zip(found.lines, marked, strict=True):
        assert (line["judged"] if "judged" in line else line["rule"]) == row["correct"], (line, row)
