"""lmms-eval or VLMEvalKit, as they come from the package index, against `serve.py`; their verdicts beside ours.

    python samples/harness.py lmms|vlmevalkit --python .venv-lmms/bin/python --checkpoint PATH --source FOLDER [--most N]

FOLDER is SLAKE in its official layout. The steps: the data as the harness reads them (`harness_data.py`), `serve.py` in a process
of its own, the harness in its environment, then `eval.py --predictions` with the harness's logged answers and its rule
(`scoring=lmms_eval` or `scoring=vlmevalkit`). Exits with 1 if a question has another verdict here than there, if an answer is
missing, or if one is an error's text. `make lmms` and `make vlmevalkit` make the environments and run this.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samples import harness_data  # noqa: E402

ERRORS = re.compile(r"\[LMMS_EVAL_|Failed to obtain answer|Error code:|invalid_request_error")
NAME = "served"
TOKENS = 32


class Server:
    """`serve.py` in a process of its own, ready for requests while the block is open."""

    def __init__(self, checkpoint: Path, log: Path):
        words = [sys.executable, "serve.py", "--checkpoint", str(checkpoint), "--served_model_name", NAME, "--port", "0", "--no_page"]
        print(f"$ python {' '.join(words[1:])}", flush=True)
        with open(log, "w", encoding="utf-8") as file:
            self._process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, encoding="utf-8")
        found = next(filter(None, (re.search(r"at (http://\S+):", line) for line in self._process.stdout)), None)
        if found is None:
            raise SystemExit(f"serve.py ended with {self._process.wait()}; {log} says why")
        self.url = found[1]

    def __enter__(self) -> Server:
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=60).read()
                return self
            except OSError:
                if self._process.poll() is not None:
                    raise SystemExit(f"serve.py ended with {self._process.returncode}") from None
                time.sleep(0.5)

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait(120)


def run(words: list, **more: str) -> None:
    """Runs a command, printed; ends with its exit status if it fails."""
    print(f"$ {' '.join(map(str, words))}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"} | more
    status = subprocess.run([str(word) for word in words], cwd=ROOT, env=environment).returncode
    if status:
        raise SystemExit(status)


def newest(out: Path, pattern: str) -> Path:
    """The newest file of a harness, whose exit status is 0 after an error too."""
    found = sorted(out.rglob(pattern))
    if not found:
        raise SystemExit(f"the harness wrote no {pattern} under {out}; what it printed above says why")
    return found[-1]


def by_lmms_eval(python: Path, url: str, data: Path, out: Path) -> dict[str, tuple[str, bool]]:
    """Runs lmms-eval; returns question id -> its logged answer and its verdict."""
    run([python, "-m", "lmms_eval", "--model", "openai", "--model_args", f"model={NAME},base_url={url}/v1,api_key=any,timeout=3600",
         "--include_path", data / "lmms", "--tasks", harness_data.TASK, "--log_samples", "--output_path", out, "--batch_size", "1"])
    logged = newest(out, f"*_samples_{harness_data.TASK}.jsonl")
    rows = [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()]
    return {row["slake_accuracy"]["id"]: (row["filtered_resps"], row["slake_accuracy"]["is_correct"]) for row in rows}


def by_vlmevalkit(python: Path, url: str, data: Path, out: Path) -> dict[str, tuple[str, bool]]:
    """Runs VLMEvalKit; returns question id -> its logged answer and its verdict."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"model": {NAME: {"class": "GPT4V", "model": NAME, "api_base": f"{url}/v1/chat/completions", "key": "any", "temperature": 0,
                               "max_tokens": TOKENS, "retry": 3, "timeout": 3600}},
              "data": {name: {"class": kind, "dataset": name} for name, kind in harness_data.TABLES.items()}}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run([python, "-m", "vlmeval", "--config", out / "config.json", "--work-dir", out, "--judge", "exact_matching", "--api-nproc", "8"],
        LMUData=str(data / "LMUData"), PRED_FORMAT="tsv")
    found = {}
    csv.field_size_limit(2**30)
    for table, column in ((f"{NAME}_SLAKE_YORN_auxmatch.tsv", "score"), (f"{NAME}_SLAKE_GQA_results.tsv", "eval_score")):
        with open(newest(out, table), newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                found[row["index"]] = (row["prediction"], row[column] in ("True", "1.0"))
    return found


HARNESSES = {"lmms": (by_lmms_eval, "lmms_eval"), "vlmevalkit": (by_vlmevalkit, "vlmevalkit")}


def score(found: dict[str, tuple[str, bool]], data: Path, split: str, scoring: str, out: Path) -> dict[str, bool]:
    """Scores logged answers by `eval.py --predictions`; returns question id -> our verdict."""
    predictions = out / "logged.jsonl"
    predictions.write_text("".join(json.dumps({"question_id": name, "text": text}) + "\n" for name, (text, _) in found.items()), encoding="utf-8")
    run([sys.executable, "eval.py", "--config", "configs/eval/slake.py", f"--config.data.root={data / 'slake'}", f"--config.data.split={split}",
         f"--config.scoring={scoring}", "--predictions", predictions, "--workdir", out / "eval"])
    lines = (out / "eval" / f"{scoring}.jsonl").read_text(encoding="utf-8").splitlines()
    return {str(line["question_id"]): line["is_right"] for line in map(json.loads, lines)}


def main() -> int:
    from llavamed_jax.utils.paths import local

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harness", choices=HARNESSES)
    parser.add_argument("--python", required=True, help="the Python of the harness's environment")
    parser.add_argument("--checkpoint", type=local, required=True, help="what is served")
    parser.add_argument("--source", type=local, required=True, help="the folder of SLAKE")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--most", type=int, metavar="N", help="only so many questions (default: all)")
    parser.add_argument("--out", type=local, help="where everything goes (default: runs/HARNESS)")
    flags = parser.parse_args()
    ask, scoring = HARNESSES[flags.harness]
    out = (flags.out or Path("runs") / flags.harness).resolve()
    out.mkdir(parents=True, exist_ok=True)
    samples = harness_data.write(flags.source, out / "data", flags.split, flags.most)
    with Server(flags.checkpoint.resolve(), out / "serve.log") as server:
        found = ask(Path(os.path.abspath(flags.python)), server.url, out / "data", out / "answers")
    ours = score(found, out / "data", flags.split, scoring, out)
    missing = [str(sample.question_id) for sample in samples if str(sample.question_id) not in found]
    errors = [name for name, (text, _) in found.items() if ERRORS.search(text)]
    apart = [name for name, (_, is_right) in found.items() if ours[name] != is_right]
    print(f"{len(found)} of {len(samples)} questions answered, {len(errors)} with an error's text; "
          f"{len(found) - len(apart)} verdicts equal, {sum(ours.values())} right")
    for what, names in (("has no answer", missing), ("has an error's text", errors), ("has another verdict here", apart)):
        for name in names[:5]:
            print(f"question {name} {what}: {found.get(name)}", file=sys.stderr)
    return int(bool(missing or errors or apart))


if __name__ == "__main__":
    sys.exit(main())
