"""How the tests, and the processes that they start, have XLA compile: quickly, since they run each program once or twice."""

import importlib.metadata

# The programs are the same, and so is what their operations compute; the machine code is less optimised. Tiny models compile in a
# fourth of the time.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA aborts at a flag that it does not know
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")


def flags(devices: int = 1, given: str = "") -> str:
    """XLA_FLAGS of a process with so many virtual devices. What `given` already sets stays as it is there."""
    wanted = [f"--xla_force_host_platform_device_count={devices}", *_QUICK]
    return " ".join([*given.split(), *(flag for flag in wanted if flag.partition("=")[0] not in given)])
