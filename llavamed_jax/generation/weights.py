"""Places the weights of an engine on its devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from llavamed_jax.config import LlavaConfig
from llavamed_jax.models import joined
from llavamed_jax.models.llava import param_axes
from llavamed_jax.models.stacking import is_layer
from llavamed_jax.parallel.mesh import param_shardings


def placed(params: Mapping[str, Any], cfg: LlavaConfig, mesh: Mesh | None) -> dict[str, Any]:
    """Returns parameters on the devices of a mesh, with kernels of the decoder joined where `joins` says so.

    Layers are joined and copied one by one, so that the host never holds the joined model beside the other. Parameters
    that lie on devices already are not joined, because both would have to fit there.

    Args:
      params: the unrolled parameter tree: arrays of numpy or of jax, or ShapeDtypeStructs, which are returned as such.
      cfg: the model's shapes.
      mesh: the mesh; None is one device.
    """
    leaves, rules = jax.tree.leaves(params), param_axes(cfg)
    is_joined = joins(mesh) and not any(isinstance(x, jax.Array) for x in leaves)
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)

    def put(name, inner, value):
        if is_abstract:
            return value
        if mesh is None:
            return jax.device_put(value)
        return jax.device_put(value, param_shardings({name: {inner: value}}, rules, mesh)[name][inner])

    out: dict[str, Any] = {name: {} for name in params}
    for name, part in params.items():
        for inner, value in part.items():
            if is_joined and name == "decoder" and is_layer(inner):
                value = joined.join(value)
            out[name][inner] = put(name, inner, value)
    return out


def joins(mesh: Mesh | None) -> bool:
    """Returns whether an engine joins kernels: on GPUs, unless tensor parallelism divides their parts."""
    if mesh is None:
        return jax.default_backend() == "gpu"
    return mesh.devices.flat[0].platform == "gpu" and mesh.shape["tp"] == 1
