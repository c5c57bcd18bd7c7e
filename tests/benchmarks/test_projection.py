"""The tables of what preflight found: the projection's arithmetic and the memory's cells, on rows that are known."""

import json

import pytest

from benchmarks import memory_table, projection


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


def memory(topology, peak, rows=None):
    trained = dict(rows=rows, row_length=2048, mean_length=1080) if rows else {}
    return dict(topology=topology, memory_bytes=38 * 2**30, bytes=dict(peak=peak * 2**30), fits=True, **trained)


def test_a_line_of_memory_says_its_batch_once_where_it_is_the_same():
    ways = dict(fits=False, would_fit=[dict(changes={"micro_batches": 4}, topology="l4-1", peak=20 * 2**30),
                                       dict(changes={}, topology="l4-2", peak=2**33)])
    said = memory_table.table({"finetune_v15_7b": [memory("l4-1", 30, 64), {**memory("h100-1", 50, 64), **ways}],
                               "lora_v15_7b": [memory("l4-1", 22, 68), memory("h100-1", 22, 34)],
                               "eval_v15_7b_int4": [memory("h100-1", 11)]})
    assert said.splitlines() == [
        "| | `l4-1` (38.0) | `h100-1` (38.0) |", "|---|---|---|",
        "| full fine-tuning, 7B (v1.5), 121 samples | 30.0 | ~~50.0~~ `micro_batches=4` on `l4-1` 20.0; on `l4-2` 8.0 |",
        "| LoRA, 7B (v1.5) | 22.0, 129 samples | 22.0, 64 samples |", "| inference, int4, 7B |  | 11.0 |"]
