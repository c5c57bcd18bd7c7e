"""Random parameters of a model as arrays of numpy, as a file gives them: nothing is compiled."""

import zlib

import jax
import numpy as np

from llavamed_jax.models.llava import abstract_params


def random_params(cfg, seed=0):
    """Kernels with standard deviation fan_in^-1/2, norms' scales 1, biases 0, in float32."""
    def leaf(path, x):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(x.shape, name == "scale", np.float32)
        fan_in = x.shape[-1] if name in ("embedding", "class_embedding") else x.shape[-2]
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        return rng.standard_normal(x.shape, np.float32) * np.float32(fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(cfg, scan=False))
