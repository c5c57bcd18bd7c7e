"""Whether a tokenizer folder that LLaVA-Med v1.0's own training saves gives its ids here, on VQA-RAD's training rows.

    python benchmarks/tokenizer_v1.py texts DIR VQA_RAD                # questions and answers as v1.0's training text
    OTHER/python benchmarks/tokenizer_v1.py theirs DIR tokenizer.model # in an environment with transformers 4.28.1: folders, ids
    python benchmarks/tokenizer_v1.py check DIR                        # a line a folder: how many samples have the same ids
    python benchmarks/tokenizer_v1.py record DIR                       # tests/support/tokenizer_v1.json, which a test goes by

VQA_RAD is the folder of the public file, tokenizer.model LLaMA's. `theirs` does to the tokenizer what v1.0's
`llava/train/train.py` does: `--version v0` with and without "llama" in the model's path, and `--version v1`. It writes the
ids of the tokenizer that trained, and of the saved folder loaded again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tests" / "support" / "tokenizer_v1.json"
SAMPLES = 600
PAD, PATCH, START, END = "[PAD]", "<im_patch>", "<im_start>", "<im_end>"
IMAGE = START + PATCH * 2 + END  # two for 256, which changes no other id
VERSIONS = {"v0, llama in the path": "v1.0:v0", "v0": "v1.0:v0", "v1": "v1.0:vicuna_v1_1"}


def texts(out: Path, data: Path) -> None:
    """Writes `out/texts.json`: of each version, training texts as the original hands them to its tokenizer."""
    from llavamed_jax.datasets.vqa_rad import read_vqa_rad
    from llavamed_jax.text.templates import get_template
    rows = read_vqa_rad(data, "train")[:SAMPLES]
    # The image in front of every other question, behind the rest.
    talks = [(f"<image>\n{row.question}" if i % 2 else f"{row.question}\n<image>", row.answer) for i, row in enumerate(rows)]
    found = {"talks": talks, "texts": {}}
    for version, name in VERSIONS.items():
        system = get_template(name).system
        form = "{}\n\n### Human: {}\n### Assistant: {}\n### " if name == "v1.0:v0" else "{} USER: {} ASSISTANT: {}</s>"
        found["texts"][version] = [form.format(system, question.replace("<image>", IMAGE), answer) for question, answer in talks]
    out.mkdir(parents=True, exist_ok=True)
    (out / "texts.json").write_text(json.dumps(found), encoding="utf-8")


def theirs(out: Path, model: Path) -> None:
    """Writes a folder a version, and `out/ids.json`."""
    import transformers
    base, ids = out / "base", {"transformers": transformers.__version__}
    base.mkdir(exist_ok=True)
    shutil.copyfile(str(model), str(base / "tokenizer.model"))
    for version, written in json.loads((out / "texts.json").read_text(encoding="utf-8"))["texts"].items():
        tokenizer = transformers.LlamaTokenizer.from_pretrained(base, model_max_length=2048, padding_side="right")
        if version.startswith("v0"):
            tokenizer.add_special_tokens({"pad_token": PAD})
        if "llama" in version:
            tokenizer.add_special_tokens({"eos_token": "</s>", "bos_token": "</s>", "unk_token": "<unk>"})
        if version == "v1":
            tokenizer.pad_token = tokenizer.unk_token
        tokenizer.add_tokens([PATCH], special_tokens=True)
        tokenizer.add_tokens([START, END], special_tokens=True)
        tokenizer.save_pretrained(out / version)
        again = transformers.LlamaTokenizer.from_pretrained(out / version)
        ids[version] = {"trained": [tokenizer(text)["input_ids"] for text in written],
                        "loaded again": [again(text)["input_ids"] for text in written]}
    (out / "ids.json").write_text(json.dumps(ids), encoding="utf-8")


def ours(folder: Path, version: str, talks: list[tuple[str, str]]) -> list[list[int]]:
    """The ids of training samples with the tokenizer of a folder."""
    from dataclasses import replace

    from llavamed_jax.config import IMAGE_TOKEN, preset
    from llavamed_jax.processor import Processor
    from llavamed_jax.text.tokenizer import Tokenizer
    config, tokenizer, ids = preset("v1-7b"), Tokenizer.load(folder), []
    config = config.replace(decoder=replace(config.decoder, vocab_size=tokenizer.vocab_size))
    processor, patch = Processor(config, tokenizer, VERSIONS[version]), tokenizer.id_of(PATCH)
    for question, answer in talks:
        found, _ = processor.training_example([{"from": "human", "value": question}, {"from": "gpt", "value": answer}])
        ids.append([token for i in found for token in ([patch] * 2 if i == IMAGE_TOKEN else [i])])
    return ids


def check(out: Path) -> int:
    """Prints a line a version and way; the exit status is 1 where an id differs."""
    talks = json.loads((out / "texts.json").read_text(encoding="utf-8"))["talks"]
    ids, is_equal = json.loads((out / "ids.json").read_text(encoding="utf-8")), True
    for version in VERSIONS:
        found = ours(out / version, version, talks)
        for way, wanted in ids[version].items():
            equal = sum(a == b for a, b in zip(found, wanted, strict=True))
            is_equal &= equal == len(wanted)
            print(f"transformers {ids['transformers']}, {version}, {way}: {equal} of {len(wanted)} samples have the same ids "
                  f"(each begins with {wanted[0][0]})")
    return 0 if is_equal else 1


def record(out: Path) -> None:
    """Writes what a test needs to check this again without that transformers: the folders' files and a hash of all ids."""
    ids = json.loads((out / "ids.json").read_text(encoding="utf-8"))
    files = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    FILE.write_text(json.dumps({
        "transformers": ids["transformers"],
        "folders": {v: {name: json.loads((out / v / name).read_text(encoding="utf-8")) for name in files} for v in VERSIONS},
        "digests": {version: digest(ids[version]["loaded again"]) for version in VERSIONS}}, indent=1) + "\n", encoding="utf-8")


def digest(ids: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    command, *paths = sys.argv[1:]
    sys.exit({"texts": texts, "theirs": theirs, "check": check, "record": record}[command](*map(Path, paths)))
