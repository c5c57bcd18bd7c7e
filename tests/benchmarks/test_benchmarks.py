"""The benchmark for a large GPU runs whole at small shapes, and its budget holds."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import conversion, h200, measure
from benchmarks import prompted as prompted_file
from benchmarks.prompted import Prompted
from llavamed_jax.config import preset
from llavamed_jax.models.llava import abstract_params

ROOT = Path(__file__).resolve().parents[2]


def rows(directory):
    return [json.loads(line) for line in (directory / "h200.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_case_runs_at_small_shapes(tmp_path):
    pytest.importorskip("torch", reason="torch's CPU build is not installed")
    done = subprocess.run([sys.executable, "benchmarks/h200.py", "--small", "--out", str(tmp_path), "--commit", "abc"],
                          cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["case"]: row for row in rows(tmp_path)}
    assert list(found) == list(h200.CASES)
    assert {json.loads(line)["case"] for line in done.stdout.splitlines() if line.startswith("{")} == set(found)
    for row in found.values():
        assert row["device"] == "cpu" and row["commit"] == "abc" and row["versions"]["jax"] and row["shapes"] and row["date"]
    assert found["parity"]["max_difference_float32"] <= 2e-5 * max(1, found["parity"]["logits_std"])
    assert 1e-4 < found["parity"]["max_difference_bfloat16"] < 1
    for case in ("prefill", "decode", "train_projector", "train_full", "decode_split"):
        assert found[case]["tokens_per_second"] > 0 and found[case]["peak_memory_bytes"] > 0
    for case in ("train_projector", "train_full"):  # all of AdamW in float32: parameters and two moments are arguments
        said = found[case]
        assert said["preflight_peak_bytes"] > said["preflight_argument_bytes"] > 12 * said["trained_parameters"]
        assert said["preflight_peak_bytes"] < said["peak_memory_bytes"]  # which on a CPU is the process's, Python included
    evaluated = found["evaluate"]
    for side in (evaluated["shared"], evaluated["apart"], evaluated["transformers"]["batched"], evaluated["transformers"]["one_by_one"]):
        assert side["questions_per_second"] > 0
    assert evaluated["equal_with_and_without_sharing"] == 6 and 0 < evaluated["seconds_to_first_token"] < 60
    assert found["train_full"]["trained_parameters"] > found["train_projector"]["trained_parameters"] > 0
    assert found["train_full"]["last_loss"] < found["train_full"]["first_loss"]


def test_a_case_stands_beside_its_floor(monkeypatch):
    """Read from a CPU's programs at the peaks of an H200, since what is tested is the reading: no CPU has stated peaks."""
    peaks, size, small = h200_peaks(), h200.SMALL, preset(h200.SMALL.preset)
    small = small.replace(vision=replace(small.vision, num_layers=2), decoder=replace(small.decoder, num_layers=2))
    monkeypatch.setattr(prompted_file, "preset", lambda name: small)
    monkeypatch.setattr(prompted_file, "random_params", lambda cfg, dtype: jax.tree.map(
        lambda x: np.zeros(x.shape, dtype), abstract_params(cfg)))  # a floor does not depend on them
    assert measure.beside_floor(1.0, lambda read: [read("")]) == {}
    monkeypatch.setattr(measure, "peaks_of", lambda machine: peaks)
    prompted = Prompted(size.preset, size.dtype, 2, 40, size.decode_tokens)
    prompted.prefill()
    decoded = measure.beside_floor(1.0, lambda read: prompted.decode_floor(read, 40))
    weights = sum(x.nbytes for x in jax.tree.leaves(prompted.params["decoder"]))
    table = prompted.params["decoder"]["embed_tokens"]["embedding"].nbytes
    assert weights - table < decoded["floor_seconds"] * peaks.bytes_per_second < 3 * weights
    assert decoded["times_the_floor"] == 1 / decoded["floor_seconds"] and decoded["floor_kernels"] > 10
    prefilled = measure.beside_floor(1.0, prompted.prefill_floors)
    assert decoded["floor_seconds"] < prefilled["floor_seconds"] < 100 * decoded["floor_seconds"]
    assert measure.beside_floor(1.0, lambda read: read("no program").seconds)["floor_error"]


def h200_peaks():
    return measure.peaks_of(measure.Topology.parse("h200-1"))


def arguments(tmp_path, small=False):
    return argparse.Namespace(out=str(tmp_path), commit="abc", small=small)


def test_a_case_that_would_overrun_is_written_as_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(h200, "BUDGET_SECONDS", 10)
    assert h200.run_all(["prefill", "decode"], arguments(tmp_path)) == 0
    assert [(row["case"], row["skipped"]) for row in rows(tmp_path)] == [
        ("prefill", "10 of 10 s were left"), ("decode", "10 of 10 s were left")]


def test_a_case_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(h200, "BUDGET_SECONDS", 1)
    assert h200.run_all(["train_full"], arguments(tmp_path, small=True)) == 0
    assert rows(tmp_path)[0]["skipped"].startswith("did not end within 1 s")


def test_an_unknown_case_is_named():
    done = subprocess.run([sys.executable, "benchmarks/h200.py", "--cases", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'speed' does not exist; parity, prefill" in done.stderr


def test_the_conversion_is_measured_and_checked_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "BLOCK", 2**20 + 3)
    monkeypatch.setattr(sys, "argv", ["conversion.py", "--directory", str(tmp_path / "work"), "--preset", "small", "--out", str(tmp_path)])
    assert conversion.main() == 0
    found = {row["case"]: row for row in map(json.loads, (tmp_path / "conversion.jsonl").read_text().splitlines())}
    assert list(found) == ["import", "export transformers", "export llava"]
    for case, row in found.items():
        assert row["bytes"] == 2 * row["parameters"] and row["seconds"] > 0 and row["copy_seconds"] > 0
        assert 10**7 < row["peak_rss_anon_bytes"] < 10**9
        assert row.get("equal_tensors", row["tensors"]) == row["tensors"] and row["device"] and row["commit"], case
    assert not list((tmp_path / "work").iterdir())
