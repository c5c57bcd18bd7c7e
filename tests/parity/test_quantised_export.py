"""An export of few bits in compressed-tensors and transformers: the same kernels in bits, the same logits."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from llavamed_jax.checkpoints.load import load_params  # noqa: E402
from llavamed_jax.checkpoints.open import open_checkpoint  # noqa: E402
from llavamed_jax.config import IMAGE_TOKEN  # noqa: E402
from llavamed_jax.models import llava  # noqa: E402
from llavamed_jax.quantized.rounding import ROUNDED  # noqa: E402
from tests.checkpoints.test_quantised_export import exported  # noqa: E402
from tests.support import hf  # noqa: E402


@pytest.mark.parametrize("how, tied", [("int4", False), ("int8", True)])
def test_transformers_computes_with_the_same_kernels(how, tied, tmp_path):
    checkpoint, _, out = exported(tmp_path / "hf", how, tie_word_embeddings=tied)
    cfg = checkpoint.config
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    assert not any(info.values()), info
    ids = np.array([[1, 5] + [IMAGE_TOKEN] * cfg.tokens_per_image + [7, 9, 69, 2]], np.int32)
    pixels = hf.images(1)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(np.where(ids == IMAGE_TOKEN, model.config.image_token_index, ids)),
                              pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
    rounded = load_params(open_checkpoint(out), as_stored=True)
    ours = np.asarray(jax.jit(llava.Llava(cfg).apply)({"params": rounded}, ids, pixels[None]))
    assert 0.3 < ours.std() < 3
    np.testing.assert_allclose(theirs[..., :70], ours, atol=2e-5, rtol=0)
    quantised = 0
    for name, module in model.named_modules():  # decompressed on the first forward pass
        if hasattr(module, "quantization_scheme"):
            quantised += 1
            place = name.replace("model.language_model.layers.", "decoder/layers_").replace(".", "/") + "/kernel"
            weight = module.weight.detach().numpy().T
            assert np.array_equal(weight, open_checkpoint(out).read(place)), name
            assert np.abs(weight - checkpoint.read(place)).max() > (1e-3 if how == "int4" else 1e-4)
    assert quantised == 14


@pytest.mark.parametrize("how", ["int4", "int8"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_compressed_tensors_decompresses_the_same_bits(how, dtype, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    _, written, out = exported(tmp_path / "hf", how, dtype)
    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    tensors, again, number = load_file(out / "model.safetensors"), open_checkpoint(out), 0
    for key in [key for key in written if key.endswith("weight_packed")]:
        start = key.removesuffix("weight_packed")
        state = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
        theirs = compressor.decompress(state, scheme)["weight"]
        place = start.replace("language_model.model.layers.", "decoder/layers_").replace(".", "/") + "kernel"
        assert ROUNDED.fullmatch(place)
        ours = again.read(place).T
        assert np.array_equal(theirs.float().numpy(), ours.astype(np.float32)) and str(theirs.dtype) == f"torch.{ours.dtype.name}", key
        number += 1
    assert number == 14


def test_our_packing_is_compressed_tensors_own(tmp_path):
    """Its compressor makes the same words of our values, zeros and shape."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from llavamed_jax.quantized import packing
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        for shape in ((3, 5), (8, 64), (13, 40)):
            values = rng.integers(-2**(bits - 1), 2**(bits - 1), shape).astype(np.int8)
            for axis in (0, 1):
                theirs = pack_to_int32(torch.from_numpy(values), bits, packed_dim=axis).numpy()
                ours = packing.pack(values, bits) if axis else packing.pack(values.T, bits).T
                assert np.array_equal(ours, theirs), (bits, shape, axis)
