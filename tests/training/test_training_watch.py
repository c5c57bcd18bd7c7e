"""What a run shows and what stops it: how far the host runs ahead, what it reads and when, answers, traces, updates that are no numbers."""

import ast
import json
from types import SimpleNamespace

import jax
import pytest

import llavamed_jax as lm
from llavamed_jax.config import preset
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import during_training
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training import metrics_reader, trainer, validation
from llavamed_jax.training.callbacks import Callbacks, Snapshot
from llavamed_jax.training.metrics_reader import MetricsReader, Update, read
from llavamed_jax.training.program import Program
from llavamed_jax.training.progress import Progress
from llavamed_jax.training.start import open_start
from llavamed_jax.training.step_agreement import StepAgreement
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs
from tests.support.training_runs import ROOT, SAMPLE, FakeStep, SlowStep

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def stepping(monkeypatch):
    """`stepping(step)`: runs take this step in place of the compiled one."""
    def use(step):
        monkeypatch.setattr(trainer, "make_train_step", step)
        return step
    return use


# ---- memory

class Exhausted(FakeStep):
    def update(self, state, batch):
        raise self.error


@pytest.mark.parametrize("error, sentence", [
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nA table"),
     r"^a device is out of memory: Out of memory allocating 7 bytes.; parameters and optimizer need 0.00 GB. .*"
     r"remat to 'full' \(now 'none'\), increase micro_batches \(now 1\).*; no step had been saved$"),
    (MemoryError("Unable to allocate 7 bytes"), "^this machine is out of memory: Unable to allocate 7 bytes; fewer data.workers")])
def test_too_little_memory_is_one_sentence(recipe, stepping, tmp_path, error, sentence):
    stepping(Exhausted()).error = error
    with pytest.raises(UserError, match=sentence):
        fit(recipe(), tmp_path / "run")


def test_other_errors_of_the_runtime_stay_what_they_are(recipe, stepping, tmp_path):
    stepping(Exhausted()).error = jax.errors.JaxRuntimeError("INTERNAL: no")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(recipe(), tmp_path / "run")


def test_the_bytes_of_a_state_are_those_of_its_arrays(recipe):
    cfg = recipe(**{"trainable": ["projector/.*"]})
    checkpoint = open_start(cfg)
    for mesh in (make_mesh(None, jax.devices()[:1]), make_mesh("fsdp=2", jax.devices()[:2])):
        program = Program.build(cfg, checkpoint, mesh, 8)
        state = program.initial_state(checkpoint)
        held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.trainable, state.frozen, state.opt_state))]
        assert program.state_bytes() == sum(held)


# ---- two updates in flight, read in one place

def test_the_host_runs_ahead_by_one_update_and_reads_two_late(recipe, stepping, tmp_path):
    step = stepping(SlowStep(6))
    assert fit(recipe(total_steps=6, **{"checkpoint.every_steps": 0}), tmp_path / "run")
    wanted = ["dispatch 1", "dispatch 2"]
    for k in range(3, 7):
        wanted += [f"read {k - 2}", f"dispatch {k}"]
    assert step.events == [*wanted, "read 5", "read 6"]
    assert [line["step"] for line in runs.log_lines(tmp_path / "run")] == list(range(1, 7))


@pytest.mark.parametrize("log_every", [1, 3])
def test_throughput_and_mfu_are_of_the_time_between_updates(monkeypatch, tmp_path, log_every):
    """By a clock of ours. Updates that are found done together share their time, a pause is nobody's."""
    now, lines = 0.0, []
    monkeypatch.setattr(metrics_reader.time, "monotonic", lambda: now)
    monkeypatch.setattr(metrics_reader.throughput, "peak_flops", lambda kind: 1e9)
    monkeypatch.setattr(metrics_reader.throughput, "training_flops", lambda cfg, trained, tokens, attended, images: 1e6 * tokens)
    log = SimpleNamespace(advance=lambda *_: None, skipped=lambda *_: None, write=lambda step, line: lines.append(line | {"step": step}))
    reader = MetricsReader(Progress(), log, tmp_path, config=None, trained={}, num_devices=2, log_every=log_every, total_steps=99,
                             nan_limit=9, name_samples=None, agreed=StepAgreement(bool, 0, [0]))
    counts = dict(samples=1, tokens=100, positions=200, attended=1, images=0, image_slots=0)

    def dispatch(step, at):
        metrics = FakeStep().metrics(False)
        reader.add(Update(step, metrics, counts, {}, {}, at))

    dispatch(1, 0.0)
    now = 50.0  # it was compiled
    reader.drain()
    dispatch(2, 50.0), dispatch(3, 50.0)
    now = 54.0
    reader.drain()  # two updates of two seconds each
    dispatch(4, 54.0), dispatch(5, 55.0)
    now = 58.0
    reader.drain()
    now = 100.0  # a save
    reader.restart_clock()
    dispatch(6, 104.0)
    now = 104.0
    reader.drain()
    rates = {line["step"]: (line["tokens_per_second"], line["mfu"]) for line in lines}
    of = lambda tokens, seconds: (pytest.approx(tokens / seconds), pytest.approx(1e6 * tokens / seconds / 2e9))
    if log_every == 1:
        assert rates == {1: of(100, 50), 2: of(100, 2), 3: of(100, 2), 4: of(100, 2), 5: of(100, 2), 6: of(100, 4)}
    else:
        assert rates == {3: of(200, 4), 6: of(100, 4)}
    assert lines[0]["padding_fraction"] == 0.5


def waits(tree) -> set[tuple[str, str]]:
    """(function, what) for each thing in a file that would wait for a device. Annotations and isinstance call nothing."""
    harmless = {id(inner) for node in ast.walk(tree) for part in ("annotation", "returns") if getattr(node, part, None) is not None
                for inner in ast.walk(getattr(node, part))}
    harmless |= {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
                 for inner in ast.walk(node)}
    found = set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id == "float" and id(node) not in harmless:
                found.add((function.name, "float"))
            if isinstance(node, ast.Attribute):
                of_numpy = node.attr in ("asarray", "array") and getattr(node.value, "id", "") == "np"
                if of_numpy or node.attr in ("item", "tolist", "device_get", "block_until_ready", "__array__"):
                    found.add((function.name, node.attr))
    return found


def test_values_of_the_device_are_read_in_one_place():
    """In the files of the loop, nothing but `metrics_reader.read` waits for a device."""
    found = {}
    for name in ("trainer", "metrics_reader", "validation", "profiler", "saver", "progress", "step", "losses", "log", "throughput"):
        found[name] = waits(ast.parse((ROOT / "llavamed_jax" / "training" / f"{name}.py").read_text()))
    assert found.pop("metrics_reader") == {("read", "float"), ("read", "device_get")}
    assert not any(found.values()), found
    careless = "def f(x: float):\n    isinstance(x, float)\n    return float(x), x.item(), np.asarray(x), x.block_until_ready()"
    assert waits(ast.parse(careless)) == {("f", what) for what in ("float", "item", "asarray", "block_until_ready")}


def test_what_moves_unasked_in_the_loop_is_refused(recipe, stepping, tmp_path):
    class Careless(FakeStep):
        def update(self, state, batch):
            runs.implicit_transfer()
            return super().update(state, batch)

    runs.implicit_transfer()  # elsewhere it may
    stepping(Careless())
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit(recipe(total_steps=1), tmp_path / "run")


def test_read_gives_floats():
    assert read({"a": jax.numpy.float32(1.5), "b": (jax.numpy.bfloat16(2),)}) == {"a": 1.5, "b": (2.0,)}


# ---- validation

def test_validation_weighs_every_batch_by_its_tokens_and_the_lowest_loss_is_the_best():
    mesh, progress = make_mesh("data=1", jax.devices()[:1]), Progress()

    def judged(step, *parts):
        """Of batches with these sums of losses and numbers of tokens."""
        left = iter(parts)
        data = SimpleNamespace(validation="some", validation_batches=lambda *_: ({} for _ in parts))
        snapshot = Snapshot(step, {}, SimpleNamespace(mesh=mesh), data)
        return validation.judge(snapshot, None, lambda state, batch: tuple(map(jax.numpy.float32, next(left))),
                                [lambda s: {"x": 5.0}], progress, lambda: False)

    assert judged(3, (6, 2), (1, 1), (0, 0), (20, 5), (3, 4)) == ({"validation_loss": 30 / 12, "x": 5.0}, True)
    assert judged(6, (1, 1))[0]["validation_loss"] == 1 and progress.best == {"step": 6, "validation_loss": 1}
    judged(9, (3, 2)), judged(12, (float("nan"), 1))
    assert progress.best["step"] == 6


# ---- updates that are not finite

def test_updates_that_are_not_finite_again_and_again_stop_the_run(recipe, stepping, tmp_path):
    """Two skipped, one good, then three in a row; the file names the samples of just these three."""
    step = stepping(FakeStep(lambda k: k in (1, 2, 4, 5, 6)))
    cfg = recipe(total_steps=20, nan_limit=3, **{"checkpoint.every_steps": 0})
    with pytest.raises(UserError, match=r"3 updates in a row, up to step 6, .*nan_limit is 3.*not_finite.json; no step had been saved"):
        fit(cfg, tmp_path / "run")
    listed = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert [entry["step"] for entry in listed] == [4, 5, 6]
    questions = {r["id"]: r["conversations"][0]["value"].removeprefix("<image>\n") for r in json.loads(open(cfg.data.train).read())}
    processor = Processor.load(SAMPLE / "tokenizer.model")
    for entry in listed:
        rows = step.batches[entry["step"] - 1]["input_ids"].tolist()
        assert len(entry["ids"]) == len(rows) == 4
        for row, name in zip(rows, entry["ids"]):
            assert questions[name] in processor.decode([token for token in row if token > 0])
    last = runs.log_lines(tmp_path / "run")[-1]
    assert last["updates_skipped"] == 5


def test_the_streak_goes_on_where_the_run_goes_on(recipe, stepping, tmp_path):
    """Two bad updates before a save and one after it are three in a row."""
    stepping(FakeStep(lambda k: k >= 2))
    with pytest.raises(UserError, match="up to step 4"):
        fit(recipe(total_steps=20, nan_limit=3), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "6").exists()
    stepping(FakeStep(lambda k: True))
    with pytest.raises(UserError, match="up to step 4, .*; step 3 is saved"):
        fit(recipe(total_steps=20, nan_limit=3), tmp_path / "run")


def test_a_run_of_which_half_was_skipped_is_not_finished(recipe, stepping, tmp_path):
    stepping(FakeStep(lambda k: k > 2))
    with pytest.raises(UserError, match="2 of 4 updates were skipped"):
        fit(recipe(total_steps=4, **{"checkpoint.every_steps": 0}), tmp_path / "run")
    assert Progress().skipped_in_a_row == 0


# ---- traces

def test_a_trace_of_a_few_updates_lies_in_the_workdir(recipe, stepping, tmp_path, capsys):
    stepping(FakeStep())
    assert fit(recipe(total_steps=4), tmp_path / "run", Callbacks(profile=(2, 3)))
    assert list((tmp_path / "run" / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb"))
    assert "the trace of updates 2 to 3 is in" in capsys.readouterr().out


def test_a_trace_holds_its_updates_and_no_other(recipe, stepping, tmp_path, monkeypatch):
    class Noted(FakeStep):
        def update(self, state, batch):
            events.append(self.step + 1)
            return super().update(state, batch)

    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    stepping(Noted())
    assert fit(recipe(total_steps=4), tmp_path / "run", Callbacks(profile=(2, 3)))
    assert events == [1, "start", 2, 3, "stop", 4]


def test_a_trace_that_begins_too_late_is_said(recipe, stepping, tmp_path, capsys):
    stepping(FakeStep())
    assert fit(recipe(total_steps=2), tmp_path / "run", Callbacks(profile=(5, 9)))
    assert "updates 5 to 9 did not run" in capsys.readouterr().out


# ---- answers

def test_samples_and_closed_accuracy_are_the_saved_models(recipe, stepping, tmp_path, monkeypatch, capsys):
    """What is shown is what the workdir's model answers; closed questions alone count. Two of them have an image and are shown, too: one
    set of programs serves both."""
    stepping(FakeStep())
    monkeypatch.setattr(trainer, "make_eval_step", lambda *_: lambda state, batch: (jax.numpy.float32(2), jax.numpy.float32(1)))
    monkeypatch.setattr(during_training, "MAX_NEW_TOKENS", {"sample": 6, "closed": 4})
    model, seen = during_training.TrainedModel(), []
    sampler = during_training.Samples(model)
    cfg = recipe(total_steps=3, samples_every=2, **{"checkpoint.every_steps": 0})
    records = sorted(json.loads((SAMPLE / "vqa_train.json").read_text()), key=lambda record: record["answer_type"])
    records = [*records[:2], {key: x for key, x in records[-1].items() if key != "image"}]
    records[2]["conversations"][0]["value"] = "What is a hilum?"
    assert [record["answer_type"] for record in records] == ["CLOSED", "CLOSED", "OPEN"]
    (tmp_path / "validation.json").write_text(json.dumps(records))
    with cfg.ignore_type():
        cfg.data.validation = str(tmp_path / "validation.json")
    compiled = []

    def note(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    def show(snapshot):
        before = len(compiled)
        seen.append((snapshot.step, sampler(snapshot)))
        assert len(seen) == 1 or len(compiled) == before, "the programs of step 2 serve step 3"
        return seen[-1][1]

    watch = Callbacks([during_training.ClosedAccuracy(model)], show)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        assert fit(cfg, tmp_path / "run", watch) and compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    said = capsys.readouterr().out
    assert [step for step, _ in seen] == [2, 3]
    line = next(line for line in runs.log_lines(tmp_path / "run") if "validation_loss" in line)
    assert line["step"] == 3 and line["validation_closed"] == 2 and 0 <= line["validation_closed_accuracy"] <= 1
    samples, conversations = seen[-1][1], []
    for sample, record in zip(samples, records[:2], strict=True):
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        assert (sample.question, sample.wanted) == (question, record["conversations"][1]["value"]) and sample.name in said
        content = [{"type": "image", "image": str(runs.images() / record["image"])}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    wanted = lm.load(tmp_path / "run").generate(conversations, max_new_tokens=during_training.MAX_NEW_TOKENS["sample"])
    assert [sample.answer for sample in samples] == [answer.text for answer in wanted] and samples


@pytest.mark.parametrize("record, is_closed", [
    (dict(answer_type="CLOSED ", wanted="axial"), True), (dict(answer_type="OPEN", wanted="yes"), False),
    (dict(wanted="Yes."), True), (dict(wanted="the left lung"), False),
])
def test_which_questions_are_closed(record, is_closed):
    turns = [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": record.pop("wanted")}]
    assert during_training.first_turn({"id": 1, "image": ["x"], "conversations": turns, **record}).is_closed is is_closed
    assert during_training.first_turn({"id": 1, "image": ["x"], "conversations": turns[:1]}) is None


def test_a_caption_is_asked_for_as_it_was_trained():
    """With a template without roles the prompt is what stands before the first supervised token."""
    config = preset("small")
    processor = Processor(config, Tokenizer.load(SAMPLE / "tokenizer.model"), template="v1.5:plain")
    model = during_training.TrainedModel()
    model._captioner = processor
    fake = SimpleNamespace(processor=Processor(config, processor.tokenizer), engine=SimpleNamespace(max_prompt=500))
    image = str(next((SAMPLE / "images").iterdir()))
    ids, _ = model._row(fake, during_training.Question("1", [image], "Describe it.", "A chest.", False))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A chest."}]
    example, labels = processor.expand(*processor.training_example(turns))
    assert ids == example[:next(i for i, label in enumerate(labels) if label >= 0)]
    fake.engine.max_prompt = 10
    assert model._row(fake, during_training.Question("2", [image], "", "", False)) is None
