"""nf4 beside bitsandbytes' CPU build, where it is installed (`pip install --no-deps bitsandbytes`): codes, absmax, values."""

import numpy as np
import pytest

from llavamed_jax.quantized import kernels, rounding

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
torch = pytest.importorskip("torch")


@pytest.mark.torch
@pytest.mark.parametrize("D, F", [(256, 48), (1536, 576), (64, 3)])
def test_codes_and_absmax_are_bitsandbytes(D, F):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((D, F), np.float32) * np.exp(rng.standard_normal(F, np.float32))
    kernel[:64, 1] = 0
    packed, state = functional.quantize_4bit(torch.tensor(np.ascontiguousarray(kernel.T)), blocksize=64, quant_type="nf4",
                                             compress_statistics=False)
    ours, pairs = rounding.nf4(kernel), packed.numpy().reshape(-1)
    np.testing.assert_array_equal(state.code.numpy(), kernels.NF4)
    np.testing.assert_array_equal(np.stack([pairs >> 4, pairs & 15], 1).reshape(F, D), np.asarray(ours.codes).astype(int).T)
    np.testing.assert_array_equal(state.absmax.numpy(), ours.absmax.T.reshape(-1))
    np.testing.assert_array_equal(functional.dequantize_4bit(packed, state).numpy().T, np.asarray(ours.widened(np.float32)))
