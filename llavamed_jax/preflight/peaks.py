"""What each kind of machine reaches at most: matrix products, memory and links. A floor of time divides by these."""

from __future__ import annotations

import dataclasses

from llavamed_jax.errors import UsageError, short
from llavamed_jax.preflight.topologies import KINDS, Topology


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The peaks of one device.

    Attributes:
      flops: FLOP/s of large matrix products in bfloat16.
      bytes_per_second: of the memory.
      link_bytes_per_second: that a device receives from the other devices of its host or of its slice.
      far_bytes_per_second: that a device receives in a group that spans hosts (GPUs) or slices (TPUs).
    """

    flops: float
    bytes_per_second: float
    link_bytes_per_second: float
    far_bytes_per_second: float

    def link(self, group: int, near: int) -> float:
        """Returns the bytes per second of a collective of `group` devices, of which `near` are joined by fast links."""
        return self.link_bytes_per_second if group <= near else self.far_bytes_per_second


# Stated, not measured by this project: large products have reached 770 of the data sheet's 989 TFLOP/s on an H200, and
# its memory 4.3 of 4.8 TB/s. Other GPUs have the same shares (0.78, 0.90) of their data sheets, TPUs 0.95 and 0.90.
# Links: NVLink's data sheet in one direction times 0.8 (NCCL's bus bandwidth), PCIe 4.0 x16 without NVLink, and
# 400 Gbit/s a GPU between hosts; for TPUs a ring over one axis in both directions (Austin et al., "How to Scale Your
# Model", 2025), and 6.25 GB/s a chip between slices.
PEAKS = {
    "a100-40g": Peaks(243e12, 1.40e12, 240e9, 25e9),
    "a100-80g": Peaks(243e12, 1.83e12, 240e9, 25e9),
    "h100": Peaks(770e12, 3.0e12, 360e9, 50e9),
    "h200": Peaks(770e12, 4.3e12, 360e9, 50e9),
    "l4": Peaks(94e12, 0.27e12, 25e9, 12e9),
    "rtx4090": Peaks(129e12, 0.90e12, 25e9, 12e9),
    "v4": Peaks(261e12, 1.10e12, 90e9, 6.25e9),
    "v5e": Peaks(187e12, 0.73e12, 90e9, 6.25e9),
    "v5p": Peaks(436e12, 2.48e12, 180e9, 6.25e9),
    "v6e": Peaks(872e12, 1.44e12, 180e9, 6.25e9),
}
_NAMES = {"flops": "flops", "bytes": "bytes_per_second", "link": "link_bytes_per_second", "far": "far_bytes_per_second"}


def peaks_of(topology: Topology, changes: str | None = None) -> Peaks | None:
    """Returns the peaks of a machine's devices; None for a CPU, whose programs are not those of an accelerator.

    Args:
      topology: the machine.
      changes: as of `--peak`: `flops=8e14,bytes=3.2e12`, `link` and `far` likewise, in FLOP/s and bytes a second.

    Raises:
      UsageError: `changes` cannot be read.
    """
    known = PEAKS.get(topology.kind)
    asked = read(changes)
    return None if known is None else dataclasses.replace(known, **asked)


def near(topology: Topology) -> int:
    """Returns the number of devices that fast links join: those of a host of GPUs, or of a slice of TPUs."""
    return topology.host_devices if topology.platform == "gpu" else topology.num_devices // topology.slices


def read(changes: str | None) -> dict[str, float]:
    """Reads `--peak`; {} for None. Raises UsageError if it cannot be read."""
    out: dict[str, float] = {}
    for part in (changes or "").split(",") if changes is not None else ():
        name, _, value = part.partition("=")
        try:
            out[_NAMES[name.strip()]] = float(value)
            if not 0 < float(value) < float("inf"):
                raise ValueError
        except (KeyError, ValueError):
            raise UsageError(f"--peak is {short(changes)}; a list such as flops=8e14,bytes=3.2e12,link=3e11,far=5e10 "
                             "was expected, in FLOP/s and bytes a second") from None
    return out


assert set(PEAKS) == {kind for kind, machine in KINDS.items() if machine is not None}
