"""`eval.py --suite medical`: all sets under a folder, one model, one table; what is finished is not asked again, and what fails is named."""

import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.cli import common, eval_parts
from llavamed_jax.cli import eval as cli
from llavamed_jax.datasets import find
from llavamed_jax.datasets.find import find_sets
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import finished, questions, suite
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.vqa import VqaScorer
from llavamed_jax.utils.code import version
from llavamed_jax.utils.files import to_jsonl
from tests.support import published_sets
from tests.support.answerers import StandIn
from tests.support.openai_server import OpenAiServer

FOUR = ("vqa_rad", "slake", "pmc_vqa", "medxpertqa_mm")  # all kinds of question; one has several images


class Counting(StandIn):
    """Says "yes" or "B"; counts what it is asked, and acts before the n-th answer."""

    name = "counting"

    def __init__(self, number=0, act=None, text=None):
        self.asked, self.number, self.act, self.text = [], number, act, text

    def answers(self, questions, asked, generation, failed):
        for i in asked:
            self.asked.append(questions[i])
            if len(self.asked) == self.number:
                self.act()
            yield i, Answer(self.text or ("B" if "letter" in questions[i][0] else "yes"), "stop")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return published_sets.write(tmp_path_factory.mktemp("data"), FOUR)


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(data, *more, model=None, work=None):
        model = model or Counting()
        loaded = []
        monkeypatch.setattr(eval_parts, "local", lambda args: loaded.append(model) or model)
        words = ["--suite", "medical", f"--config.data.root={data}", "--checkpoint", "c", "--workdir", str(work or tmp_path / "w"), *more]
        return cli.main(words), model, len(loaded)
    return run


def contents(folder):
    """Path -> content, without the date in a report."""
    return {path.relative_to(folder).as_posix(): re.sub(rb"<th>date</th>.*", b"", path.read_bytes()) for path in folder.rglob("*")
            if path.is_file() and "tensorboard" not in path.parts}


def single(monkeypatch, name, root, work, *more):
    monkeypatch.setattr(eval_parts, "local", lambda args: Counting())
    return cli.main(["--config", f"configs/eval/{name}.py", f"--config.data.root={root}", "--checkpoint", "c", "--workdir", str(work), *more])


def test_a_suite_is_what_single_evaluations_write_and_one_table(data, run, tmp_path, monkeypatch, capsys):
    """The same files to the byte but for the date; SLAKE has no test split here, so its validation split is asked."""
    status, model, loaded = run(data)
    out, err = capsys.readouterr()
    work = tmp_path / "w"
    assert (status, loaded, len(model.asked)) == (0, 1, 16)
    assert f"{data / 'slake'} has no test split of slake; its validation split is asked instead" in err
    for name in FOUR:
        split = ["--config.data.split=validation"] if name == "slake" else []
        assert single(monkeypatch, name, data / name, tmp_path / name, *split) == 0
        assert contents(tmp_path / name) == contents(work / name), name
    said = json.loads((work / "suite.json").read_text())
    assert list(said["sets"]) == list(FOUR) and set(said["not_found"]) == {"pathvqa", "omnimedvqa", "mmmu_med", "medframeqa", "iu_xray"}
    for name, each in said["sets"].items():
        metrics = json.loads((work / name / "metrics.json").read_text())
        assert each["state"] == "done" and [each[key] for key in ("n_open", "n_closed", "n_choice", "n_images")] == [
            metrics[key] for key in ("n_open", "n_closed", "n_choice", "n_images")]
        for key, row in each["metrics"].items():
            family, metric = key.split(".")
            assert [row["value"], row["low"], row["high"]] == [metrics[family][metric + end] for end in ("", "_low", "_high")]
    closed = said["sets"]["vqa_rad"]["metrics"]["strict.closed_accuracy"]
    assert (closed["n"], closed["value"], closed["without_looking_title"]) == (2, 50.0, 'always "yes"')
    page = (work / "suite.html").read_text()
    assert all(f'href="{name}/report.html"' in page for name in FOUR) and "MMMU Health &amp; Medicine" in page
    lines = out.splitlines()
    row = next(line for line in lines if line.startswith("pmc_vqa test  "))
    assert row.split() == ["pmc_vqa", "test", "multiple", "choice,", "strict", "4", "25.0", "[0.0,", "75.0]", "25.0", "(chance)"]
    assert any(line.startswith("  not found: pathvqa (qas/, images/, or its parquet files); omnimedvqa") for line in lines)
    assert lines[-1] == f"report: {work / 'suite.html'}"


def test_a_stopped_suite_goes_on_and_a_finished_set_is_not_asked_again(data, run, tmp_path, capsys):
    whole, _, _ = run(data, work=tmp_path / "whole")
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
    status, model, _ = run(data, model=Counting(6, stop))
    err = capsys.readouterr().err
    assert (whole, status) == (0, 75) and f"stopped; 1 of 4 sets are finished, and 2 answers of the others are kept in {tmp_path / 'w'}" in err
    assert json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]["slake"]["state"] == "left"
    status, again, loaded = run(data)
    assert (status, loaded) == (0, 1) and len(again.asked) == 10, "two of SLAKE's and the two other sets"
    assert contents(tmp_path / "w") == contents(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").glob("*/metrics.json")}
    assert run(data)[1].asked == [] and before == {path: path.stat().st_mtime_ns for path in before}
    # Whatever the answers or the numbers depend on makes it another evaluation: a model, a setting of the scoring, a gold answer.
    (tmp_path / "w" / "pmc_vqa" / "predictions.jsonl").unlink()
    assert len(run(data)[1].asked) == 4
    assert len(run(data, "--config.seed=1")[1].asked) == 16
    other = Counting()
    other.depends_on = lambda: {"weights": "others"}
    assert len(run(data, "--config.seed=1", model=other)[1].asked) == 16


def test_what_a_finished_evaluation_depends_on(data, tmp_path, monkeypatch):
    """A single evaluation of the same kind counts as finished too; changed gold answers and training rows do not."""
    from llavamed_jax.cli.common import load_config
    from llavamed_jax.evaluation import run as evaluations

    cfg = load_config("configs/eval/vqa_rad.py", [f"data.root={data / 'vqa_rad'}"])
    opened = evaluations.open_evaluation(cfg, tmp_path / "w")

    def of(controls=(), against=None, **changes):
        scorer = VqaScorer(load_config("configs/eval/vqa_rad.py", [f"data.root={data / 'vqa_rad'}", "judge.endpoint=http://h/v1", *(
            f"{key.replace('__', '.')}={value}" for key, value in changes.items())]), tmp_path / "w", against)
        return finished.identity({"model": "m"}, scorer._cfg, controls, scorer.depends_on())

    def rewritten(path, text):
        path.write_text(text)
        return path

    plain, other, prompt = of(), tmp_path / "other", tmp_path / "prompt.txt"
    lines = [to_jsonl({"question_id": sample.question_id, "text": text} for sample in opened.samples) for text in ("a", "b")]
    judged = {"judge__model": "m", "judge__prompt": prompt}
    wording = "[[system]]\nS\n[[instruction]]\nI\n[[reminder]]\nR\n"
    Image.new("RGB", (4, 4)).save(tmp_path / "seen.png")
    seen = {"data__trained_on": rewritten(tmp_path / "seen.json", json.dumps([{"id": 1, "image": "seen.png", "conversations": [
        {"from": "human", "value": "Q\n<image>"}, {"from": "gpt", "value": "A"}]}])), "data__trained_on_images": tmp_path}
    found = [plain, of(controls=["image"]), *(of(against=rewritten(other, text)) for text in lines), of(seed=1), of(judge__model="m")]
    for text in (wording, wording.replace("S", "T"), wording.replace("R", "T")):
        rewritten(prompt, text)
        found.append(of(**judged))
    found.append(of(**seen))
    Image.new("RGB", (40, 4)).save(tmp_path / "seen.png")
    found.append(of(**seen))
    for package in ("nltk", "sacrebleu", "scipy"):
        monkeypatch.setattr(asked, "version", lambda name, changed=package: "0" if name == changed else version(name))
        found.append(of())
    monkeypatch.setattr(asked, "version", version)
    for change in ({"answer": "else"}, {"organ": "else"}, {"image": opened.samples[0].image.with_name("else.png")}):
        samples = [dataclasses.replace(opened.samples[0], **change), *opened.samples[1:]]
        found += [questions.content_hash(samples, opened.scorer.training), questions.content_hash(opened.scorer.training, samples)]
    assert len(set(found)) == len(found)
    assert of() == plain
    assert of(**judged) == of(**judged, judge__timeout=9, judge__retries=0, judge__concurrency=1, judge__cache=tmp_path / "c"), "how it is asked"
    metrics = evaluations.evaluate(opened, Counting(), {"checkpoint": "c"})
    again = Counting()
    assert evaluations.evaluate(evaluations.open_evaluation(cfg, tmp_path / "w"), again, {"checkpoint": "c"}, is_repeated=False) == json.loads(
        (tmp_path / "w" / "metrics.json").read_text()) and metrics["evaluation"] and again.asked == []


def test_every_package_that_computes_a_number_is_in_the_hash():
    root = Path(finished.__file__).parent
    files = [*(root / "scoring").glob("*.py"), *(root / "judging").glob("*.py"),
             *(root / f"{name}.py" for name in ("metrics", "vqa", "chat", "toolkit", "harness"))]
    names = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        names |= {each.name for each in node.names} if isinstance(node, ast.Import) else {node.module} if isinstance(node, ast.ImportFrom) else set()
    found = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"llavamed_jax", "ml_collections"}
    assert {{"PIL": "pillow"}.get(name, name) for name in found} == set(finished.PACKAGES)


def test_a_set_of_which_the_judge_failed_is_not_finished(run, tmp_path, capsys):
    """The next start asks only what failed: no question, and one verdict."""
    data = published_sets.write(tmp_path / "data", ("vqa_rad",))
    state, metrics = {"works": False}, tmp_path / "w" / "vqa_rad" / "metrics.json"
    with OpenAiServer(lambda body: "Right." if state["works"] or "sign 5" not in str(body) else {"choices": []}) as server:
        words = ("--config.judge.model=tiny", f"--config.judge.endpoint={server.url}", "--config.judge.retries=0")
        for asked_before in (4, 0):
            status, model, _ = run(data, *words)
            assert (status, len(model.asked)) == (1, asked_before) and "1 of 1 set failed: vqa_rad: " in capsys.readouterr().err.splitlines()[-1]
            assert "evaluation" not in json.loads(metrics.read_text())
            assert json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]["vqa_rad"]["state"] == "failed"
        state["works"], before = True, len(server.log)
        status, model, _ = run(data, *words)
        assert (status, model.asked, len(server.log) - before) == (0, [], 1)
        assert json.loads(metrics.read_text())["judged"]["n_unscored"] == 0
        assert run(data, *words[:2], "--config.judge.timeout=7")[0] == 0 and len(server.log) == before + 1


def bad(how, data):
    """Damages SLAKE; returns what its error says."""
    if how == "no JSON":
        (data / "slake" / "validate.json").write_text("[{")
        return "validate.json"
    if how == "an image is gone":
        shutil.rmtree(data / "slake" / "imgs" / "xmlab2")
        return "xmlab2"
    rows = json.loads((data / "slake" / "validate.json").read_text())
    (data / "slake" / "validate.json").write_text(json.dumps([row | {"qid": 1} for row in rows] if how == "equal ids" else []))
    return "more than one question has" if how == "equal ids" else "slake"


@pytest.mark.parametrize("how", ["no JSON", "an image is gone", "equal ids", "no questions"])
def test_a_set_that_fails_does_not_end_the_others(how, run, tmp_path, capsys):
    data = published_sets.write(tmp_path / "data", ("vqa_rad", "slake", "pmc_vqa"))
    why = bad(how, data)
    status, model, _ = run(data)
    said = json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and last.startswith("error: 1 of 3 sets failed: slake: ") and why in last
    assert [each["state"] for each in said.values()] == ["done", "failed", "done"] and why in said["slake"]["error"]
    assert len(model.asked) == 8 and not (tmp_path / "w" / "slake").exists()
    assert "failed</span>" in (tmp_path / "w" / "suite.html").read_text()
    assert run(data, "--dry_run")[0] == 1, "a plan names it too"
    shutil.rmtree(data)
    published_sets.write(data, ("vqa_rad", "slake", "pmc_vqa"))
    status, model, _ = run(data)
    assert status == 0 and len(model.asked) == 4, "only what had failed"


def test_the_page_says_so_when_every_set_fails(run, tmp_path):
    data = published_sets.write(tmp_path / "data", ("slake",))
    assert run(data)[0] == 0
    bad("no JSON", data)
    assert run(data)[0] == 1 and json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]["slake"]["state"] == "failed"
    assert "failed</span>" in (tmp_path / "w" / "suite.html").read_text()


def test_answers_that_a_model_does_not_give_fail_one_set(data, run, tmp_path, capsys):
    class Refusing(Counting):
        def answers(self, questions, asked, generation, failed):
            for i, answer in super().answers(questions, asked, generation, failed):
                if "sign 5" in questions[i][0]:
                    failed[i] = UserError("too hard")
                else:
                    yield i, answer

    status, model, _ = run(data, model=Refusing())
    assert status == 1 and "vqa_rad: 1 of 4 questions could not be answered" in capsys.readouterr().err.splitlines()[-1]
    status, model, _ = run(data)
    assert status == 0 and len(model.asked) == 1


def test_controls_where_they_are_possible_and_another_suite_beside(data, run, tmp_path, capsys):
    """MedXpertQA's copy has one image, so nothing can be exchanged: it is asked without the control, and that is said."""
    one = tmp_path / "one"
    shutil.copytree(data, one)
    lines = (one / "medxpertqa_mm" / "MM" / "test.jsonl").read_text().splitlines()
    (one / "medxpertqa_mm" / "MM" / "test.jsonl").write_text(lines[0])
    other = tmp_path / "other"
    assert run(one, work=other, model=Counting(text="no"))[0] == 0
    shutil.rmtree(other / "slake")
    status, model, _ = run(one, "--control", "image", "--against", str(other))
    out, err = capsys.readouterr()
    assert status == 0 and len(model.asked) == 3 * 12 + 1
    assert "warning: medxpertqa_mm is asked without --control image: " in err and f"slake is not compared: {other / 'slake'}" in err
    sets = json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]
    closed = sets["vqa_rad"]["metrics"]["strict.closed_accuracy"]
    assert [closed[key] for key in ("value", "exchanged", "noise", "other", "difference")] == [50, 50, 50, 50, 0]
    assert "noise" not in sets["medxpertqa_mm"]["metrics"]["strict.choice_accuracy"] and "other" not in sets["slake"]["metrics"]["strict.open_f1"]
    page = (tmp_path / "w" / "suite.html").read_text()
    assert "<th>Exchanged</th>" in page and "<th>Other model</th>" in page
    assert "exchanged  noise  other       p" in out


def test_predictions_that_do_not_fit_cost_the_comparison_and_not_the_set(data, run, tmp_path, capsys):
    other = tmp_path / "other"
    assert run(data, work=other, model=Counting(text="no"))[0] == 0
    lines = (other / "slake" / "predictions.jsonl").read_text().splitlines()
    (other / "slake" / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n")
    capsys.readouterr()
    status, model, _ = run(data, "--against", str(other))
    assert status == 0 and len(model.asked) == 16
    assert f"warning: slake is asked without the comparison with {other / 'slake' / 'predictions.jsonl'}: " in capsys.readouterr().err
    sets = json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]
    assert "without a prediction" in sets["slake"]["not_compared"] and sets["vqa_rad"]["not_compared"] is None
    assert "other" not in sets["slake"]["metrics"]["strict.open_f1"] and "other" in sets["vqa_rad"]["metrics"]["strict.open_f1"]
    assert "not compared: " in (tmp_path / "w" / "suite.html").read_text()


def test_a_suite_says_what_was_lost_unread_and_not_judged(data, run, tmp_path):
    """What a reader of the numbers has to know stands in the row of the set and on the page."""
    class Cut(Counting):
        def answers(self, *args):
            for i, answer in super().answers(*args):
                yield i, dataclasses.replace(answer, tokens_cut=7, has_question=False)

    with OpenAiServer(lambda request: "**Right**" if "Gold" in str(request) else "?") as server:
        assert run(data, f"--config.judge.endpoint={server.url}", "--config.judge.model=tiny", model=Cut(text="I cannot tell."))[0] == 0
    sets = json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]
    for name, each in sets.items():
        metrics = json.loads((tmp_path / "w" / name / "metrics.json").read_text())
        n = sum(metrics[key] for key in ("n_open", "n_closed", "n_choice"))
        assert each["n_prompts_cut"] == each["n_without_question"] == n and each["n_closed_unread"] == metrics.get("n_closed_unread")
        assert (each["judge"], each["n_unscored"]) == (("tiny", 0) if "judged" in metrics else (None, None))
    assert sets["vqa_rad"]["judge"] == "tiny" and sets["vqa_rad"]["n_closed_unread"] == 2
    page = (tmp_path / "w" / "suite.html").read_text()
    assert "the model saw no word of" in page and "open answers judged by tiny, 0 without a verdict" in page and "could not be read" in page


def test_an_endpoint_is_asked_every_set_and_a_dead_one_ends_the_suite(data, tmp_path, capsys):
    words = ["--suite", "medical", f"--config.data.root={data}", "--workdir", str(tmp_path / "w"), "--model", "tiny"]
    with OpenAiServer(lambda request: "yes") as server:
        assert cli.main([*words, "--endpoint", server.url]) == 0 and len(server.log) == 16
        assert cli.main([*words, "--endpoint", server.url]) == 0 and len(server.log) == 16
        assert cli.main([*words, "--endpoint", server.url, "--config.generation.num_beams=2"]) == 2
        gone = server.url
    capsys.readouterr()
    assert cli.main([*words, "--endpoint", gone, "--workdir", str(tmp_path / "w"), "--config.seed=1", "--timeout", "1"]) == 1
    assert "of 4 sets failed" not in capsys.readouterr().err
    sets = json.loads((tmp_path / "w" / "suite.json").read_text())["sets"]
    assert "done" not in {each["state"] for each in sets.values()}, "the page of the other seed does not stay"


@pytest.mark.parametrize("words, status, sentence", [
    (["--config.data.root="], 2, "data.root is empty; the folder with the data sets was expected"),
    ([], 2, "data.root is empty"),
    (["--config.data.root=nowhere"], 1, "nowhere does not exist; a folder with data sets was expected"),
    (["--config.data.root=README.md"], 1, "README.md is a file; a folder with data sets was expected"),
    (["--config.data.root=docs/launch"], 1, "data.root holds no data set of the suite (1 folder searched); one of these was expected: VQA-RAD (VQA_RAD"),
    (["DATA", "--config.data.images=x"], 2, "'data.images' is for one data set; --config FILE was expected with it, not --suite"),
    (["DATA", "--config.data.name=slake"], 2, "'data.name' is for one data set"),
    (["DATA", "--config.generation.max_new=3"], 2, "'generation.max_new' does not exist; did you mean generation.max_new_tokens"),
    (["DATA", "--config.generation.max_new_tokens=0"], 2, "generation.max_new_tokens is 0; at least 1 was expected"),
    (["DATA", "--config.data.split=dev"], 2, "data.split is 'dev'; none of the data sets found has such a split"),
    (["DATA", "--preflight", "h100-8"], 2, "--preflight is for one set; --config FILE was expected with it, not --suite"),
    (["DATA", "--config", "configs/eval/slake.py"], 2, "not allowed with argument"),
    (["DATA", "--against", "README.md"], 2, "--against is 'README.md'; the workdir of another suite was expected"),
])
def test_mistakes(words, status, sentence, data, tmp_path, capsys):
    words = [f"--config.data.root={data}" if word == "DATA" else word for word in words]
    assert cli.main(["--suite", "medical", "--checkpoint", "c", "--workdir", str(tmp_path / "w"), *words]) == status
    assert sentence in capsys.readouterr().err and not (tmp_path / "w").exists()
    for source in ("--predictions", "--write_llava"):
        assert cli.main(["--suite", "medical", f"--config.data.root={data}", source, "f"]) == 2
        assert f"{source} is for one set" in capsys.readouterr().err


@pytest.mark.parametrize("keys, sentence", [
    (["data.language=zh", "generation.max_new=3"], "'generation.max_new' does not exist; did you mean generation.max_new_tokens"),
    (["medevalkit.slake_case=true", "data.langage=zh"], "'data.langage' does not exist; did you mean data.language"),
    (["judge=x"], "the config key 'judge' is a group; one of judge."),
    (["data.question=Q"], "'data.question' does not exist; did you mean"),
    (["data.language=zh", "seed=x"], "the config key 'seed' is 'x'; an integer was expected"),
])
def test_each_key_belongs_to_a_set_that_is_asked(keys, sentence, data, run, tmp_path, capsys):
    assert run(data, "--dry_run", *(f"--config.{key}" for key in keys))[0] == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last and not (tmp_path / "w").exists()
    assert ("the data sets that are asked are vqa_rad, slake, pmc_vqa, medxpertqa_mm" in last) is ("does not exist" in last or "is a group" in last)


def test_another_programs_scores_are_in_the_table_of_the_sets_that_it_has_a_rule_for(data, run, tmp_path, capsys):
    status, model, _ = run(data, "--config.scoring=vlmevalkit", "--config.generation.batch_size=2", "--config.medevalkit.slake_case=true")
    out, err = capsys.readouterr()
    assert status == 0 and len(model.asked) == 8
    assert err.count("is not asked, because scoring=vlmevalkit has no rule for it; there is one for vqa_rad and slake and pathvqa") == 2
    assert "'medevalkit.slake_case' is True but has no effect: scoring is not medevalkit (slake)" in err
    whole = json.loads((tmp_path / "w" / "suite.json").read_text())
    said = whole["sets"]
    assert list(said) == ["vqa_rad", "slake"] and list(whole["not_asked"]) == ["pmc_vqa", "medxpertqa_mm"]
    page = (tmp_path / "w" / "suite.html").read_text()
    for name, each in said.items():
        block = json.loads((tmp_path / "w" / name / "metrics.json").read_text())["vlmevalkit"]
        rows = {key: row for key, row in each["metrics"].items() if key.startswith("vlmevalkit.")}
        assert list(rows) == [f"vlmevalkit.{key}" for key in ("accuracy", "closed_accuracy", "open_accuracy") if key in block] and len(rows) > 1
        for key, row in rows.items():
            assert row["value"] == block[key.partition(".")[2]] and row["title"] in out and f"{row['title'][0].upper()}{row['title'][1:]}" in page
        assert "PMC-VQA" in page and page.count("is not asked, because scoring=vlmevalkit has no rule for it") == 2
        assert rows["vlmevalkit.accuracy"]["n"] == 4 and rows["vlmevalkit.accuracy"]["title"] == "all, as VLMEvalKit scores"
    assert run(published_sets.write(tmp_path / "one", ("pmc_vqa",)), "--config.scoring=lmms_eval")[0] == 2
    assert "error: scoring is 'lmms_eval'; none of the data sets found has such a rule" in capsys.readouterr().err
    # Also of a set whose recipe has no key `scoring`.
    assert run(published_sets.write(tmp_path / "reports", ("iu_xray",)), "--config.scoring=vlmevalkit")[0] == 2
    assert "error: scoring is 'vlmevalkit'; none of the data sets found has such a rule" in capsys.readouterr().err


def test_keys_that_only_some_sets_have_are_said(data, run, tmp_path, capsys, monkeypatch):
    loaded, load = [], common.load_config
    monkeypatch.setattr(common, "load_config", lambda *spec: loaded.append(spec) or load(*spec))
    assert run(data, "--dry_run")[0] == 0 and len(loaded) == 4, "each recipe once"
    assert run(data, "--dry_run", "--config.data.language=zh", "--config.data.split=test")[0] == 1
    err = capsys.readouterr().err
    assert "the config key 'data.language' is used only for slake; the other sets have no such key" in err
    assert "error: 1 of 4 sets failed: slake: the data file" in err and not (tmp_path / "w").exists()
    assert run(data, "--dry_run", "--config.data.split=validation")[0] == 1
    assert "vqa_rad has no split 'validation' and is not asked; it has train and test" in capsys.readouterr().err


def test_what_is_found_in_a_folder(tmp_path):
    hub = tmp_path / "hub" / "datasets--x--y" / "snapshots" / "abc"
    published_sets.write(tmp_path / "a", ("slake",))
    published_sets.write(hub, ("omnimedvqa",))
    published_sets.write(tmp_path, ("slake", "vqa_rad"))
    (tmp_path / "hub" / "datasets--x--y" / "snapshots" / "abc" / "omnimedvqa").rename(hub.parent / "def")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "test.json").write_text(json.dumps([{"id": 1, "image": "a.png", "question": "Q", "options": ["a", "b"], "answer": "a"}]))
    for i in range(201):
        (tmp_path / "many" / "files" / str(i)).mkdir(parents=True)
    published_sets.write(tmp_path / ".hidden", ("pmc_vqa",))
    found = find_sets(tmp_path, suite.SUITES["medical"])
    assert found.folders == {"vqa_rad": tmp_path / "vqa_rad", "slake": tmp_path / "slake", "omnimedvqa": hub.parent / "def"}
    assert found.repeated == [("slake", tmp_path / "a" / "slake")] and found.others == [("choices", tmp_path / "own")]
    assert len(found.unread) == 1 and f"the 201 subfolders of {tmp_path / 'many' / 'files'} were not searched" in found.unread[0]
    assert find_sets(tmp_path / "slake", ["slake"]).folders == {"slake": tmp_path / "slake"}


def test_the_limit_of_a_search_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "_MOST_FOLDERS", 3)
    for name in "abcd":
        (tmp_path / name / "x" / "y").mkdir(parents=True)
    found = find_sets(tmp_path, ["slake"])
    assert found.num_folders == 3 and found.unread == [
        f"{tmp_path / 'c'} and all folders after it were not searched, because 3 folders were looked at before it"]


def test_all_layouts_are_found_and_asked(run, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow, the extra [parquet], is not installed")
    data = published_sets.write(tmp_path / "data", n=2)
    status, model, loaded = run(data)
    said = json.loads((tmp_path / "w" / "suite.json").read_text())
    assert (status, loaded) == (0, 1) and list(said["sets"]) == list(suite.SUITES["medical"]) and not said["not_found"]
    assert {name: sum(each[f"n_{kind}"] for kind in ("open", "closed", "choice", "caption")) for name, each in said["sets"].items()} == {
        "vqa_rad": 2, "slake": 2, "pathvqa": 2, "pmc_vqa": 2, "omnimedvqa": 2, "medxpertqa_mm": 2, "mmmu_med": 10, "medframeqa": 2, "iu_xray": 2}
