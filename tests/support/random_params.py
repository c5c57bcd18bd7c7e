"""Random parameters of a model as arrays of numpy, as a file gives them: nothing is compiled."""

from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.random import random_checkpoint


def random_params(cfg, seed=0):
    """Those of `random_checkpoint`."""
    return load_params(random_checkpoint(cfg, seed))
