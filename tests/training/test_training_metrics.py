"""What an update costs, what a batch holds, and what the log shows of it."""

import json
import math

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tensorboardX.proto.event_pb2 import Event

from llavamed_jax.config import preset
from llavamed_jax.models.llava import abstract_params
from llavamed_jax.training import throughput
from llavamed_jax.training.log import MetricsWriter, Sample

CFG = preset("llava15-7b")
SIZES = {n: math.prod(x.shape) for n, x in flatten_dict(abstract_params(CFG, scan=True), sep="/").items()}
N = CFG.decoder.matmul_parameters
HEAD = CFG.decoder.hidden_size * CFG.decoder.vocab_size
TOKENS, ATTENDED = 6000, 10 * 600 * 601 // 2  # ten samples of 600 tokens
ATTENTION = 4 * 32 * 4096 * ATTENDED  # forward: two products of 2 D FLOPs a pair and layer


def sizes(*prefixes):
    return {name: size for name, size in SIZES.items() if name.startswith(prefixes)}


@pytest.mark.parametrize("trained, matmuls, attention", [
    (("projector/", "decoder/"), 6 * N, 3), (("projector/",), 4 * N, 3),
    (("decoder/lm_head/",), 2 * N + 2 * HEAD, 1), (("decoder/norm/",), 2 * N + 2 * HEAD, 1),
    (("decoder/norm/", "decoder/lm_head/"), 2 * N + 4 * HEAD, 1),
])
def test_flops_follow_what_is_trained(trained, matmuls, attention):
    """6 N a token where the decoder is trained, 4 N where gradients only pass through it, 2 N below what is trained."""
    flops = throughput.training_flops(CFG, sizes(*trained), TOKENS, ATTENDED, images=0)
    assert flops == pytest.approx(TOKENS * matmuls + attention * ATTENTION, rel=1e-12)


def test_the_tower_costs_its_forward_pass_and_thrice_that_where_it_is_trained():
    image = lambda *trained: (throughput.training_flops(CFG, sizes(*trained), TOKENS, ATTENDED, images=10)
                              - throughput.training_flops(CFG, sizes(*trained), TOKENS, ATTENDED, images=0))
    assert image("projector/") == pytest.approx(10 * CFG.vision_flops_per_image())
    assert image("projector/", "vision_tower/") == pytest.approx(30 * CFG.vision_flops_per_image())


def test_the_convention_gives_the_published_flops():
    """Billions of FLOPs a token of Mistral-7B and Vicuna-7B, trained whole on rows of 2,048: 44.3 and 41.3."""
    for name, billions in (("v15-7b", 44.3), ("llava15-7b", 41.3)):
        cfg = preset(name)
        whole = {n: math.prod(x.shape) for n, x in flatten_dict(abstract_params(cfg, scan=True), sep="/").items() if n[0] != "v"}
        flops = throughput.training_flops(cfg, whole, 2048, 2048 * 2049 // 2, images=0) / 2048
        assert flops / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("kind, peak", [
    ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
    ("cpu", None), ("NVIDIA H200 NVL MIG 1g.18gb", None), ("NVIDIA A10", None), ("TPU v5 super", None), ("", None),
])
def test_peak_is_looked_up_by_the_strings_that_devices_have(kind, peak):
    assert throughput.peak_flops(kind) == peak


def test_batches_are_counted_by_segments():
    batch = dict(segment_ids=np.array([[1, 1, 2, 0], [1, 1, 1, 0], [0, 0, 0, 0]]), num_images=np.array([2, 0, 0]),
                 positions=np.array([[0, 1, 0, 0], [0, 1, 2, 0], [0, 0, 0, 0]]), pixel_values=np.zeros((3, 2, 4, 4, 3)))
    assert throughput.batch_counts(batch) == dict(samples=3, tokens=6, positions=12, attended=3 + 1 + 6, images=2, image_slots=6)
    assert throughput.batch_counts(batch, window=2)["attended"] == 3 + 1 + 5
    text = {key: batch[key] for key in ("segment_ids", "positions")}
    assert throughput.batch_counts(text)["image_slots"] == 0
    empty = {key: np.zeros_like(value) for key, value in text.items()}
    assert throughput.batch_counts(empty)["attended"] == throughput.batch_counts(empty)["samples"] == 0


def events(folder):
    """The events of a TensorBoard file: frames of an 8-byte length, 4 bytes of checksum, the content, 4 bytes of checksum."""
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at:at + 8], "little")
            yield Event.FromString(data[at + 12:at + 12 + length])
            at += 16 + length


def test_the_log_holds_numbers_text_and_pictures(tmp_path, capsys):
    log = MetricsWriter(tmp_path, 0, 9, "stage")
    log.write(3, dict(loss=1.5, grad_norm=math.inf, mfu=None))
    log.samples(3, [Sample("q7", np.full((2, 8, 8, 3), 200, np.uint8), "Is it\nlarge?", "no", "yes")])
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == dict(step=3, loss=1.5, grad_norm=None, mfu=None)
    said = capsys.readouterr().out
    assert "stage 3/9 · loss 1.5000" in said and "q7 · Is it large? -> no (wanted: yes)" in said
    values = {value.tag: (event.step, value) for event in events(tmp_path / "tensorboard") for value in event.summary.value}
    assert values["loss"][0] == 3 and values["loss"][1].simple_value == 1.5 and "mfu" not in values and "grad_norm" not in values
    text = values["samples/0/text_summary"][1].tensor.string_val[0].decode()
    assert all(part in text for part in ("Is it", "no", "yes"))
    for tag in ("samples/0/image_0", "samples/0/image_1"):
        step, value = values[tag]
        assert (step, value.image.height, value.image.width) == (3, 8, 8) and value.image.encoded_image_string.startswith(b"\x89PNG")
