"""docs/fidelity.md: how far each part is from the original. `python benchmarks/fidelity.py [--out FILE]`, or `make fidelity`.

The figures are those of the tests that hold each part to the original: they are run, and what they measured on the way is
printed beside what they allow. Two tables are the last runs of benchmarks/families.py and benchmarks/true_shapes.py; with
`--tables` these alone are written anew, and the rest of the page stays.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, too, for this package and the project

from benchmarks.quirks import OTHERS, QUIRKS  # noqa: E402
from llavamed_jax.utils.paths import local  # noqa: E402

TRUE_SHAPES = ROOT / "docs" / "fidelity" / "true_shapes.json"
FAMILIES = ROOT / "docs" / "fidelity" / "families.json"
# Headings of the page: the two tables, and what follows them.
TABLES, TRUE_SHAPES_TITLE = "\n## Towers, decoders and templates\n", "\n## The released shapes, layer by layer\n"
ROTARY = "\n## Rotary frequencies\n"

# Number of the group, what it is, the tests (file::function, or a whole file), what to say.
GROUPS = [
    ("1", "Metrics on a whole data set", ["test_evaluation::test_a_hand_computed_score", "test_evaluation::test_the_whole_of_vqa_rad"],
     "to 1e-6: scores computed by hand, and gold answers as predictions; the original's prediction files are not part of this project"),
    ("2", "Metrics, case by case", ["test_metrics"], "to 1e-12, against values from nltk 3.8.1"),
    ("3", "Ids and label masks", ["test_conversation", "test_tokenizer", "test_processor", "test_templates"],
     "19 templates of three origins, LLaMA's and Mistral's tokenizers, against a second implementation of the originals' procedures"),
    ("4", "Prompt fingerprints", ["test_conversation::test_fingerprints", "test_conversation::test_mistral_text",
                                  "test_templates::test_fingerprints", "test_templates::test_prompts_are_the_originals"],
     "sha256 of the rendered prompts"),
    ("5", "Shape of the generation request", ["test_instruct::test_the_domains_take_turns_and_the_request_has_the_originals_shape"],
     "18 messages; the wording is this project's own"),
    ("6", "Image preprocessing", ["test_images"], "`pad` and `square`; `keep` and `anyres` are refused by name"),
    ("7", "The original's tiny models", ["test_known_answers::test_logits_and_loss_as_printed",
                                        "test_known_answers::test_load_and_logits_as_printed",
                                        "test_known_answers::test_tower_and_projector_as_printed"],
     "v1.5 and v1.0, padded right and left: logits, loss, tower, projector; sums over all values to 1e-3"),
    ("7", "— cut at `tokenizer_model_max_length`", ["test_known_answers::test_rows_are_cut_as_the_original_cuts"], "also inside an image"),
    ("7", "— sliding window", ["test_known_answers::test_sliding_window"], "windows of 4 and none, against torch"),
    ("7", "— greedy tokens", ["test_known_answers::test_greedy_tokens"], "image, text, two images, against torch without a cache"),
    ("8", "The gradient of stage 1", ["test_known_answers::test_stage_1_moves_the_projector_and_the_rows_of_two_tokens"],
     "of the projector and of two rows, relative to their largest magnitude, against torch's; the original's leak into token "
     "rows is left out (Q12)"),
    ("9", "Images that do not fit their markers", ["test_assistant::test_the_count_of_images_must_fit_the_markers",
                                                   "test_assistant::test_bad_logits_calls_are_one_sentence",
                                                   "test_generation::test_bad_requests_are_one_sentence"], "an error with both numbers"),
    ("10", "Deltas", ["test_delta"], "equal to torch's float16 bit for bit; 32,000 rows against 32,003 and 32,004"),
    ("11", "Names of tensors, both ways", ["test_checkpoints", "test_transformers_layout", "test_layouts",
                                            "test_export::test_round_trips_to_the_bit"],
     "round trips to the bit; the tower's switch"),
    ("", "Exports read by transformers", ["test_export::test_ids_in_transformers_are_those_of_the_original",
                                                "test_export::test_chat_templates_write_our_prompts",
                                                "test_export::test_processor_and_generate_give_our_tokens"],
     "ids and prompts of its processor, tokens of its `generate`"),
    ("12", "Clean-up of generated data", ["test_turns::test_an_answer_is_cleaned_as_the_original_does",
                                          "test_turns::test_the_originals_phrases_are_complete",
                                          "test_turns::test_the_image_is_drawn_to_a_side_and_may_be_lost_with_its_pair",
                                          "test_turns::test_the_original_splits_at_every_role"],
     "`--rules original`; the phrases are those of the original's code, by hash"),
    ("13", "Stop strings", ["test_assistant::test_stop_strings_end_the_text_and_an_empty_one_does_nothing"],
     "an empty stop string stops nothing"),
    ("14", "Chunks of questions", [], "not part of this project: one process asks all questions in batches"),
    ("", "Whole models against transformers", ["test_parity::test_logits_equal_transformers",
                                              "test_parity::test_scanned_layers_equal_transformers"],
     "37 settings, four of them also scanned; logits with a standard deviation of 1"),
    ("", "Ten random models, loaded from files", ["test_known_answers::test_random_models_equal_transformers",
                                                 "test_known_answers::test_a_random_model_with_a_linear_projector_equals_torch"],
     "difference relative to the logits' magnitude; greedy tokens equal; a linear projector against torch"),
    ("", "Wrong models are noticed", ["test_parity::test_mutants_fail_by_twice_the_tolerance"],
     "the comparison above rejects each of these mutants"),
    ("", "Modules one by one", ["test_modules"], "tower, projector, decoder with left padding, norms, masks"),
    ("", "Rotary frequencies", ["test_known_answers::test_rope_frequencies_are_torchs_bit_for_bit_with_the_c_librarys_power"],
     "bit for bit, 60 pairs of head width and theta; see below"),
    ("", "Fifty updates of training", ["test_training_torch"], "losses to 2e-6, parameters to 2e-5"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=local, default=ROOT / "docs" / "fidelity.md")
    parser.add_argument("--tables", action="store_true", help="write the tables of families and true shapes anew, and leave the rest")
    args = parser.parse_args()
    if args.tables:
        page = args.out.read_text(encoding="utf-8")
        before, after = page.partition(TABLES if TABLES in page else TRUE_SHAPES_TITLE)[0], page.partition(ROTARY)
        write(args.out, before + "\n".join([*families(), *true_shapes()]) + "\n" + "".join(after[1:]))
        return 0
    selectors = sorted({s for _, _, group, _ in GROUPS for s in group} | {row[-1] for row in [*QUIRKS, *OTHERS]} - {None})
    results = run(selectors)
    failed = [result.name for result in results if result.outcome == "failed"]
    if failed:
        print(f"error: {len(failed)} checks fail, so nothing is written: {', '.join(failed[:5])}", file=sys.stderr)
        return 1
    missing = [s for s in selectors if not any(result.belongs(s) for result in results)]
    if missing:
        print(f"error: no test is named {', '.join(missing)}", file=sys.stderr)
        return 1
    write(args.out, document(results))
    return 0


def write(out: Path, page: str) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)
    print(f"written to {out}")


@dataclasses.dataclass
class Result:
    """A test that ran: `module::function[case]`, what became of it, and (difference, tolerance) of each measurement."""

    name: str
    outcome: str
    measured: list[tuple[float, float]]

    def belongs(self, selector: str) -> bool:
        function = self.name.partition("[")[0]
        return function == selector or function.startswith(f"{selector}::")


def run(selectors: Iterable[str]) -> list[Result]:
    """Runs tests, slow ones included, and reads what they recorded."""
    words = [place_of(selector) for selector in selectors]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "results.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={file}", *words], cwd=ROOT)
        tree = xml.parse(file)
    results = []
    for case in tree.iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        recorded = [(p.get("name"), p.get("value")) for p in case.iter("property")]
        differences, tolerances = ([float(v) for name, v in recorded if name == wanted] for wanted in ("difference", "tolerance"))
        module = case.get("classname").rpartition(".")[2]
        results.append(Result(f"{module}::{case.get('name')}", outcome, list(zip(differences, tolerances))))
    return results


def document(results: list[Result]) -> str:
    packages = ("jax", "flax", "torch", "transformers", "numpy")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip()
    lines = ["# Fidelity", "",
             "This page lists the measured differences from the original PyTorch code and from transformers, on a CPU in float32. "
             "`make fidelity` writes it: it runs the tests named here and records the largest difference that they measure. No "
             "released weights are involved (`make verify-release` checks those). Models are tiny and have random weights; "
             "[The released shapes](#the-released-shapes-layer-by-layer) has the full size.", "",
             f"{datetime.date.today().isoformat()}, commit {commit}, {versions}.", "",
             "## Conformance groups", "",
             "Each row shows the difference that comes closest to its tolerance. "
             "*holds* means that ids, texts, bits, errors, or figures (to the digits in the note) are equal.", "",
             "| | group | checks | largest difference | allowed | |", "|---|---|---:|---:|---:|---|"]
    for number, title, selectors, note in GROUPS:
        lines.append(group_row(number, title, [r for r in results if any(map(r.belongs, selectors))], note))
    lines += ["", "## Quirks of the original", "",
              "Code and pages cite a quirk by its number. *kept* reproduces the original, *mended* does not.", "",
              "| | the original | here | switch | held by |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} | {held_by(test)} |" for *row, test in QUIRKS]
    lines += ["", "## Other differences", "", "| the original | here | switch | held by |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} | {held_by(test)} |" for *row, test in OTHERS]
    return "\n".join([*lines, *families(), *true_shapes(), *rotary()]) + "\n"


def held_by(test: str | None) -> str:
    return f"`{place_of(test)}`" if test else "–"


def place_of(selector: str) -> str:
    """`test_x::test_y` -> `tests/ROOM/test_x.py::test_y`, as pytest takes it. Raises ValueError for a file that is not there."""
    module, colons, function = selector.partition("::")
    file, = (ROOT / "tests").rglob(f"{module}.py")
    return f"{file.relative_to(ROOT).as_posix()}{colons}{function}"


def group_row(number: str, title: str, results: list[Result], note: str) -> str:
    if not results:
        return f"| {number} | {title} | – | – | – | {note} |"
    passed, skipped = (sum(r.outcome == outcome for r in results) for outcome in ("passed", "skipped"))
    measured = [pair for r in results for pair in r.measured]
    # Of several measurements with their own tolerances, the one that comes closest to what is allowed.
    difference, allowed = max(measured, key=lambda pair: (math.isnan(pair[0]), pair[0] / pair[1])) if measured else (None, None)
    checks = f"{passed}" + (f" ({skipped} skipped)" if skipped else "")
    return f"| {number} | {title} | {checks} | {number_(difference)} | {'' if allowed is None else f'{allowed:.0e}'} | {note} |"


def number_(value: float | None) -> str:
    return "holds" if value is None else "0" if value == 0 else f"{value:.1e}"


def families() -> list[str]:
    """The table of towers, decoders and templates, as benchmarks/families.py left it, and the mutants of each."""
    if not FAMILIES.is_file():
        return []
    data = json.loads(FAMILIES.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {data['versions'][package]}" for package in ("jax", "flax", "torch", "transformers"))
    later = "".join(f"; {name}: {each['date'][:10]}, commit {each['commit']}" for name, each in data.get("later", {}).items())
    lines = [TABLES.rstrip("\n"), "",
             f"`python benchmarks/families.py`: tiny shapes with random weights, float32, beside transformers' own modules, and ids of "
             f"prompts beside the models' own chat templates. {data['date'][:10]}, commit {data['commit']}, {versions}{later}.", "",
             "A difference of logits, features or gradients is divided by the largest magnitude of the same array; that of the gradient "
             "is the worst of all parameters. For prompts it is the share of prompts whose ids differ. A mutant is this project's code "
             "with one mistake in it. Each has to differ by at least twice what is allowed.", "",
             "| family | compared | largest difference | allowed | nearest mutant | differs by |", "|---|---|---:|---:|---|---:|"]
    for row in data["rows"]:
        name, nearest = min(row["mutants"].items(), key=lambda pair: pair[1], default=("–", None))
        lines.append(f"| {row['family']} | {row['what']} | {number_(row['difference'])} | {number_(row['allowed'])} | {name} | "
                     f"{'' if nearest is None else number_(nearest)} |")
    lines += ["", "| family | mutant | differs by |", "|---|---|---:|"]
    return lines + [f"| {row['family']} | {name} | {number_(difference)} |" for row in data["rows"] for name, difference in row["mutants"].items()]


def true_shapes() -> list[str]:
    """The layer table, as benchmarks/true_shapes.py left it."""
    if not TRUE_SHAPES.is_file():
        return []
    data = json.loads(TRUE_SHAPES.read_text(encoding="utf-8"))
    lines = [TRUE_SHAPES_TITLE.rstrip("\n"), "",
             f"`python benchmarks/true_shapes.py --checkpoint {data['checkpoint']}`: {data['parameters']:,} random parameters, one "
             f"image and one question ({data['positions']} positions), float32, transformers' layer modules compared with this "
             f"project's blocks. Each side continues with its own output. {data['seconds']} s on {data['device']}, at most "
             f"{data['peak_resident_bytes'] / 1e9:.1f} GB resident, commit {data['commit']}.", "",
             "| after | largest difference | largest magnitude | ratio |", "|---|---:|---:|---:|"]
    for row in data["rows"]:
        difference, magnitude = row["difference"], row["magnitude"]
        lines.append(f"| {row['after']} | {difference:.1e} | {magnitude:.3g} | {difference / magnitude:.1e} |")
    return lines


def rotary() -> list[str]:
    """What the last bit of torch's vectorised power does to the logits, measured."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import numpy as np
    import torch

    from llavamed_jax.config import DecoderConfig
    from llavamed_jax.models import layers
    from llavamed_jax.models.decoders import llama
    head_dim, theta, positions = 128, 1e6, 2048
    ours = layers.rope_frequencies(head_dim, theta)
    theirs = (1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))).numpy()
    places = np.flatnonzero(ours != theirs)
    cfg = DecoderConfig(512, 256, 512, 4, 2, 1, head_dim, 1e-5, theta, 32768, architecture="mistral")
    effect = logits_apart(llama.Decoder(cfg), positions, ours, theirs) if len(places) else 0.0
    exponents = [math.log10(ours[i]) for i in places]
    where = ", ".join(f"number {i} (10^{e:.2f})" for i, e in zip(places, exponents)) or "nowhere"
    return [ROTARY.rstrip("\n"), "",
            "Each inverse frequency here comes from the float32 nearest to the exact power. torch computes the same bits with the C "
            "library's `powf`. torch's vectorised `pow` differs in the last bit in a few places, and in other places with AVX2 than "
            "with AVX-512 (`ATEN_CPU_CAPABILITY`), so there is no single set of bits to equal. On this machine "
            f"({torch.backends.cpu.get_cpu_capability()}), at head width {head_dim} and theta {theta:g}, torch differs at {where}. "
            f"In four layers of that head width over {positions:,} positions, the two sets of frequencies give logits that differ by "
            f"{effect:.1e} of their largest magnitude."]


def logits_apart(module, positions: int, ours, theirs) -> float:
    """Largest difference of logits, over their largest magnitude, with either side's frequencies."""
    from unittest import mock

    import jax
    import numpy as np

    from llavamed_jax.models import layers
    ids = np.random.default_rng(0).integers(3, module.cfg.vocab_size, (1, positions))

    def forward(module, ids):
        return module.logits(module(module.embed(ids), np.arange(positions)[None])[0])
    params = module.init(jax.random.key(0), ids, method=forward)
    found = []
    for frequencies in (ours, theirs):
        with mock.patch.object(layers, "rope_frequencies", lambda *_, frequencies=frequencies: frequencies):
            found.append(np.asarray(jax.jit(lambda params: module.apply(params, ids, method=forward))(params)))
    return float(np.abs(found[0] - found[1]).max() / np.abs(found[1]).max())


if __name__ == "__main__":
    sys.exit(main())
