"""The projection's arithmetic, on floors that are known."""

import json

import pytest

from benchmarks import projection


def row(topology, milliseconds, samples, fits=True, ceiling=0.5):
    return dict(topology=topology, fits=fits, samples_per_step=samples, floor=dict(milliseconds=milliseconds, mfu_ceiling=ceiling))


def test_hours_are_updates_times_floors():
    assert projection.hours(row("h100-8", 1800, 100), 60_000, 3) == pytest.approx(60_000 * 3 / 100 * 1.8 / 3600)
    for bad in (None, row("h100-8", 1, 1, fits=False), dict(row("h100-8", 1, 1), floor=None)):
        assert projection.hours(bad, 1, 1) is None


def test_a_machine_without_a_floor_has_no_sum(tmp_path, monkeypatch, capsys):
    for model in projection.MODELS:
        for recipe in ("pretrain", "finetune", "vqa_rad"):
            rows = [row("h100-8", 3600, 100)] + [row("h200-8", 3600, 100)] * (recipe != "finetune")
            (tmp_path / f"{projection.case_of(recipe, model)}.json").write_text(json.dumps(rows))
    monkeypatch.setattr("sys.argv", ["projection.py", "--out", str(tmp_path)])
    projection.main()
    said = capsys.readouterr()
    assert "| stage 1: 500,000 captions, 1 epoch | 5.00 (50 %) | 5.00 (50 %) | – | – |" in said.out
    total = (500_000 + 3 * (60_000 + 1_797 + 4_919 + 19_654)) / 100 / 1000
    assert f"| **sum, at the floors** | {total:.1f} | – | – | – |" in said.out
    assert f"| **sum, at 70% of the ceilings (a guess)** | {total / 0.7:.1f} | – | – | – |" in said.out
    assert "finetune_v1_13b_auto.json lacks h200-8, a100-40g-8, v5p-16" in said.err
