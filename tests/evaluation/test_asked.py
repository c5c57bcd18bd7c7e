"""What the answers of an evaluation follow from: one input is changed at a time between a stop and a new start, and no answer of before
may be taken over; where nothing is changed, all are."""

import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from llavamed_jax.assistant import LlavaMed, _numpy_dtype
from llavamed_jax.checkpoints.identity import origin
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli import convert
from llavamed_jax.cli import eval as cli
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.processor import Processor
from llavamed_jax.utils import hashes
from tests.support import tiny
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "samples" / "vqa_rad" / "tokenizer.model"
CONFIG = {**tiny.MISTRAL, "model_type": "llava_mistral", "vocab_size": 1024, "mm_vision_tower": "openai/tiny-tower",
          "mm_hidden_size": 32,
          "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad",
          "tokenizer_model_max_length": 2048}
PREPROCESSOR = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28},
                "crop_size": {"height": 28, "width": 28},
                "do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3,
                "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
FILES = {
    "preprocessor_config.json": PREPROCESSOR, "generation_config.json": {"eos_token_id": 2},
    "tokenizer_config.json": {"model_max_length": 2048, "legacy": True},
    "special_tokens_map.json": {"bos_token": "<s>"},
    "added_tokens.json": {}, "chat_template.json": {"chat_template": "{{ messages }}"},
}  # fmt: skip


class Model:
    """A stand-in that computes nothing: what it answers follows from the weights, the ids and the pixels that a model would be given."""

    def __init__(self, args, stops_after=None):
        checkpoint = open_checkpoint(args.checkpoint, args.vision_tower)
        self.processor = Processor.from_checkpoint(checkpoint, tokenizer=args.tokenizer, template=args.template)
        self.quantize = self.kv_cache = None
        self.origin, self.tower, self.name = origin(args.checkpoint, checkpoint, args.tokenizer), checkpoint.tower, "m"
        self.mesh = None if args.mesh is None else make_mesh(args.mesh, jax.local_devices())
        self.dtype, self.engine, self.stops_after = _numpy_dtype(args.dtype), type("Engine", (),
                                                                                   {"max_prompt": 10**6,
                                                                                    "eos": (2,)})(), stops_after
        weights = sum(float(np.abs(checkpoint.read(name).astype(np.float64)).sum()) for name in sorted(checkpoint.tensors))
        self.seen = hashes.short_hash(weights, checkpoint.config.to_dict(), str(self.dtype), args.mesh)

    describe = LlavaMed.describe

    def answer_each(self, prompts, **settings):
        for index, (ids, (image,), nth) in enumerate(prompts):
            pixels = self.processor.images([image])[0] if not isinstance(image, np.ndarray) else image
            yield index, Answer(hashes.short_hash(self.seen, list(ids), pixels.tobytes().hex(), settings, nth), "stop")
            if index + 1 == self.stops_after:
                signal.raise_signal(signal.SIGTERM)

    def generate_tokens(self, rows, images, **settings):
        return [[3 + int(hashes.short_hash(self.seen, row, settings), 16) % 900, 2] for row in rows]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of two shards with every file that travels with one, as a tree too; a tower, a tokenizer, four images."""
    root = tmp_path_factory.mktemp("made")
    tiny.save_clip(root / "tiny-tower")
    tiny.save_clip(root / "other-tower", seed=9)
    write_json(root / "other-tower" / "preprocessor_config.json", PREPROCESSOR)
    shapes = tiny.decoder_shapes(CONFIG) | tiny.projector_shapes("mlp2x_gelu")
    shapes |= tiny.clip_shapes(prefix="model.vision_tower.vision_tower.vision_model.")
    tensors = list(tiny.drawn(shapes).items())
    directory, shards = root / "model", {}
    directory.mkdir()
    for number, part in enumerate((tensors[:20], tensors[20:]), 1):
        save_file(dict(part), directory / f"model-{number:05}-of-00002.safetensors", {"format": "pt"})
        shards |= {name: f"model-{number:05}-of-00002.safetensors" for name, _ in part}
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})
    for name, value in {"config.json": CONFIG, **FILES}.items():
        write_json(directory / name, value)
    for folder in (directory, root / "tokenizer"):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
        write_json(folder / "tokenizer_config.json", FILES["tokenizer_config.json"])
    assert convert.main(["import", "--checkpoint", str(directory), "--out", str(root / "tree")]) == 0
    rows = []
    for n in range(4):
        Image.new("RGB", (28, 28), (40 * n, 99, 7)).save(root / f"{n}.png")
        rows += [{"id": 10 * n + i, "image": f"{n}.png", "answer_type": "OPEN", "conversations": [
            {"from": "human", "value": f"What is {i} of {n}?\n<image>"},
            {"from": "gpt", "value": "x"}]} for i in range(3)]
    write_json(root / "set" / "test.json", rows)
    for n in range(4):
        (root / f"{n}.png").rename(root / "set" / f"{n}.png")
    return root


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "r")
    monkeypatch.chdir(tmp_path / "r")
    return tmp_path / "r"


@pytest.fixture(scope="module")
def stopped_once(made, tmp_path_factory):
    """Flags -> the folder `made` with an evaluation in `w` that a signal stopped, which is made once."""
    @functools.cache
    def make(*flags):
        folder = shutil.copytree(made, tmp_path_factory.mktemp("stopped") / "r")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert start(patch, "w", *flags, stops_after=5) == 75
        return folder
    return make


@pytest.fixture
def stopped(stopped_once, tmp_path, monkeypatch):
    """Flags -> a copy of it, in which the test goes on."""
    def enter(*flags):
        monkeypatch.chdir(shutil.copytree(stopped_once(*flags), tmp_path / "r"))
        return tmp_path / "r"
    return enter


def start(monkeypatch, workdir, *more, stops_after=None):
    """`eval.py` with the stand-in; its exit status."""
    monkeypatch.setattr(cli.common, "load_assistant", lambda args: Model(args, stops_after))
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), "--config.data.root=set", "--workdir", workdir]
    return cli.main(instead([*argv, "--checkpoint", "model"], more))


def num_kept(workdir):
    return len((Path(workdir) / "predictions.jsonl.partial").read_text().splitlines()) - 1


def texts(workdir):
    return [(line["question_id"], line["prompt"], line["text"]) for line in map(json.loads,
                                                                                open(Path(workdir) / "predictions.jsonl"))]


def edit(file, **changes):
    """Changes keys of a JSON file."""
    value = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps({**value, **changes}))


def edit_tensor(file, place=0):
    tensors = load_file(file)
    name = sorted(tensors)[place]
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def edit_question(n, **changes):
    rows = json.loads(Path("set/test.json").read_text())
    rows[n] |= changes
    Path("set/test.json").write_text(json.dumps(rows))


def reverse_questions():
    Path("set/test.json").write_text(json.dumps(json.loads(Path("set/test.json").read_text())[::-1]))


def edit_base(tree):
    """Another model imported into the same directory."""
    edit_tensor("model/model-00002-of-00002.safetensors")
    shutil.rmtree(tree)
    assert convert.main(["import", "--checkpoint", "model", "--out", tree]) == 0


def paint(n, pixel=(1, 1, 1)):
    picture = Image.open(f"set/{n}.png").convert("RGB")
    picture.putpixel((3, 3), pixel)
    picture.save(f"set/{n}.png")


def exchange(a, b):
    Path(a).rename("aside")
    Path(b).rename(a)
    Path("aside").rename(b)


TREE = ["--checkpoint", "tree"]
TOWER = ["--vision_tower", "other-tower"]
OWN_TOKENIZER = ["--tokenizer", "tokenizer"]
OWN_TOKENIZER_FILE = ["--tokenizer", "tokenizer/tokenizer.model"]
# What is changed -> (flags of both starts, the change, more flags of the second, what the sentence names).
CHANGES = {
    "config.json": ([], lambda: edit("model/config.json", rms_norm_eps=2e-5), [], "the file config.json"),
    "a key of the config that nothing reads": ([], lambda: edit("model/config.json", note="x"), [],
                                               "the file config.json"),
    "the first shard": ([], lambda: edit_tensor("model/model-00001-of-00002.safetensors"), [],
                        "the file model-00001-of-00002.safetensors"),
    "the second shard": ([], lambda: edit_tensor("model/model-00002-of-00002.safetensors", -1), [],
                         "the file model-00002-of-00002.safetensors"),
    "the index": ([], lambda: edit("model/model.safetensors.index.json", metadata={"x": 1}), [],
                  "the file model.safetensors.index.json"),
    "tokenizer.model": ([],
                        lambda: edit_sentencepiece(), [],
                        "the file tokenizer.model"),
    **{name: ([], lambda name=name: edit(f"model/{name}", note="x"), [],
              f"the file {name}") for name in FILES if name != "added_tokens.json"},
    "added_tokens.json": ([], lambda: edit("model/added_tokens.json", **{"<new>": 1024}), [],
                          "the file added_tokens.json"),
    "a chat template": ([], lambda: Path("model/chat_template.jinja").write_text("x"), [],
                        "the file chat_template.jinja (missing then)"),
    "a file that is gone": ([], lambda: Path("model/special_tokens_map.json").unlink(), [],
                            "the file special_tokens_map.json (missing now)"),
    "another model in the same tree": (TREE, lambda: edit_base("tree"), [], "the file base/manifest.json"),
    "a tree's config": (TREE, lambda: edit("tree/model/config.json", template="v1.0:simple"), [],
                        "the file model/config.json"),
    "a tree's tokenizer": (TREE, lambda: edit("tree/model/tokenizer_config.json", note=1), [],
                           "the file model/tokenizer_config.json"),
    "a tree's preprocessor": (TREE, lambda: edit("tree/model/preprocessor_config.json", note=1), [],
                              "the file model/preprocessor_config.json"),
    "a tree's generation config": (TREE, lambda: edit("tree/model/generation_config.json", eos_token_id=[2, 7]), [],
                                   "generation_config.json"),
    "a tower's weights": (TOWER, lambda: edit_tensor("other-tower/model.safetensors", 40), [],
                          "the file vision tower: model.safetensors"),
    "a tower's config": (TOWER, lambda: edit("other-tower/config.json", note=1), [],
                         "the file vision tower: config.json"),
    "a tower's preprocessor": (TOWER, lambda: edit("other-tower/preprocessor_config.json", note=1), [],
                               "vision tower: preprocessor_config"),
    "a tower's processor": (TOWER, lambda: write_json(Path("other-tower/processor_config.json"), {"image_processor": PREPROCESSOR}), [],
                            "the file vision tower: processor_config.json (missing then)"),
    "a tower of a tree": (TREE + TOWER, lambda: edit_tensor("other-tower/model.safetensors", 40), [],
                          "the file vision tower: model.safetensors"),
    "a tokenizer that was named": (OWN_TOKENIZER, lambda: edit("tokenizer/tokenizer_config.json", note=1), [],
                                   "the file tokenizer: tokenizer_con"),
    "what lies beside a tokenizer that was named": (
        OWN_TOKENIZER_FILE, lambda: edit("tokenizer/tokenizer_config.json", note=1), [], "the file tokenizer: tokenizer_con"),
    "a chat template among several": (
        [], lambda: write_json(Path("model/additional_chat_templates/default.jinja"), "x"), [],
        "the file additional_chat_templates/default.jinja (missing then)"),
    "--vision_tower": ([], None, TOWER, "--vision_tower (missing then)"),
    "--tokenizer": ([], None, OWN_TOKENIZER, "--tokenizer (missing then)"),
    "--template": ([], None, ["--template", "v1.0:simple"], "--template (missing then)"),
    "--dtype": ([], None, ["--dtype", "bfloat16"], "the dtype ('float32' then, 'bfloat16' now)"),
    "--mesh": ([], None, ["--mesh", "data=1,tp=2"], "--mesh (missing then)"),
    "--checkpoint": ([], None, ["--checkpoint", "tree"], "the model's name ('model' then, 'tree' now)"),
    "generation.max_new_tokens": ([], None, ["--config.generation.max_new_tokens=7"],
                                  "'generation.max_new_tokens' (1024 then, 7 now)"),
    "generation.temperature": ([], None, ["--config.generation.temperature=0.5"],
                               "'generation.temperature' (0.0 then, 0.5 now)"),
    "generation.num_beams": ([], None, ["--config.generation.num_beams=2"], "'generation.num_beams' (1 then, 2 now)"),
    "generation.batch_size": ([], None, ["--config.generation.batch_size=3"],
                              "'generation.batch_size' (16 then, 3 now)"),
    "seed": ([], None, ["--config.seed=1"], "the config key 'seed' (0 then, 1 now)"),
    "a question": ([],
                   lambda: edit_question(11,
                                         conversations=[{"from": "human", "value": "Why?\n<image>"},
                                                        {"from": "gpt", "value": "x"}]), [],
                   "question 32"),
    "one letter of a question": ([], lambda: edit_question(11, conversations=[
        {"from": "human", "value": "what is 2 of 3?\n<image>"}, {"from": "gpt", "value": "x"}]), [], "question 32"),
    "an id": ([], lambda: edit_question(11, id=99), [], "question 99 (missing then)"),
    "which image is asked about": ([], lambda: edit_question(11, image="0.png"), [], "the image 0.png"),
    "the order of the questions": ([], lambda: reverse_questions(), [], "the order of the questions"),
    **{f"image {n}": ([], lambda n=n: paint(n), [], f"the image {n}.png") for n in range(4)},
    "two images exchanged": ([], lambda: exchange("set/0.png", "set/3.png"), [], "the image 0.png, the image 3.png"),
}


def edit_sentencepiece():
    """A tokenizer whose pieces 500 and 501 are exchanged: as long as before."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(TOKENIZER.read_bytes())
    proto.pieces[500].piece, proto.pieces[501].piece = proto.pieces[501].piece, proto.pieces[500].piece
    Path("model/tokenizer.model").write_bytes(proto.SerializeToString())


# Of one change of each kind the evaluation is finished too, and its answers compared with those of one that never stopped.
FINISHED = ["the second shard", "a tower of a tree", "--template", "generation.num_beams", "a question", "two images exchanged"]


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_named_and_nothing_is_taken_over(name, stopped, monkeypatch, capsys):
    flags, change, more, named = CHANGES[name]
    root = stopped(*flags)
    kept, n = (root / "w" / "predictions.jsonl.partial").read_bytes(), num_kept("w")
    assert 5 <= n < 12
    if change is not None:
        change()
    flags, is_finished = [*([] if "--checkpoint" in more else flags), *more], name in FINISHED
    capsys.readouterr()
    assert start(monkeypatch, "w", *flags, stops_after=None if is_finished else 1) == (0 if is_finished else 75)
    said = capsys.readouterr().err
    assert f"its {n} answers belong to another evaluation (different: " in said and named in said.partition("the file is renamed")[0], said
    assert "reused" not in said and "all questions are asked again" in said
    if is_finished:
        assert start(monkeypatch, "fresh", *flags) == 0
        assert texts("w") == texts("fresh") and len(texts("w")) == 12
    (aside,) = (root / "w").glob("predictions.jsonl.of-*.partial")
    assert aside.read_bytes() == kept, "nothing is lost"


@pytest.mark.parametrize("flags", [[], TREE, TOWER, OWN_TOKENIZER, ["--mesh", "data=1,tp=2"], ["--config.seed=3"]],
                         ids=" ".join)
def test_where_nothing_has_changed_all_is_taken_over(flags, stopped, monkeypatch, capsys):
    """Nor where only what is computed of the answers has, or how a path is written, or when a file was last written."""
    root, n = stopped(*flags), num_kept("w")
    for file in [*root.glob("model/*"), *root.glob("tree/**/*.json"), *root.glob("set/*.png")]:
        file.touch()
    edit_question(0,
                  conversations=json.loads(Path("set/test.json").read_text())[0]["conversations"][:1] + [{"from": "gpt",
                                                                                                          "value": "another gold"}])
    where = [f"--config.data.root={root / 'set'}", f"--config.data.train={root / 'set' / 'test.json'}"]
    where += ["--config.data.trained_on=set/test.json"]
    where += [f"{word}={root / value}" for word,
              value in zip(flags[::2], flags[1::2]) if word in ("--vision_tower", "--tokenizer")]
    absolute = [] if "--checkpoint" in flags else ["--checkpoint", str(root / "model")]
    capsys.readouterr()
    assert start(monkeypatch, "w", *instead([*flags], [*where, *absolute])) == 0
    said = capsys.readouterr().err
    assert f"{n} answers of an earlier start are reused" in said and "another" not in said
    assert start(monkeypatch, "fresh", *flags) == 0 and texts("w") == texts("fresh")
    assert not list((root / "w").glob("*.partial"))


def test_going_back_takes_over_what_was_set_aside(root, monkeypatch, capsys):
    assert start(monkeypatch, "w", stops_after=5) == 75
    first = num_kept("w")
    assert start(monkeypatch, "w", "--config.seed=1", stops_after=4) == 75
    other = num_kept("w")
    capsys.readouterr()
    assert start(monkeypatch, "w", stops_after=2) == 75
    said = capsys.readouterr().err
    assert f"{first} answers of an earlier start are reused" in said and f"its {other} answers belong to another evaluation" in said
    assert f"stopped; {first + num_kept('w')} answers are kept in w: run again to continue" in said
    assert start(monkeypatch, "w") == 0 and start(monkeypatch, "fresh") == 0 and texts("w") == texts("fresh")
    assert len(list((root / "w").glob("*.partial"))) == 1, "of the other seed"


@pytest.mark.parametrize("what", ["the code", "the package jax", "the package pillow"])
def test_other_code_asks_anew(what, stopped, monkeypatch, capsys):
    stopped()
    if what == "the code":
        monkeypatch.setattr(asked, "code_sha256", lambda: "0" * 64)
    else:
        own, name = asked.version, what.split()[-1]
        monkeypatch.setattr(asked, "version", lambda package: "9" if package == name else own(package))
    assert start(monkeypatch, "w", stops_after=1) == 75
    assert f"another evaluation (different: {what}" in capsys.readouterr().err


def test_another_machine_is_said(stopped, monkeypatch, capsys):
    stopped()
    n = num_kept("w")
    monkeypatch.setenv("NPROC", "3")
    assert start(monkeypatch, "w") == 0
    said = capsys.readouterr().err
    assert f"{n} answers of an earlier start are reused" in said
    assert "came from another machine (CPU cores (" in said and "3 now)); rounding may differ there, and in rare cases an answer" in said


def test_the_record_says_what_was_asked(root, monkeypatch, capsys):
    assert start(monkeypatch, "w", "--template", "v1.0:simple", "--vision_tower", "other-tower", "--mesh",
                 "data=1,tp=2", "--dtype", "bfloat16") == 0
    out, metrics = capsys.readouterr().out, json.loads((root / "w" / "metrics.json").read_text())
    said = metrics["asked"]
    assert set(asked.KEYS) <= set(said)
    assert {name: said[name] for name in ("template", "tower", "tokenizer", "dtype", "quantize", "kv_cache", "adapter",
                                          "checkpoint", "endpoint", "step")} == {
        "template": "v1.0:simple", "tower": "other-tower, as asked for", "tokenizer": "model/tokenizer.model",
                                              "dtype": "bfloat16",
        "quantize": None, "kv_cache": None, "adapter": None, "checkpoint": "model", "endpoint": None, "step": None}  # fmt: skip
    assert said["mesh"] == {"data": 1, "fsdp": 1, "tp": 2}
    assert said["generation"] == {"max_new_tokens": 1024, "temperature": 0.0, "num_beams": 1, "batch_size": 16,
                                  "seed": 0}
    assert said["files"]["config.json"] == hashes.sha256_of_files({"x": root / "model" / "config.json"})["x"]
    own = {name: digest for name, digest in said["files"].items() if ":" not in name}
    assert said["checkpoint_sha256"] == hashes.sha256_of_list(own) and len(own) == len(FILES) + 5
    page = (root / "w" / "report.html").read_text()
    for words in ("template v1.0:simple", "tower other-tower, as asked for", "tokenizer model/tokenizer.model",
                  "dtype bfloat16"):
        assert words in out and words in page
    shutil.copytree("model", "copy")
    assert start(monkeypatch, "v", "--checkpoint", "copy") == 0
    again = json.loads((root / "v" / "metrics.json").read_text())["asked"]
    assert again["checkpoint_sha256"] == said["checkpoint_sha256"], "of the content, wherever it lies"
    assert again["template"] == "v1.5:mistral_instruct" and again["tower"] == "the tensors in the checkpoint" and again["mesh"] is None


def test_the_sha256_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE", 10)
    monkeypatch.setattr(hashes, "_RECENT_S", -1e9)
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100)
    first = hashes.sha256_of_files({"w": file})["w"]
    counted = []
    monkeypatch.setattr(hashes.hashlib, "file_digest", lambda *args: counted.append(1) or real(*args))
    real = __import__("hashlib").sha256
    monkeypatch.setattr(hashes.hashlib, "file_digest", lambda opened, name: counted.append(1) or real(opened.read()))
    assert hashes.sha256_of_files({"w": file})["w"] == first and not counted, "remembered"
    stat = file.stat()
    file.write_bytes(b"y" * 100)
    __import__("os").utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync --times would have it
    assert hashes.sha256_of_files({"w": file})["w"] != first and counted, "its inode was changed"
    monkeypatch.setattr(hashes, "_RECENT_S", 3600)
    assert hashes.sha256_of_files({"w": file})["w"] and len(counted) == 2, "what was changed just now is hashed each time"
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert hashes.sha256_of_files({"w": file})["w"] and len(counted) == 3, "a home that cannot be written to"


def test_a_loaded_model_says_what_it_is(root, caplog):
    import logging

    import llavamed_jax as lm

    with caplog.at_level(logging.INFO, "llavamed_jax"):
        model = lm.load("tree", vision_tower="other-tower", tokenizer="tokenizer", template="v1.0:simple",
                        mesh="data=1,tp=2")
    assert model.describe() == {
        "checkpoint": "tree", "step": None, "template": "v1.0:simple", "tower": "other-tower, as asked for",
        "tokenizer": "tokenizer/tokenizer.model", "dtype": "float32", "mesh": {"data": 1, "fsdp": 1, "tp": 2},
        "quantize": None, "kv_cache": None,
        "adapter": None}  # fmt: skip
    assert "tower other-tower, as asked for" in caplog.text and "template v1.0:simple" in caplog.text
    json.dumps(model.describe())
    plain = lm.load("model").describe()
    assert (plain["tower"], plain["template"], plain["mesh"]) == ("the tensors in the checkpoint",
                                                                  "v1.5:mistral_instruct", None)
    assert lm.load("preset:small").describe()["tower"] == "random weights"


def test_a_step_of_a_run_is_part_of_what_it_is(root, monkeypatch, capsys):
    """The newest step moves while a run trains: what was answered before is of another model."""
    from llavamed_jax.checkpoints.tree.store import StepWriter

    def save(step):
        name = "decoder/norm/scale"
        trained = {name: jax.numpy.full((48,), 1 + step / 100, np.float16)}
        with StepWriter("tree") as writer:
            writer.save(step, trained, {"x": jax.numpy.zeros(1)}, {})

    save(5)
    assert start(monkeypatch, "w", *TREE, stops_after=5) == 75
    kept = num_kept("w")
    save(6)
    capsys.readouterr()
    assert start(monkeypatch, "w", *TREE) == 0
    said = capsys.readouterr().err
    assert f"its {kept} answers belong to another evaluation (different: the step (5 then, 6 now), the file checkpoints/6/man" in said
    assert json.loads((root / "w" / "metrics.json").read_text())["asked"]["step"] == 6
    assert start(monkeypatch, "v", "--checkpoint", "tree/checkpoints/5") == 0
    assert json.loads((root / "v" / "metrics.json").read_text())["asked"]["step"] == 5


def test_bin_files_count_too(root, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    tensors = {}
    for file in sorted(Path("model").glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    Path("model/model.safetensors.index.json").unlink()
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(tensors, "model/pytorch_model.bin")
    torch.save({"x": torch.zeros(1)}, "model/training_args.bin")
    assert start(monkeypatch, "w", stops_after=5) == 75
    torch.save({"x": torch.ones(1)}, "model/training_args.bin")  # no part of the model
    assert start(monkeypatch, "w", stops_after=1) == 75
    assert "reused" in capsys.readouterr().err
    tensors["model.norm.weight"] += 1
    torch.save(tensors, "model/pytorch_model.bin")
    assert start(monkeypatch, "w") == 0
    assert "(different: the file pytorch_model.bin)" in capsys.readouterr().err


def test_the_record_of_a_server(root, monkeypatch):
    from tests.support.openai_server import OpenAiServer

    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), "--config.data.root=set", "--workdir", "w",
            "--model", "tiny"]
    with OpenAiServer(lambda body: "yes") as server:
        assert cli.main([*argv, "--endpoint", server.url]) == 0
    said = json.loads((root / "w" / "metrics.json").read_text())["asked"]
    known = {"endpoint": server.url, "model": "tiny", "generation": said["generation"]}
    assert said == dict.fromkeys(asked.KEYS) | known and said["generation"]["max_new_tokens"] == 1024
    assert f"endpoint {server.url}" in (root / "w" / "report.html").read_text()
