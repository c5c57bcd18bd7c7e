"""Builds the program of a run: its model, optimizer and mesh, and the sharding of each part of the state."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import FACTOR_A
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.models import llava
from llavamed_jax.models.attention.backend import backend_of
from llavamed_jax.models.stacking import stack, unstack
from llavamed_jax.parallel.mesh import auto_sizes, device_memory, make_mesh
from llavamed_jax.processor import Processor
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.quantized.rounding import with_shapes
from llavamed_jax.training import factors, fp8, layers, void_keys
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training import state as states
from llavamed_jax.training.state import TrainState
from llavamed_jax.training.step import LossFn, llava_loss


@dataclass(frozen=True)
class Program:
    """A run's model, optimizer, mesh and shardings.

    Attributes:
      model: the model, with scanned layers.
      mesh: the mesh of devices.
      optimizer: the optax transformation of the trained parameters.
      schedule: the learning rate by update.
      shardings: the sharding of each leaf of the state.
      trainable: the recipe's `trainable`, without tokens that the model lacks.
      rows: the trained rows of `states.TABLE`; empty if the whole table is trained, or no row.
      weighting: the recipe's `loss_weighting`.
      dropout_seed: seed of an adapter's dropout; None for a model without dropout.
      quantize: the recipe's `quantize`: how the frozen kernels of the decoder's layers are rounded.
      is_fp8: whether the decoder's layers multiply in FP8 (`fp8`).
    """

    model: llava.Llava
    mesh: Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    shardings: TrainState
    trainable: states.Trainable
    rows: tuple[int, ...]
    weighting: str = "token"
    dropout_seed: int | None = None
    quantize: str | None = None
    is_fp8: bool = False

    @classmethod
    def build(cls, cfg: ConfigDict, checkpoint: Checkpoint, mesh: Mesh, total_steps: int) -> "Program":
        """Builds the program of a recipe for a checkpoint on a mesh.

        Args:
          cfg: the recipe.
          checkpoint: the checkpoint that the run starts from, or the run's own base.
          mesh: the mesh of devices.
          total_steps: updates of the run.

        Raises:
          UsageError: `trainable` or `optimizer.overrides` match no parameter, or name tokens that the model lacks;
            kernels are trained beside their factors, or fresh factors are not trained.
        """
        return cls.of(cfg, checkpoint.config, mesh, total_steps, *_settled(cfg, checkpoint))

    @classmethod
    def of(cls, cfg: ConfigDict, config: LlavaConfig, mesh: Mesh, total_steps: int, trainable: states.Trainable,
           rows: tuple[int, ...] = ()) -> "Program":
        """Builds the program from a model's shapes alone; the mesh's devices need not exist on this machine.

        Args:
          cfg: the recipe.
          config: the model's shapes.
          mesh: the mesh of devices.
          total_steps: updates of the run.
          trainable: the recipe's `trainable`, without tokens that the model lacks.
          rows: the embedding rows of the tokens in `trainable`.
        """
        llava.check_heads(config, mesh)
        platform = mesh.devices.flat[0].platform
        abstract = with_shapes(flatten_dict(llava.abstract_params(config, scan=True), sep="/"), cfg.quantize)
        if "decoder/lm_head" + FACTOR_A in abstract:
            raise UserError("the model's adapter has factors of decoder/lm_head, which training cannot compute with: "
                            "the loss reads the head's kernel; `convert merge-lora` merges the adapter first")
        trained = states.partition(abstract, trainable)[0]
        rounded = next((name for name, x in trained.items() if isinstance(x, Kernel)), None)
        if rounded is not None:
            raise UsageError(f"the config key 'quantize' is {cfg.quantize!r}, and 'trainable' names {rounded}, which "
                             "is rounded and cannot be trained; factors beside it (lora.rank) were expected")
        sizes, partly = layers.depths(trained), _partly_trained(trainable, trained)
        factors.check(abstract, trained, partly, are_fresh=cfg.lora.rank > 0)
        optimizer, schedule = optimizers.build(cfg.optimizer, total_steps, list(trained),
                                               [states.TABLE] if rows else [], sizes, partly)
        shardings = states.state_shardings(config, abstract, trainable, optimizer, mesh)
        backend = backend_of(cfg.attention, platform, config.decoder.head_dim)
        model = llava.Llava(config, dtype_of(cfg, platform), scan=True, remat=cfg.remat, attention=backend)
        if cfg.compute == "fp8":
            fp8.check(abstract, trained, mesh.devices.flat[0])
            model = fp8.multiplied(model)
        seed = cfg.seed if config.adapter is not None and config.adapter.dropout else None
        return cls(model, mesh, optimizer, schedule, shardings, trainable, rows, cfg.loss_weighting, seed, cfg.quantize,
                   cfg.compute == "fp8")

    def initial_state(self, checkpoint: Checkpoint) -> TrainState:
        """Returns the state before the first update, with the checkpoint's parameters."""
        params = load_params(checkpoint, scan=True, quantize=self.quantize)
        return states.create(params, self.shardings, self.optimizer, self.model.dtype)

    def frozen(self, checkpoint: Checkpoint) -> states.FlatParams:
        """Returns the frozen parameters, sharded as in a state; the checkpoint may lack all others."""
        names = set(unstack({name: self._abstract[name] for name in self.shardings.frozen}))
        params = load_params(checkpoint, scan=True, only=names, quantize=self.quantize)
        return states.place(params, self.shardings.frozen, self.model.dtype)

    def loss(self) -> LossFn:
        """Returns the loss to minimise, whose gradient covers only the trained rows of the embedding and layers."""
        loss_fn = llava_loss(self.model, self.weighting)
        loss_fn = states.only_rows(loss_fn, self.rows) if self.rows else loss_fn
        return layers.only_layers(loss_fn, self.partly_trained) if self.partly_trained else loss_fn

    def void(self, cfg: ConfigDict) -> list[str]:
        """Returns a sentence for each key of the recipe's `optimizer` that is not used (`void_keys.of_optimizer`)."""
        trained = {name: self._abstract[name] for name in self.shardings.trainable}
        return void_keys.of_optimizer(cfg, list(trained), [states.TABLE] if self.rows else [], layers.depths(trained),
                                      self.partly_trained)

    def abstract_state(self) -> TrainState:
        """Returns the state as shapes with shardings."""
        trained, frozen = ({name: self._abstract[name] for name in part}
                           for part in (self.shardings.trainable, self.shardings.frozen))
        frozen = states.shapes_of(frozen, self.model.dtype)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(number, number, trained, frozen, jax.eval_shape(self.optimizer.init, trained))
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state,
                            self.shardings)

    def state_bytes(self) -> int:
        """Returns the bytes of parameters and optimizer on each device."""
        state = self.abstract_state()
        return bytes_a_device((state.trainable, state.frozen, state.opt_state))

    def describe(self) -> str:
        """Says how many parameters are trained (below a million, exactly), the mesh, and how many devices it uses."""
        counts = sum(self.trained_sizes().values()), sum(math.prod(x.shape) for x in self._abstract.values())
        trained, everything = (f"{n / 1e6:,.2f} M" if n >= 1e6 else f"{n:,}" for n in counts)
        devices = jax.device_count()
        part = f" on the first {self.mesh.size} of {devices} devices" if self.mesh.size < devices else ""
        return f"{trained} of {everything} parameters trained, mesh {dict(self.mesh.shape)}{part}"

    def trained_sizes(self) -> dict[str, int]:
        """Returns how many values of each trained parameter are trained: fewer than it has for rows and layers."""
        sizes = {name: math.prod(self._abstract[name].shape) for name in self.shardings.trainable}
        if self.rows:
            sizes[states.TABLE] = len(self.rows) * self.model.cfg.decoder.hidden_size
        for name, is_trained in self.partly_trained.items():
            sizes[name] = sizes[name] // len(is_trained) * int(is_trained.sum())
        return sizes

    def trained_names(self) -> list[str]:
        """Returns the names of the trained parameters on disk, one a layer."""
        return list(unstack({name: self._abstract[name] for name in self.shardings.trainable}))

    @functools.cached_property
    def partly_trained(self) -> dict[str, np.ndarray]:
        """By name, which layers of a stack are trained (`layers.partly_trained`)."""
        return _partly_trained(self.trainable, {name: self._abstract[name] for name in self.shardings.trainable})

    @functools.cached_property
    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        return with_shapes(flatten_dict(llava.abstract_params(self.model.cfg, scan=True), sep="/"), self.quantize)


def _partly_trained(trainable: states.Trainable, trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
    regexes = [entry for entry in trainable if isinstance(entry, str)]
    return layers.partly_trained(regexes, layers.depths(trained))


def dtype_of(cfg: ConfigDict, platform: str) -> Any:
    """Returns the dtype of the computation: the recipe's `compute`, and for fp8 that of all but the FP8 products.

    Args:
      cfg: the recipe.
      platform: the devices' platform; if the recipe leaves `compute` open, a CPU computes in float32.
    """
    is_wide = platform == "cpu" if cfg.compute is None else cfg.compute == "float32"
    return jnp.float32 if is_wide else jnp.bfloat16


def bytes_a_device(arrays: Any) -> int:
    """Returns the bytes that a tree of shapes with shardings takes on each device."""
    return sum(-(-math.prod(x.sharding.shard_shape(x.shape)) * _bits(x.dtype) // 8) for x in jax.tree.leaves(arrays))


def _bits(dtype: np.dtype) -> int:
    """Returns the bits of a value on a device; numpy holds values of 4 bits in bytes."""
    return 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize


def _settled(cfg: ConfigDict, checkpoint: Checkpoint) -> tuple[states.Trainable, tuple[int, ...]]:
    """Returns the recipe's `trainable` for this model, and the embedding rows of the tokens in it.

    A model without start and end tokens about its images has no such rows; that part of `trainable` is then dropped
    with a printed line.
    """
    tokens = states.tokens_of(cfg.trainable)
    if not tokens:
        return tuple(cfg.trainable), ()
    processor = Processor.from_checkpoint(checkpoint, tokenizer=cfg.tokenizer, template=cfg.template)
    rows = {token: processor.id_of(token) for token in tokens}
    absent = [token for token, row in rows.items() if row is None or row >= checkpoint.config.decoder.vocab_size]
    if absent and checkpoint.config.use_start_end:
        raise UsageError(f"the config key 'trainable' names the tokens {', '.join(absent)}, which the model's "
                         "tokenizer lacks")
    rest = tuple(entry for entry in cfg.trainable if isinstance(entry, str))
    if absent and not rest:
        raise UsageError(f"the config key 'trainable' names only the tokens {', '.join(absent)}, and this model has "
                         "none of them")
    if absent:
        print(f"trainable: this model has no {', '.join(absent)}, so no row of the embedding is trained", flush=True)
        return rest, ()
    return tuple(cfg.trainable), tuple(rows.values())


@contextlib.contextmanager
def within_memory(cfg: ConfigDict, program: Program) -> Iterator[None]:
    """Re-raises out-of-memory errors inside the block as UserError that says which keys reduce memory."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"this machine is out of memory: {error}; fewer data.workers or a smaller batch_size need less "
                        "memory") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        gigabytes = program.state_bytes() / 1e9
        remat = program.model.remat
        raise UserError(f"a device is out of memory: {text}; parameters and optimizer need {gigabytes:.2f} GB. To need "
                        f"less for an update, set remat to 'full' (now {remat!r}), increase micro_batches (now "
                        f"{cfg.micro_batches}) or shorten data.row_length; a larger mesh.fsdp reduces both") from error


def open_mesh(cfg: ConfigDict, config: LlavaConfig, devices: Sequence[jax.Device] | None = None,
              memory: int | None = None) -> Mesh:
    """Returns the recipe's mesh; with `mesh.auto`, the one that fits the devices.

    Args:
      cfg: the recipe.
      config: the model's shapes.
      devices: the devices to use; None for all of this job.
      memory: bytes of one device that programs may use; None asks the device.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: cfg.mesh[axis] for axis in ("data", "fsdp", "tp")}
    if cfg.mesh.auto:
        size = _training_bytes(cfg, config, dtype_of(cfg, devices[0].platform))
        sizes = auto_sizes(devices, size, device_memory(devices) if memory is None else memory,
                           cfg.mesh.slices)
    return make_mesh(sizes, devices, cfg.mesh.slices)


def _training_bytes(cfg: ConfigDict, config: LlavaConfig, dtype: Any) -> int:
    """Returns the bytes of parameters, gradients and optimizer, summed over all devices."""
    abstract = with_shapes(flatten_dict(llava.abstract_params(config, scan=True), sep="/"), cfg.quantize)
    trained, frozen = states.partition(abstract, cfg.trainable)
    values = sum(math.prod(x.shape) for x in trained.values())
    held = sum(math.prod(x.shape) * _bits(x.dtype) // 8
               for x in jax.tree.leaves(states.shapes_of(frozen, dtype)))
    return values * (12 + jnp.dtype(cfg.optimizer.mu_dtype).itemsize) + held


def from_disk(tensors: Mapping[str, jax.Array], shardings: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """Reverses `stacking.unstack`, and places the arrays by `shardings`."""
    flat = flatten_dict(stack(unflatten_dict(tensors, sep="/")), sep="/")
    return {name: jax.device_put(flat[name], sharding, may_alias=False) for name, sharding in shardings.items()}
