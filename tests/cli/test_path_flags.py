"""Every flag that takes a path: one that names nothing is a wrong command line, one sentence and exit status 2."""

import json
from pathlib import Path

import pytest

from llavamed_jax import chat
from llavamed_jax.cli import convert
from llavamed_jax.cli import eval as evaluate
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
EVAL = ["--config", f"{ROOT / 'configs/eval/vqa_rad.py'}:demo", f"--config.data.root={ROOT / 'samples/vqa_rad'}",
        f"--config.data.held_out={ROOT / 'samples/vqa_rad/held_out.json'}", "--workdir", "w"]
COMMANDS = [
    (evaluate, [*EVAL, "--checkpoint", "GONE"]), (evaluate, [*EVAL, "--checkpoint", "GONE/checkpoints/3"]),
    (evaluate, [*EVAL, "--checkpoint", "v1/checkpoints/3"]), (evaluate, [*EVAL, "--predictions", "GONE"]),
    (evaluate, [*EVAL, "--predictions", "p.jsonl", "--against", "GONE"]),
    (evaluate, [*EVAL, "--checkpoint", "v1", "--vision_tower", "GONE"]),
    (evaluate, [*EVAL, "--checkpoint", "v1", "--tokenizer", "GONE"]),
    (evaluate, [*EVAL[:-2], "--preflight", "cpu-1", "--checkpoint", "GONE"]),
    (chat, ["--checkpoint", "GONE"]), (chat, ["--checkpoint", "v1", "--image", "GONE"]),
    (chat, ["--checkpoint", "v1", "--tokenizer", "GONE"]),
    (chat, ["--checkpoint", "v1", "--vision_tower", "GONE"]),
    (convert, ["import", "--checkpoint", "GONE", "--out", "out"]),
    (convert, ["export", "--checkpoint", "GONE", "--out", "out", "--layout", "llava"]),
    (convert, ["import", "--checkpoint", "v1", "--out", "out", "--vision_tower", "GONE"]),
    (convert, ["import", "--checkpoint", "v1", "--out", "out", "--tokenizer", "GONE"]),
    (convert, ["import", "--checkpoint", "v1", "--out", "out", "--projector", "GONE"]),
    (convert, ["inspect", "GONE"]), (convert, ["inspect", "v1", "--vision_tower", "GONE"]),
    (convert, ["verify", "GONE", "v1"]), (convert, ["verify", "v1", "GONE"]),
    (convert, ["verify", "v1", "v1", "--vision_tower", "GONE"]),
    (convert, ["build", "--decoder", "GONE", "--vision", "tiny-tower", "--projector", "linear", "--out", "out"]),
    (convert, ["build", "--decoder", "decoder", "--vision", "GONE", "--projector", "linear", "--out", "out"]),
    (convert, ["build", "--decoder", "decoder", "--vision", "tiny-tower", "--projector", "GONE", "--out", "out"]),
    (convert, ["build", "--decoder", "decoder", "--vision", "tiny-tower", "--projector", "GONE.bin", "--out", "out"]),
    (convert, ["make-delta", "--base", "GONE", "--target", "v1", "--out", "out"]),
    (convert, ["make-delta", "--base", "decoder", "--target", "GONE", "--out", "out"]),
    (convert, ["apply-delta", "--base", "GONE", "--delta", "v1", "--out", "out"]),
    (convert, ["apply-delta", "--base", "decoder", "--delta", "GONE", "--out", "out"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the other flags name; no command may leave anything beside it."""
    path = tmp_path_factory.mktemp("there")
    tiny.save_v1(path)
    tiny.save(path / "decoder", tiny.LLAMA, tiny.drawn(tiny.decoder_shapes(tiny.LLAMA)))
    rows = json.loads((ROOT / "samples/vqa_rad/VQA_RAD Dataset Public.json").read_text())
    held_out = json.loads((ROOT / "samples/vqa_rad/held_out.json").read_text())["images"]
    (path / "p.jsonl").write_text("".join(json.dumps({"question_id": row["qid"], "text": "yes"}) + "\n"
                                          for row in rows if row["image_name"] in held_out))
    return path


# A name and one that no file can have for every flag; an absolute and a deeper path for every second one.
CASES = [(gone, *command) for i, command in enumerate(COMMANDS) for gone in ("gone", "x" * 300, ("/nope", "no/such/place")[i % 2])]


@pytest.mark.parametrize("gone, main, argv", CASES, ids=lambda value: " ".join(value[-4:]) if isinstance(value, list) else str(value)[:9])
def test_a_path_that_names_nothing_is_a_wrong_command_line(gone, main, argv, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert main.main([word.replace("GONE", gone) for word in argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and (gone[:50] in error or "checkpoints/3" in error), error
    assert sorted(path.name for path in folder.iterdir()) == before
