"""Describes machines that are not here, by the names of docs/interface.md: `KIND-COUNT`, such as `h100-8` or `v5e-64`.

XLA compiles for a description of a machine. The description of a TPU comes with libtpu and needs only the shape of the
slice. The description of a GPU is written here, because XLA's GPU compiler otherwise asks a real device for it.
Sources: data sheets of the vendors, and the values that the CUDA driver reports.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llavamed_jax.errors import UsageError, UserError, cut, short

GPU_SHARE = 0.95  # share of a GPU's memory that our entry points give to JAX (XLA_CLIENT_MEM_FRACTION)
GPUS_A_HOST = 8
TPUS_A_HOST = 4  # as in libtpu's topologies
MOST_DEVICES, MOST_CPUS = 8192, 256  # largest counts; each virtual CPU device takes at least one thread
PIP = 'pip install "llavamed-jax[preflight]"'


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      name: the driver's name, which is the `device_kind` in JAX.
      capability: compute capability, times ten.
      cores: number of streaming multiprocessors.
      memory: bytes.
      bandwidth: of the memory, in bytes a second.
      shared: bytes of shared memory of a multiprocessor; a block may use 1,024 less.
      cache: bytes of the L2 cache.
      clock: GHz.
    """

    name: str
    capability: int
    cores: int
    memory: int
    bandwidth: float
    shared: int
    cache: int
    clock: float

    def describe(self) -> str:
        """Returns the description that XLA's GPU compiler reads (`stream_executor.GpuTargetConfigProto` as text).

        It states CUDA's version, without which XLA compiles no FP8 product.
        """
        major, minor = divmod(self.capability, 10)
        fpus = 64 if self.capability == 80 else 128
        extension = "feature_extension: ACCELERATED_FEATURES" if self.capability == 90 else ""
        threads = 1536 if self.capability == 89 else 2048
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared} shared_memory_per_block_optin: {
                self.shared - 1024}
              core_count: {self.cores} fpus_per_core: {fpus} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" driver_version: "13.0.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 12 }}
            device_description_str: "{self.name}"
        """


@dataclass(frozen=True)
class Tpu:
    """A kind of TPU.

    Attributes:
      name: libtpu's name.
      memory: bytes of a JAX device that XLA gives to programs; libtpu's compiler states them if a program needs more.
      dimensions: dimensions of the grid of a slice.
      counted: units of COUNT per chip: vendors count TensorCores, of which some chips have two.
      options: further options for libtpu.
    """

    name: str
    memory: int
    dimensions: int
    counted: int = 1
    options: tuple[tuple[str, str], ...] = ()


_GIB = 2**30
_A100 = dict(capability=80, cores=108, shared=167_936, cache=40 * 2**20, clock=1.41)
_H100 = dict(capability=90, cores=132, shared=233_472, cache=50 * 2**20, clock=1.98)
_ADA = dict(capability=89, shared=102_400)
KINDS: dict[str, Gpu | Tpu | None] = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", memory=42_298_834_944, bandwidth=1555e9, **_A100),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", memory=84_987_740_160, bandwidth=2039e9, **_A100),
    "h100": Gpu("NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3352e9, **_H100),
    "h200": Gpu("NVIDIA H200", memory=150_110_011_392, bandwidth=4800e9, **_H100),
    "l4": Gpu("NVIDIA L4", memory=23_580_639_232, bandwidth=300e9, cores=58, cache=48 * 2**20, clock=2.04, **_ADA),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", memory=25_393_692_672, bandwidth=1008e9, cores=128, cache=72 * 2**20,
                   clock=2.52, **_ADA),
    "v4": Tpu("v4", int(30.75 * _GIB), 3, counted=2, options=(("chip_config_name", "megacore"),)),
    "v5e": Tpu("v5e", int(15.75 * _GIB), 2),
    "v5p": Tpu("v5p", int(95.74 * _GIB), 3, counted=2),
    "v6e": Tpu("v6e", int(31.25 * _GIB), 2),
    "cpu": None,
}


@dataclass(frozen=True)
class Topology:
    """A machine: a number of devices of one kind.

    Attributes:
      kind: a key of `KINDS`.
      count: the size of one slice, as vendors write it.
      slices: the number of TPU slices; 1 for other machines.
    """

    kind: str
    count: int
    slices: int = 1

    @classmethod
    def parse(cls, text: str, slices: int = 1) -> Topology:
        """Parses `KIND-COUNT`.

        Args:
          text: the name of the machine.
          slices: the number of TPU slices.

        Raises:
          UsageError: the kind is unknown, or the count or the number of slices is not possible.
        """
        kind, _, count = text.rpartition("-")
        if kind not in KINDS:
            raise UsageError(f"the topology {short(text)} is unknown; KIND-COUNT with KIND one of {', '.join(KINDS)} "
                             "was expected, such as h100-8")
        most = MOST_CPUS if kind == "cpu" else MOST_DEVICES
        if not re.fullmatch(r"[1-9][0-9]{0,5}", count) or int(count) > most:
            raise UsageError(f"the topology {short(text)} has the count {short(count)}; a whole number from 1 to "
                             f"{most} was expected")
        topology = cls(kind, int(count), slices)
        what = KINDS[kind]
        if isinstance(what, Tpu):
            topology.grid()
        elif slices != 1:
            raise UsageError(f"the config key 'mesh.slices' is {slices}; 1 was expected for {text}, because only TPUs "
                             "have slices")
        if isinstance(what, Gpu) and topology.count > GPUS_A_HOST and topology.count % GPUS_A_HOST:
            raise UsageError(f"the topology {text!r} has {count} GPUs; at most {GPUS_A_HOST}, or a multiple of "
                             f"{GPUS_A_HOST}, were expected")
        return topology

    @property
    def name(self) -> str:
        """The name, `KIND-COUNT`."""
        return f"{self.kind}-{self.count}"

    @property
    def num_devices(self) -> int:
        """Number of JAX devices; a v4 or v5p chip with two cores is one device."""
        what = KINDS[self.kind]
        return self.slices * self.count // (what.counted if isinstance(what, Tpu) else 1)

    @property
    def host_devices(self) -> int:
        """Number of JAX devices of one host; each host runs one process."""
        most = {Gpu: GPUS_A_HOST, Tpu: TPUS_A_HOST}.get(type(KINDS[self.kind]), self.num_devices)
        return min(self.num_devices // self.slices, most)

    def host(self) -> Topology:
        """Returns the topology of one host of this machine."""
        return Topology(self.kind, self.count * self.host_devices * self.slices // self.num_devices)

    @property
    def platform(self) -> str:
        """The JAX platform: `gpu`, `tpu` or `cpu`."""
        return {Gpu: "gpu", Tpu: "tpu"}.get(type(KINDS[self.kind]), "cpu")

    @property
    def memory(self) -> int:
        """Bytes that a program may use on one device; for a virtual CPU device, its share of this machine's memory."""
        what = KINDS[self.kind]
        if isinstance(what, Gpu):
            return int(GPU_SHARE * what.memory)
        return what.memory if what else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.count

    def larger(self) -> Topology | None:
        """Returns the next larger machine of the same kind; None if there is none."""
        for times in (2, 4):
            try:
                return Topology.parse(f"{self.kind}-{times * self.count}", self.slices) if self.kind != "cpu" else None
            except UsageError:
                continue
        return None

    def grid(self) -> tuple[int, ...]:
        """Returns the shape of a TPU slice of Cloud TPU: the number of chips in each dimension.

        Raises:
          UsageError: Cloud TPU has no slice with this count.
        """
        what = KINDS[self.kind]
        chips, rest = divmod(self.count, what.counted)
        power = chips.bit_length() - 1
        most = 256 if what.dimensions == 2 else 4096
        if rest or chips != 1 << power or chips > most or chips == 2:
            counts = [n * what.counted for n in (2**i for i in range(13)) if n <= most and n != 2]
            raise UsageError(f"the topology {self.name!r} does not exist; {self.kind} has slices of "
                             f"{', '.join(map(str, counts))}"
                             f"{' TensorCores, two a chip' if what.counted == 2 else ' chips'}")
        if what.dimensions == 2:
            return 2 ** (power // 2), 2 ** (power - power // 2)
        if chips < 8:
            return {1: (1, 1, 1), 4: (2, 2, 1)}[chips]
        return tuple(2 ** (power // 3 + (i >= 3 - power % 3)) for i in range(3))

    def check_packages(self) -> None:
        """Raises UserError, with the pip line, if the compiler for this machine is not installed."""
        names = {"gpu": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",),
                 "cpu": ("jax",)}[self.platform]
        if not any(_is_installed(name) for name in names):
            raise UserError(f"{self.name} needs {'libtpu' if self.platform == 'tpu' else 'the CUDA plugin of jax'}, "
                            f"which is not installed: {PIP}")

    def devices(self) -> Sequence:
        """Returns devices to compile for.

        Raises:
          UserError: the packages for this machine are not installed or do not fit the version of JAX.
        """
        import jax
        from jax.experimental import topologies
        self.check_packages()
        what = KINDS[self.kind]
        if what is None:
            found = jax.devices("cpu")
            if len(found) < self.count:
                raise UserError(f"{self.name}: there are {len(found)} virtual CPU devices; "
                                f"XLA_FLAGS=--xla_force_host_platform_device_count={self.count} was expected")
            return found[: self.count]
        try:
            return topologies.get_topology_desc(**self._description()).devices
        except Exception as error:  # a plugin or libtpu of another version, or a missing C++ library
            said = cut(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", 200)
            raise UserError(f"jax {jax.__version__} cannot load the compiler for {self.name} ({said}); {PIP} installs "
                            "versions that fit") from error

    def _description(self) -> dict[str, Any]:
        """Returns the arguments of JAX's `get_topology_desc` for this machine."""
        what = KINDS[self.kind]
        if isinstance(what, Gpu):
            hosts = max(1, self.count // GPUS_A_HOST)
            return dict(topology_name="", platform="cuda", target_config=what.describe(),
                        topology=f"{hosts}x1x{self.count // hosts}")  # NVLink connects the GPUs of a host
        grid, options = self.grid(), dict(what.options)
        if math.prod(grid) < 4:
            options["chips_per_host_bounds"] = grid + (1,) * (3 - len(grid))
        if self.slices > 1:
            options["num_slices"] = self.slices
        return dict(platform="tpu", topology_name=f"{what.name}:{'x'.join(map(str, grid))}", **options)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False
