"""Packing: rows that grain would make of the tokens and images themselves, an order that ends with its epoch, and decision 5."""

import functools

import grain
import numpy as np
import pytest
from grain.experimental import BestFitPackIterDataset
from PIL import Image

from llavamed_jax.config import IGNORE, IMAGE_TOKEN
from llavamed_jax.datasets.records import MemoryRecords
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.pipeline import examples, lengths, loader, packing, sizes
from llavamed_jax.pipeline.lengths import Lengths
from llavamed_jax.pipeline.packing import Layout, Plan, Stream, pack
from llavamed_jax.pipeline.sizes import rows_an_update
from llavamed_jax.pipeline.trial import Trial

T, SLOTS, MAX_LENGTH = 256, 4, 120


def some_lengths(count=200, seed=0, longest=2000, mean_images=1.0):
    rng = np.random.default_rng(seed)
    tokens, images = rng.integers(20, longest, count), rng.poisson(mean_images, count).clip(0, 3)
    return Lengths(tokens.astype(np.int32), images.astype(np.int16), [], 0, 0, 0)


def plan_of(found, layout, seed=0, shuffle=True):
    n = len(found.tokens)
    return Plan(Stream((n,), (n,), seed, shuffle), found, layout)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty samples of no, one and two images, of answers of many lengths."""
    folder = tmp_path_factory.mktemp("images")
    records = []
    for i in range(30):
        images = [folder / f"{i}.{j}.png" for j in range(i % 3)]
        for j, image in enumerate(images):
            Image.new("RGB", (9, 9), (7 * i, 100 * j, 50)).save(image)
        records.append({"id": i, "image": list(map(str, images)), "conversations": [
            {"from": "human", "value": "<image>\n" * len(images) + f"number {i}"}, {"from": "gpt", "value": "so it is " * (i * 7 % 11)}]})
    return TrainingData([MemoryRecords(records)])


def batches_of(data, processor, seed=0, shuffle=True, rows=2, layout=None, **arguments):
    found = lengths.measure(data, processor, MAX_LENGTH)
    plan = Plan(Stream.of(data, seed, shuffle), found, layout or Layout(T, SLOTS, rows, True))
    return loader.batches(data, processor, plan, MAX_LENGTH, **arguments)


# ---- rows are grain's ----


def packed_by_grain(data, processor, order, seed):
    """What grain's packer makes of the tokens, labels and images themselves."""
    def element(i):
        example = examples.tokenize(data.record(int(order[i])), processor, MAX_LENGTH)
        pixels = processor.images_uint8(example.images)
        return dict(input_ids=np.array(example.ids), labels=np.array(example.labels), pixel_values=pixels)

    in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return list(BestFitPackIterDataset(
        grain.MapDataset.range(len(order)).map(element).to_iter_dataset(in_turn),
        length_struct=dict(input_ids=T, labels=T, pixel_values=SLOTS), padding_struct=dict(input_ids=0, labels=IGNORE, pixel_values=0),
        num_packing_bins=min(packing.BINS, len(order)), seed=seed or 0, shuffle_bins=seed is not None))


@pytest.mark.parametrize("bins", [3, 256])
@pytest.mark.parametrize("shuffle", [False, True])
def test_rows_are_those_that_grain_packs_of_tokens_and_images(processor, data, shuffle, bins, monkeypatch):
    monkeypatch.setattr(packing, "BINS", bins)
    batches = batches_of(data, processor, seed=3, shuffle=shuffle, rows=1, epochs=1)
    seed = packing._seed(3, 0, 2**31) if shuffle else None
    theirs = packed_by_grain(data, processor, Stream.of(data, 3, shuffle).order(0), seed)
    ours = list(batches)
    assert len(ours) == len(theirs) > 4
    for batch, row in zip(ours, theirs, strict=True):
        for name, expected in dict(input_ids="input_ids", labels="labels", positions="input_ids_positions",
                                   segment_ids="input_ids_segment_ids", pixel_values="pixel_values").items():
            np.testing.assert_array_equal(batch[name][0], row[expected], err_msg=name)
        assert batch["num_images"][0] == (row["pixel_values_segment_ids"] > 0).sum()
        assert (batch["input_ids"][0] == IMAGE_TOKEN).sum() == 36 * batch["num_images"][0]


def test_packed_rows_hold_what_unpacked_rows_hold(processor, data):
    """Sample by sample: ids, labels, positions from 0 on, and its images in the order of the row."""
    def samples(batches):
        for batch in batches:
            for row in range(len(batch["input_ids"])):
                slot = 0
                for segment in range(1, batch["segment_ids"][row].max() + 1):
                    here = batch["segment_ids"][row] == segment
                    ids = batch["input_ids"][row][here]
                    images = (ids == IMAGE_TOKEN).sum() // 36
                    pixels = batch["pixel_values"][row, slot:slot + images]
                    slot += images
                    yield tuple(ids), tuple(batch["labels"][row][here]), tuple(batch["positions"][row][here]), pixels.tobytes()

    apart = Layout(MAX_LENGTH, 2, 4, False)
    packed, unpacked = batches_of(data, processor, epochs=1), batches_of(data, processor, layout=apart, epochs=1)
    found = list(samples(packed))
    assert len(found) == 30 and sorted(found) == sorted(samples(unpacked))
    assert all(positions == tuple(range(len(ids))) for ids, _, positions, _ in found)


def test_batches_do_not_depend_on_workers_and_resuming_is_seamless(processor, data):
    """Over the end of an epoch, with a number of rows that does not divide it, and for each of two processes."""
    def take(batches, count):
        out = [next(batches) for _ in range(count)]
        batches.close()
        return out

    def assert_equal(left, right):
        for a, b in zip(left, right, strict=True):
            assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)

    layout = Layout(T, SLOTS, 4, True)
    whole = take(batches_of(data, processor, layout=layout), 9)
    assert_equal(whole[:6], take(batches_of(data, processor, layout=layout, num_workers=1), 6))
    first = batches_of(data, processor, layout=layout)
    ids = first.ids(first.state())
    take(first, 5)
    state = first.state()
    assert state["epoch"] >= 1 and first.ids(state) != ids
    again = batches_of(data, processor, layout=layout)
    again.restore(state)
    assert_equal(whole[5:], take(again, 4))
    half = (layout.rows + layout.padding_rows) // 2
    parts = [take(batches_of(data, processor, layout=layout, part=range(k * half, (k + 1) * half)), 9) for k in (0, 1)]
    assert_equal(whole, [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts, strict=True)])


def test_ids_are_those_of_the_batch_that_follows(processor, data):
    batches = batches_of(data, processor)
    for _ in range(8):
        ids = batches.ids(batches.state())
        batch = next(batches)
        texts = [processor.decode(batch["input_ids"][row][batch["segment_ids"][row] == s])
                 for row in range(2) for s in range(1, batch["segment_ids"][row].max() + 1)]
        assert [int(text.split("number ")[1].split()[0]) for text in texts] == ids


def test_a_mesh_that_asks_for_more_rows_gets_empty_ones(processor, data):
    plain = list(batches_of(data, processor, layout=Layout(T, SLOTS, 3, True), epochs=1))
    padded = list(batches_of(data, processor, layout=Layout(T, SLOTS, 3, True, padding_rows=5), epochs=1))
    for a, b in zip(plain, padded, strict=True):
        assert len(b["input_ids"]) == 8 and not b["segment_ids"][3:].any() and not b["num_images"][3:].any()
        assert all(np.array_equal(a[name], b[name][:3]) for name in a)


def test_a_broken_image_leaves_its_row_to_the_other_samples(processor, data, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    records = [data.record(i) for i in range(30)]
    records[4]["image"] = [str(tmp_path / "broken.png")]
    broken = TrainingData([MemoryRecords(records)])
    before, after = list(batches_of(data, processor, epochs=1)), batches_of(broken, processor, epochs=1)
    found = list(after)
    assert [(s["id"], s["epoch"]) for s in after.skipped] == [(4, 0)] and "broken.png" in after.skipped[0]["reason"]
    differ = [(i, row) for i, (a, b) in enumerate(zip(before, found, strict=True)) for row in range(2)
              if not np.array_equal(a["input_ids"][row], b["input_ids"][row])]
    assert len(differ) == 1
    (i, row), = differ
    whole, rest = before[i], found[i]
    assert rest["segment_ids"][row].max() == whole["segment_ids"][row].max() - 1
    assert rest["num_images"][row] == whole["num_images"][row] - 1
    used = (rest["segment_ids"][row] > 0).sum()
    assert (rest["segment_ids"][row][:used] > 0).all() and set(np.diff(rest["segment_ids"][row][:used])) <= {0, 1}


# ---- the plan ----


@pytest.mark.parametrize("bins", [1, 7, 256])
def test_every_epoch_holds_every_usable_sample_once_and_no_row_too_much(bins, monkeypatch):
    monkeypatch.setattr(packing, "BINS", bins)
    found = some_lengths()
    found.tokens[[3, 50]] = 0  # cannot be used
    plan = plan_of(found, Layout(2048, 4, 8, True))
    orders = []
    for epoch in range(3):
        rows = plan.rows(epoch)
        assert sorted(rows.records) == [i for i in range(200) if i not in (3, 50)]
        for i in range(len(rows)):
            assert 0 < found.tokens[rows[i]].sum() <= 2048 and found.images[rows[i]].sum() <= 4
        orders.append(tuple(rows.records))
    assert len(set(orders)) == 3
    again = plan_of(found, Layout(2048, 4, 8, True)).rows(2)  # without having seen the epochs before it
    assert tuple(again.records) == orders[2]
    assert tuple(plan_of(found, Layout(2048, 4, 8, True), seed=1).rows(0).records) != orders[0]


def test_every_epoch_shuffles_its_rows_by_a_seed_of_its_own(monkeypatch):
    """The order of the rows too, not only that of the samples: rows that are packed alike would else stand in the same places."""
    seeds, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *given: seeds.append(given[4]) or pack(*given))
    found, layout = some_lengths(60, longest=100), Layout(256, 4, 8, True)
    for is_shuffled in (True, False):
        plan = plan_of(found, layout, seed=3, shuffle=is_shuffled)
        for epoch in range(3):
            plan.rows(epoch)
    assert len(set(seeds[:3])) == 3 and None not in seeds[:3] and seeds[3:] == [None] * 3


def test_a_place_is_walked_to_over_epochs():
    plan = plan_of(some_lengths(), Layout(2048, 4, 8, True))
    sizes = [len(plan.rows(epoch)) for epoch in range(4)]
    everything = [(epoch, tuple(records)) for epoch, records in plan.take(0, 0, sum(sizes))]
    for start in (0, 1, sizes[0] - 1, sizes[0], sizes[0] + 1, sum(sizes[:3])):
        place = plan.walk(0, 0, start)
        assert [(e, tuple(r)) for e, r in plan.take(*place, 5)] == everything[start:start + 5]
    assert plan.walk(0, 0, sum(sizes[:2]) + 3, last_epoch=1) == (2, 0) and not list(plan.take(2, 0, 3, last_epoch=1))
    assert len(list(plan.take(1, sizes[1] - 2, 9, last_epoch=1))) == 2
    assert plan.num_updates(3) == sum(size // 8 for size in sizes[:3])


def test_a_long_epoch_is_packed_in_windows_when_their_rows_are_needed(monkeypatch, tmp_path):
    """Every sample once, at places that do not depend on where a run begins; only the windows before a place are planned."""
    found, layout = some_lengths(), Layout(2048, 4, 8, True)
    found.tokens[:30] = 0
    whole = plan_of(found, layout)
    monkeypatch.setattr(packing, "WINDOW", 64)
    plan, planned = plan_of(found, layout), []
    assert plan.windows == 4 and plan.fingerprint() != whole.fingerprint()
    monkeypatch.setattr(packing, "pack", lambda tokens, *given, real=packing.pack: planned.append(len(tokens)) or real(tokens, *given))
    first = list(plan.take(0, 0, 3))
    assert len(planned) == 1 and planned[0] <= 64
    rows = [plan.rows(epoch) for epoch in range(3)]
    for each in rows:
        assert sorted(each.records) == list(range(30, 200)) and all(found.tokens[each[i]].sum() <= 2048 for i in range(len(each)))
    order = plan.stream.order(0)
    assert {*rows[0].records[:len(plan.window(0, 0).records)].tolist()} == {*order[:64].tolist()} - {*range(30)}
    sizes = [len(each) for each in rows]
    everything = [(epoch, tuple(each[i])) for epoch, each in enumerate(rows) for i in range(len(each))]
    assert [(e, tuple(r)) for e, r in first] == everything[:3]
    for start in (0, 1, sizes[0] - 1, sizes[0], sum(sizes[:2]) - 1, sum(sizes[:2])):
        fresh = plan_of(found, layout)  # a run that goes on here
        assert [(e, tuple(r)) for e, r in fresh.take(*fresh.walk(0, 0, start), 3)] == everything[start:start + 3]
    assert plan.walk(0, 0, sum(sizes[:2]) + 3, last_epoch=1) == (2, 0)
    assert abs(plan.num_updates(3) - sum(size // 8 for size in sizes)) <= 3 and abs(plan.expected_rows(0) - sizes[0]) < 0.15 * sizes[0]
    assert len({tuple(plan.window(0, window).records) for window in range(4)}) == 4
    monkeypatch.setattr(packing, "LARGE", 1)
    kept = Plan(plan.stream, found, layout, tmp_path)
    assert kept.rows(1).records.tolist() == rows[1].records.tolist() and len(list(tmp_path.iterdir())) == 4
    planned.clear()
    assert Plan(plan.stream, found, layout, tmp_path).rows(1).ends.tolist() == rows[1].ends.tolist() and not planned


def test_fewer_rows_than_an_update_has_still_make_one():
    plan = plan_of(some_lengths(5), Layout(2048, 4, 64, True))
    assert plan.num_updates(3) == 3


def test_a_plan_is_named_by_all_that_it_follows_from():
    layout, longer, others = Layout(2048, 4, 8, True), some_lengths(), some_lengths()
    longer.tokens[7] += 1
    others.images[7] += 1
    plans = [plan_of(some_lengths(), layout), plan_of(longer, layout), plan_of(others, layout), plan_of(some_lengths(), layout, seed=1),
             plan_of(some_lengths(), Layout(2048, 5, 8, True)), plan_of(some_lengths(), Layout(4096, 4, 8, True))]
    assert len({plan.fingerprint() for plan in plans}) == 6
    assert plans[0].fingerprint() == plan_of(some_lengths(), Layout(2048, 4, 16, True)).fingerprint()  # rows an update cut nothing else


def test_a_plan_of_nothing_is_refused():
    nothing = Lengths(np.zeros(2, np.int32), np.zeros(2, np.int16), [{"id": 0, "reason": "record 0 is torn"}], 0, 0, 0)
    with pytest.raises(UserError, match="none of the 2 samples can be used; the first: record 0 is torn"):
        plan_of(nothing, Layout(64, 0, 1, False))


def test_rows_of_a_large_epoch_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGE", 100)
    found, layout = some_lengths(), Layout(2048, 4, 8, True)
    first = Plan(Stream((200,), (200,), 0, True), found, layout, tmp_path).rows(1)
    monkeypatch.setattr(packing, "pack", None)  # is not called again
    again = Plan(Stream((200,), (200,), 0, True), found, layout, tmp_path).rows(1)
    assert np.array_equal(first.records, again.records) and np.array_equal(first.ends, again.ends)
    with pytest.raises(TypeError):
        Plan(Stream((200,), (200,), 1, True), found, layout, tmp_path).rows(1)
    file, = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(TypeError):  # what was damaged is packed anew
        Plan(Stream((200,), (200,), 0, True), found, layout, tmp_path).rows(1)


def test_packing_leaves_little_empty():
    """On lengths like those of instruction data, 576 of them an image's: about a tenth, and about a thirtieth (decision 5)."""
    rng = np.random.default_rng(0)
    tokens = 576 + rng.lognormal(np.log(450), 0.6, 2000).clip(10, 1400).astype(int)
    images = np.ones(2000, int)
    empty = {length: 1 - tokens.sum() / (length * len(pack(tokens, images, length, slots, 0))) for length, slots in ((2048, 3), (8192, 12))}
    assert empty[2048] < 0.12 and empty[8192] < 0.04


# ---- decision 5 ----


@pytest.mark.parametrize("devices, micro_batches, row_length, rows", [
    (1, 1, 8192, 11), (8, 1, 2048, 40), (64, 1, 1408, 64), (1, 4, 4096, 20), (8, 2, 5504, 16), (64, 8, 176, 512)])
def test_128_samples_of_680_tokens(devices, micro_batches, row_length, rows):
    found = rows_an_update(128, 680, devices, micro_batches)
    assert (found.row_length, found.rows, found.micro_batches) == (row_length, rows, micro_batches)
    assert found.samples == pytest.approx(rows * row_length / 680) and found.is_close and abs(found.samples - 128) <= 12.8


@pytest.mark.parametrize("devices, row_length, rows, parts", [(1, 8192, 17, 17), (2, 8192, 16, 4), (8, 8192, 16, 1), (64, 2048, 64, 1)])
def test_the_number_of_micro_batches_follows_from_the_positions_at_a_time(devices, row_length, rows, parts):
    found = rows_an_update(128, 1080, devices, sizes.AUTO, longest=2048)
    assert (found.row_length, found.rows, found.micro_batches) == (row_length, rows, parts) and found.is_close
    assert rows % (devices * parts) == 0


@pytest.mark.parametrize("rows, row_length, parts", [(1, 8192, 1), (2, 8192, 1), (3, 8192, 3), (4, 8192, 2), (5, 8192, 5), (6, 4096, 2),
                                                     (1, 32768, 1), (2, 32768, 2), (40, 16, 1)])
def test_parts_of_a_devices_rows(rows, row_length, parts):
    assert sizes.parts_of(rows, row_length) == parts


def test_a_length_of_its_own_makes_the_batch_where_the_usual_ones_do_not():
    """Sixty-four questions of 620 tokens on eight devices: rows of 2,048, 4,096 and 8,192 make 53 or 106 of them."""
    found = rows_an_update(64, 620, 8, sizes.AUTO, longest=2048)
    assert (found.row_length, found.rows, found.micro_batches) == (4992, 8, 1) and found.samples == pytest.approx(64, rel=0.01)


def test_128_samples_of_1080_tokens_on_64_devices_fit_and_on_256_do_not():
    assert rows_an_update(128, 1080, 64, longest=2048) == sizes.Update(2048, 64, 1, 64 * 2048 / 1080, True)
    large = rows_an_update(128, 1080, 256, longest=2048)
    assert (large.row_length, large.rows, large.is_close) == (2048, 256, False) and round(large.samples) == 485


def test_a_row_length_that_is_given_is_kept_and_holds_the_longest_sample():
    found = rows_an_update(128, 680, 8, row_length=4096)
    assert (found.rows, found.row_length, found.is_close) == (24, 4096, False) and round(found.samples) == 145
    with pytest.raises(UsageError, match="'data.row_length' is 512, but the longest sample has 700 tokens"):
        rows_an_update(128, 680, 8, row_length=512, longest=700)
    assert rows_an_update(1, 2500, 64, longest=4000).row_length == 4096
    assert rows_an_update(1, 9000, 64, longest=9001).row_length == 9088


# ---- image slots ----


def test_image_slots_weigh_the_towers_work_against_empty_positions():
    rng = np.random.default_rng(0)
    tokens = 576 + rng.integers(20, 200, 250)
    found = Lengths(tokens.astype(np.int32), np.ones(250, np.int16), [], 0, 0, 0)
    stream = Stream((250,), (250,), 0, True)
    cheap, dear = (Trial(stream, found, cost).image_slots(8192) for cost in (1, 3000))
    rows = functools.cache(lambda slots: len(pack(tokens[stream.order(0)], found.images, 8192, slots)))
    work = lambda slots, cost: rows(slots) * (8192 + slots * cost)
    assert dear < cheap <= 8192 // 596
    assert work(cheap, 1) <= min(work(slots, 1) for slots in (dear, cheap - 1, cheap + 2))
    assert work(dear, 3000) <= min(work(slots, 3000) for slots in (cheap, cheap + 2))


def test_image_slots_hold_the_sample_with_the_most_images():
    found = some_lengths(mean_images=0.1)
    found.images[7] = 9
    assert Trial(Stream((200,), (200,), 0, True), found, 1.0).image_slots(2048) >= 9
    found.images[:] = 0
    assert Trial(Stream((200,), (200,), 0, True), found, 1.0).image_slots(2048) == 0
