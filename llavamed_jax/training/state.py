"""The state that a training step carries from one update to the next.

Parameters are a flat dict by name (`decoder/layers/mlp/up_proj/kernel`; the layers of a stack are one array), split in
two: those that the recipe trains, and the others. Gradient, optimizer, clipping and checkpoint see only the first part.

Axis letters: V vocabulary, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from llavamed_jax.checkpoints.soundness import Tally
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import is_derived
from llavamed_jax.errors import UsageError
from llavamed_jax.models import llava
from llavamed_jax.parallel.mesh import param_shardings, put, replicated
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.training import layers
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training.recipe import TABLE

FlatParams = dict[str, jax.Array]
Trainable = Sequence[str | tuple[str, Sequence[str]]]  # a recipe's `trainable`


@flax.struct.dataclass
class TrainState:
    """The state of training, a pytree.

    The random numbers of a step, which only an adapter's dropout uses, follow from the recipe's seed and `step`; the
    order of the data follows from the seed and the data position.

    Attributes:
      step: int32 [], batches seen.
      skipped: int32 [], batches among them with a loss or gradient that was not finite, which moved nothing (`step`).
      trainable: float32 parameters by name.
      frozen: all other parameters by name, in the dtype of the computation, or kernels of few bits.
      opt_state: the optimizer's state for `trainable`.
    """

    step: jax.Array
    skipped: jax.Array
    trainable: FlatParams
    frozen: FlatParams
    opt_state: Any

    @property
    def params(self) -> dict:
        """All parameters as the nested tree that the model takes."""
        return merge(self.trainable, self.frozen)


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
    """Merges trainable and frozen parameters by name into the nested tree that the model takes."""
    return unflatten_dict({**trainable, **frozen}, sep="/")


def partition(params: Mapping[str, Any], trainable: Trainable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a parameter tree by the recipe's `trainable`.

    Args:
      params: nested or flat; layers stacked.
      trainable: regexes; a parameter is trained if one of them matches its whole name, or that of one of its layers
        (`training.layers`). A pair of `TABLE` and tokens stands for the table, and only the rows of those tokens are
        trained (`only_rows`).

    Returns:
      (trainable, frozen), flat dicts by name.

    Raises:
      UsageError: a regex is invalid, or matches no parameter, so that a typo cannot silently freeze a module.
    """
    flat = flatten_dict(params, sep="/")
    chosen, sizes = set(), layers.depths({name: x for name, x in flat.items() if not is_derived(name)})
    for entry in trainable:
        regex = entry if isinstance(entry, str) else entry[0]
        try:
            matches = {name for name, depth in sizes.items() if layers.matched(regex, name, depth).any()}
        except re.error as error:
            raise UsageError(f"the config key 'trainable' has {regex!r}, which is not a valid regular expression: "
                             f"{error}") from None
        if not matches:
            parts = sorted({f"{name.split('/')[0]}/.*" for name in flat})
            raise UsageError(f"the config key 'trainable' has {regex!r}, which matches no parameter; "
                             f"a regular expression over whole names was expected, such as {' or '.join(parts)}")
        chosen |= matches
    return {n: x for n, x in flat.items() if n in chosen}, {n: x for n, x in flat.items() if n not in chosen}


def tokens_of(trainable: Trainable) -> list[str]:
    """Returns the tokens of `TABLE` with trained rows; [] if the recipe trains the whole table, or no row."""
    is_whole = any(isinstance(entry, str) and re.fullmatch(entry, TABLE) for entry in trainable)
    return [] if is_whole else [token for entry in trainable if not isinstance(entry, str) for token in entry[1]]


def only_rows(loss_fn: Callable, rows: Sequence[int]) -> Callable:
    """Returns the same loss with a gradient in `TABLE` that is zero outside `rows`.

    The mask is in the loss and not in the optimizer, so that the gradient's norm, clipping and moments exclude the
    other rows too. With a gradient of zero Adam moves nothing: the other rows keep their bits.

    Args:
      loss_fn: the loss of nested parameters and a batch.
      rows: the trained rows of the table [V,D].
    """
    def loss(params, batch):
        flat = flatten_dict(params, sep="/")
        table = flat[TABLE]
        is_trained = jnp.isin(jnp.arange(table.shape[0]), jnp.array(rows))[:, None]
        flat[TABLE] = jnp.where(is_trained, table, jax.lax.stop_gradient(table))
        return loss_fn(unflatten_dict(flat, sep="/"), batch)
    return loss


def state_shardings(cfg: LlavaConfig, params: Mapping[str, Any], trainable: Trainable,
                    optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the sharding of each leaf of the state; a moment has the sharding of its parameter.

    Args:
      cfg: the model's config.
      params: the parameter tree, arrays or shapes, with stacked layers.
      trainable: the recipe's `trainable`.
      optimizer: the optimizer of the trainable parameters.
      mesh: the mesh of devices.
    """
    shardings = flatten_dict(param_shardings(params, llava.param_axes(cfg), mesh), sep="/")
    trained, frozen = partition(params, trainable)
    everywhere = replicated(mesh)
    trained_shardings = {name: shardings[name] for name in trained}
    abstract = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in trained.items()}
    return TrainState(everywhere, everywhere, trained_shardings, {name: shardings[name] for name in frozen},
                      optimizers.state_shardings(optimizer, abstract, trained_shardings, everywhere))


def place(params: Mapping[str, Any], where: Mapping[str, NamedSharding], dtype: Any) -> FlatParams:
    """Places the parameters that `where` names on the devices, in buffers of their own, since a state is donated.

    Args:
      params: a nested or flat tree.
      where: the sharding of each parameter by name.
      dtype: the dtype of the placed arrays.

    Raises:
      UserError: `dtype` cannot hold a value; values that become 0 are only a warning.
    """
    flat = flatten_dict(params, sep="/")
    tally = Tally()

    def own(name: str) -> np.ndarray | Kernel:
        if isinstance(flat[name], Kernel):
            return jax.tree.map(np.array, flat[name])
        array = np.asarray(flat[name])
        out = tally.cast(name, array, dtype_of(name, dtype))
        return out.copy() if out is array else out

    placed = {name: jax.tree.map(put, own(name), sharding) for name, sharding in where.items()}
    tally.warn()
    return placed


def shapes_of(frozen: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Returns frozen parameters by name as shapes in the dtypes that a state has."""
    def leaf(name, x):
        if isinstance(x, Kernel):
            return jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype), x)
        return jax.ShapeDtypeStruct(x.shape, dtype_of(name, dtype))
    return {name: leaf(name, x) for name, x in frozen.items()}


def dtype_of(name: str, dtype: Any) -> Any:
    """Returns the dtype of a frozen parameter: `dtype`, but float32 for the scale of an adapter."""
    return jnp.float32 if is_derived(name) else dtype


def create(params: Mapping[str, Any], shardings: TrainState, optimizer: optax.GradientTransformation,
           dtype: Any) -> TrainState:
    """Returns the state before the first update.

    Args:
      params: nested tree with stacked layers; numpy or jax arrays of any float type.
      shardings: the sharding of each leaf of the state (`state_shardings`).
      optimizer: the optimizer of the trainable parameters (`optimizer.build`).
      dtype: dtype of the computation and of frozen parameters; trained parameters are float32.
    """
    placed = place(params, shardings.trainable, jnp.float32)
    return TrainState(
        step=put(np.int32(0), shardings.step), skipped=put(np.int32(0), shardings.skipped),
        trainable=placed, frozen=place(params, shardings.frozen, dtype),
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(placed))
