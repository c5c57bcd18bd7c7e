"""A real language model from GGUF beside transformers: `python benchmarks/speaking.py --data DIR [--cases A,B] [--rows N]`.

SmolLM2-135M-Instruct (`samples/smollm2.py` fetches it) is imported and built by the command line. Each case is a row of
`benchmarks/results/speaking.jsonl`, and the exit status is 1 if a case misses what it is held to:

  weights     every tensor of `import-decoder` equals what transformers itself reads from the file, and the memory of the import
  tokenizer   ids equal a `tokenizers` pipeline of the file's own rule: 3,000 random strings, all text of SLAKE; where
              transformers' reading of the file differs is counted
  logits      3 rows of 512 tokens of VQA-RAD's text: the largest difference is at most 1e-5 of the largest logit, float32
  greedy      20 prompts, 64 tokens each, equal
  perplexity  of the questions and answers of VQA-RAD and SLAKE (test and validation rows; --rows N limits them), equal to 4 digits

  few_bits    perplexity with rounded kernels over that in float32: int8 at most 1 % more, nf4 25 %, int4 in groups of 64 or 128 45 %
  kv_cache    perplexity of rows that are read through a key/value cache of int8 over that of a float32 one: at most 1 % more
  calibrated  perplexity of an int4 export, rounded to the nearest and calibrated: at least a third of the loss is recovered. The
              calibration text is none of the measured text: training rows of VQA-RAD and SLAKE, README.md and CHANGELOG.md

DIR has `vqa_rad/` and `slake/` in their official layouts. transformers reads the GGUF file itself, so its weights, its undoing of the
permutation and its config are its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks.conversion import anonymous_bytes
from benchmarks.measure import ROOT, append_row, circumstances
from llavamed_jax.errors import UserError
from llavamed_jax.utils.paths import local
from samples.smollm2 import fetch

LENGTH, ROWS, PROMPTS, TOKENS, STRINGS = 512, 3, 20, 64, 3000
PROSE = 40  # rows of LENGTH tokens
ROUNDED = {"int8": 0.01, "int4": 0.45, "nf4": 0.25}  # the most that perplexity may grow
CALIBRATION, CALIBRATION_LENGTH = 32, 256  # rows, half of them of questions and answers; and their tokens
RECOVERED = 1 / 3  # of what rounding to the nearest costs
CHARACTERS = "abcdefghijklmnopqrst ABCDEFGH  0123456789 .,;:!?'\n\r\t _-()[]{}<>|/\\\"éüñß日本語العربية😀²½Ⅷ٣\u0308\u200b"


class Smol:
    """The file, what the command line makes of it, and transformers' own reading."""

    def __init__(self, data: Path, rows: int | None, scratch: Path):
        self.data, self.rows, self.scratch, self.file = data, rows, scratch, fetch()
        self.decoder, self.built = scratch / "decoder", scratch / "built"
        self._models: dict[str, object] = {}

    def imported(self) -> tuple[Path, int]:
        """The directory of `import-decoder`, and the most memory of that command that no file stands behind."""
        peak, process = 0, subprocess.Popen(
            [sys.executable, "-m", "convert", "import-decoder", self.file, "--out", self.decoder], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        if process.returncode:
            raise UserError("import-decoder failed")
        return self.decoder, peak

    def ours(self):
        """The model of `convert build`, with a tower of random weights that text does not reach."""
        if "ours" not in self._models:
            import transformers

            import llavamed_jax as lm
            tower = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                                  image_size=28, patch_size=14)
            transformers.CLIPVisionModel(tower).save_pretrained(self.scratch / "tower")
            subprocess.run([sys.executable, "-m", "convert", "build", "--decoder", self.file, "--vision", self.scratch / "tower",
                            "--projector", "mlp2x_gelu", "--out", self.built], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            self._models["ours"] = lm.load(self.built, dtype="float32")
        return self._models["ours"]

    def theirs(self):
        """transformers' model of the file, eager attention, float32."""
        if "theirs" not in self._models:
            import torch
            import transformers
            torch.manual_seed(0)
            self._models["theirs"] = transformers.AutoModelForCausalLM.from_pretrained(
                self.file.parent, gguf_file=self.file.name, dtype=torch.float32, attn_implementation="eager").eval()
        return self._models["theirs"]

    def their_logits(self, ids: np.ndarray) -> np.ndarray:
        import torch
        with torch.no_grad():
            return self.theirs()(torch.from_numpy(ids).long()).logits.numpy()

    def tokenizer(self):
        return self.ours().processor.tokenizer

    def pairs(self, name: str, is_whole: bool = False, is_training: bool = False) -> list[tuple[str, str]]:
        """Questions and answers: VQA-RAD's test rows, SLAKE's English validation rows; all rows and languages; or training rows."""
        if name == "vqa_rad":
            rows = json.loads((self.data / "vqa_rad" / "VQA_RAD Dataset Public.json").read_text(encoding="utf-8"))
            return [(str(row["question"]).strip(), str(row["answer"]).strip()) for row in rows
                    if is_whole or row["phrase_type"].startswith("test_") != is_training]
        stem = "train" if is_training else "validate"
        files = [file for file in sorted((self.data / "slake").glob("*.json")) if is_whole or file.stem == stem]
        rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]
        return [(row["question"].strip(), row["answer"].strip()) for row in rows if is_whole or row["q_lang"] == "en"]

    def rows_of(self, name: str) -> np.ndarray:
        """Rows of LENGTH tokens of a data set's text."""
        ids = self.tokenizer().encode(text_of(self.pairs(name)), bos=False)
        rows = np.array(ids[:len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
        return rows[:self.rows]


def text_of(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"Question: {question}\nAnswer: {answer}\n" for question, answer in pairs)


def weights(smol: Smol) -> dict:
    from llavamed_jax.checkpoints.torch.files import read_weights
    directory, peak = smol.imported()
    found, wanted = read_weights(directory), smol.theirs().state_dict()
    wanted = {name: tensor for name, tensor in wanted.items() if name != "lm_head.weight"}  # tied
    differing = [name for name in wanted if name not in found
                 or found[name].load().tobytes() != wanted[name].numpy().tobytes()]
    sizes = [math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in found.values()]
    return dict(tensors=len(found), differing=differing, bytes=sum(sizes), largest_tensor_bytes=max(sizes), peak_rss_anon_bytes=peak,
                is_met=not differing and found.keys() == wanted.keys())


def random_strings(tokens: list[str], count: int = STRINGS) -> Iterable[str]:
    rng = random.Random(0)
    for _ in range(count):
        text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(0, 60)))
        yield text + rng.choice(tokens) + "x" if rng.random() < 0.1 else text


def tokenizer(smol: Smol) -> dict:
    import gguf
    import tokenizers
    import transformers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    fields = gguf.GGUFReader(smol.file).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    special = [token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    wanted = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges]))
    wanted.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    wanted.decoder = decoders.ByteLevel()
    wanted.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ours = smol.tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(smol.file.parent, gguf_file=smol.file.name)
    out = {"rule": fields["tokenizer.ggml.pre"].contents()}
    pairs = [text for pair in smol.pairs("slake", is_whole=True) for text in pair]
    for name, texts in (("random", list(random_strings(special))), ("slake", pairs)):
        ids = [wanted.encode(text, add_special_tokens=False).ids for text in texts]
        out |= {f"{name}_texts": len(texts), f"{name}_tokens": sum(map(len, ids)),
                f"{name}_differing": sum(ours.encode(text) != each for text, each in zip(texts, ids)),
                f"{name}_decoded_otherwise": sum(ours.decode(each) != wanted.decode(each) for each in ids),
                f"{name}_transformers_differing": sum(theirs(text).input_ids != each for text, each in zip(texts, ids))}
    return {**out, "is_met": not any(out[f"{name}_{what}"] for name in ("random", "slake") for what in ("differing", "decoded_otherwise"))}


def logits(smol: Smol) -> dict:
    ids = smol.rows_of("vqa_rad")[:ROWS]
    found, wanted = np.asarray(smol.ours().logits(ids)), smol.their_logits(ids)
    difference, largest = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
    return dict(rows=len(ids), tokens=ids.size, largest_logit=largest, largest_difference=difference,
                relative=difference / largest, same_argmax=int((found.argmax(-1) == wanted.argmax(-1)).sum()),
                is_met=difference <= 1e-5 * largest)


def greedy(smol: Smol) -> dict:
    import torch
    model, theirs, prompts = smol.ours(), smol.theirs(), []
    for question, _ in smol.pairs("vqa_rad")[:PROMPTS // 2] + smol.pairs("slake")[:PROMPTS - PROMPTS // 2]:
        prompts.append(smol.tokenizer().encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", bos=False))
    found = model.generate_tokens(prompts, max_new_tokens=TOKENS)
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=2,
                                  pad_token_id=2)
        wanted.append(out[0, len(prompt):].tolist())
    equal = sum(one == other for one, other in zip(found, wanted))
    return dict(prompts=len(prompts), new_tokens=sum(map(len, wanted)), equal=equal, first_answer=smol.tokenizer().decode(found[0]),
                is_met=equal == len(prompts))


def perplexity_of(rows: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> float:
    """Perplexity of rows of LENGTH tokens, each predicted from those before it in its row; `compute` gives the logits of ids [1,T]."""
    total = 0.0
    for row in rows:
        values = compute(row[None])[0, :-1].astype(np.float64)
        values -= values.max(-1, keepdims=True)
        chosen = np.take_along_axis(values, row[1:, None].astype(np.int64), -1)[:, 0]
        total += float((np.log(np.exp(values).sum(-1)) - chosen).sum())
    return math.exp(total / (rows.shape[0] * (LENGTH - 1)))


def perplexity(smol: Smol) -> dict:
    out, is_met = {}, True
    for name in ("vqa_rad", "slake"):
        rows = smol.rows_of(name)
        ours, theirs = perplexity_of(rows, lambda ids: np.asarray(smol.ours().logits(ids))), perplexity_of(rows, smol.their_logits)
        out |= {f"{name}_rows": len(rows), f"{name}_tokens": len(rows) * (LENGTH - 1), f"{name}": ours, f"{name}_transformers": theirs}
        is_met &= f"{ours:.4g}" == f"{theirs:.4g}"
    return {**out, "is_met": is_met}


def texts_of(smol: Smol, model) -> dict[str, np.ndarray]:
    """Returns rows of tokens of VQA text and of this project's own pages."""
    prose = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    ids = model.processor.tokenizer.encode(prose, bos=False)
    return {"vqa": np.concatenate([smol.rows_of("vqa_rad"), smol.rows_of("slake")]),
            "docs": np.array(ids[:PROSE * LENGTH], np.int32).reshape(-1, LENGTH)[:None if smol.rows is None else 2 * smol.rows]}


def few_bits(smol: Smol) -> dict:
    """Perplexity with the decoder's kernels rounded, as a multiple of float32's, on VQA text and on this project's own pages."""
    import jax
    import ml_dtypes

    import llavamed_jax as lm
    from llavamed_jax.checkpoints.load import load_params
    from llavamed_jax.checkpoints.open import open_checkpoint
    from llavamed_jax.quantized.kernels import Kernel
    model, out = smol.ours(), {}
    rows = texts_of(smol, model)
    checkpoint = open_checkpoint(smol.built)
    for how in ("float32", "bfloat16", "int8", "int4", "nf4"):
        name = how if how in ROUNDED else None
        if how == "bfloat16":
            params = jax.tree.map(lambda x: x.astype(np.float32), load_params(checkpoint, ml_dtypes.bfloat16))
        else:
            params = load_params(checkpoint, np.float32, quantize=name)
        kernels = [x for x in jax.tree.leaves(params["decoder"], is_leaf=lambda x: isinstance(x, Kernel)) if isinstance(x, Kernel)]
        rounded = lm.LlavaMed(model.config, params, model.processor, quantize=name)
        found = {text: perplexity_of(each, lambda ids, m=rounded: np.asarray(m.logits(ids))) for text, each in rows.items()}
        out[how] = {**found, "kernels": len(kernels)}
    for each in out.values():
        each["loss"] = {text: each[text] / out["float32"][text] - 1 for text in rows}
    tokens = {f"{text}_tokens": len(each) * (LENGTH - 1) for text, each in rows.items()}
    return {**tokens, **out, "is_met": all(max(out[how]["loss"].values()) <= most for how, most in ROUNDED.items())}


def kv_cache(smol: Smol) -> dict:
    """Perplexity of rows whose keys and values are read from a cache of int8, as a multiple of float32's."""
    import jax
    import jax.numpy as jnp

    from llavamed_jax.models.decoders.cache import init_cache
    from llavamed_jax.models.llava import Llava
    model, out = smol.ours(), {}
    rows, network = texts_of(smol, model), Llava(model.config)

    def logits_with(dtype):
        def run(params, ids):
            call = lambda *args, method: network.apply({"params": params}, *args, method=method)
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            caches = init_cache(model.config.decoder, *ids.shape, dtype)
            x, _ = call(call(ids, None, method="embed"), positions, caches, method="step")
            return call(x, method="logits")
        compiled = jax.jit(run)
        return lambda ids: np.asarray(compiled(model.engine.params, ids))

    for name, dtype in (("float32", jnp.float32), ("int8", jnp.int8)):
        out[name] = {text: perplexity_of(each, logits_with(dtype)) for text, each in rows.items()}
    loss = {text: out["int8"][text] / out["float32"][text] - 1 for text in rows}
    return {**{f"{text}_tokens": len(each) * (LENGTH - 1) for text, each in rows.items()}, **out, "loss": loss,
            "is_met": max(loss.values()) <= 0.01}


def calibrated(smol: Smol) -> dict:
    """Perplexity of an int4 export with and without calibration, as a multiple of float32's."""
    import llavamed_jax as lm
    from llavamed_jax.checkpoints.export.calibrate import calibrated
    from llavamed_jax.checkpoints.export.directory import export
    from llavamed_jax.checkpoints.export.few_bits import Rounding
    from llavamed_jax.checkpoints.open import open_checkpoint
    model, data = smol.ours(), []
    rows = texts_of(smol, model)
    pairs = smol.pairs("vqa_rad", is_training=True) + smol.pairs("slake", is_training=True)
    random.Random(0).shuffle(pairs)
    for text in (text_of(pairs), "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))):
        ids, size = smol.tokenizer().encode(text, bos=False), CALIBRATION_LENGTH
        data += [(ids[i * size:(i + 1) * size], np.zeros(0)) for i in range(min(CALIBRATION // 2, len(ids) // size))]
    checkpoint = open_checkpoint(smol.built)
    nearest, start = Rounding.of(checkpoint, "int4"), time.perf_counter()
    kernels = calibrated(checkpoint, data, nearest.group)
    out = {"group": nearest.group, "calibration_rows": len(data), "calibration_tokens": sum(len(ids) for ids, _ in data),
           "calibration_seconds": round(time.perf_counter() - start, 1)}
    found = {"float32": {text: perplexity_of(each, lambda ids: np.asarray(model.logits(ids))) for text, each in rows.items()}}
    for name, rounding in (("int4", nearest), ("calibrated", dataclasses.replace(nearest, calibrate=lambda: kernels))):
        export(checkpoint, smol.scratch / name, rounding=rounding)
        loaded = lm.load(smol.scratch / name, dtype="float32")
        found[name] = {text: perplexity_of(each, lambda ids, m=loaded: np.asarray(m.logits(ids))) for text, each in rows.items()}
    loss = {name: {text: found[name][text] / found["float32"][text] - 1 for text in rows} for name in ("int4", "calibrated")}
    recovered = {text: 1 - loss["calibrated"][text] / loss["int4"][text] for text in rows}
    tokens = {f"{text}_tokens": len(each) * (LENGTH - 1) for text, each in rows.items()}
    return {**out, **tokens, **found, "loss": loss, "recovered": recovered, "is_met": min(recovered.values()) >= RECOVERED}


CASES: dict[str, Callable[[Smol], dict]] = {each.__name__: each for each in (weights, tokenizer, logits, greedy, perplexity, few_bits, kv_cache, calibrated)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=local, required=True, help="a folder with vqa_rad/ and slake/")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rows", type=int, help="rows of 512 tokens a data set for the perplexity; all by default")
    parser.add_argument("--out", type=local, default=ROOT / "benchmarks" / "results", help="where speaking.jsonl is appended to")
    args = parser.parse_args()
    unknown = [name for name in args.cases.split(",") if name not in CASES]
    if unknown:
        parser.error(f"--cases has {', '.join(unknown)}; {', '.join(CASES)} were expected")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            smol, missed = Smol(args.data, args.rows, Path(scratch)), []
            for name in args.cases.split(","):
                start = time.perf_counter()
                found = CASES[name](smol)
                missed += [] if found["is_met"] else [name]
                append_row(args.out / "speaking.jsonl", {"case": name, "file": smol.file.name, **found,
                                                         "seconds": round(time.perf_counter() - start, 1), **circumstances()})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if missed:
        print(f"not met: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
