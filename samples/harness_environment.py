"""Runs in the environment of a harness, after its packages are installed: makes `import torchvision` work without CUDA.

    .venv-lmms/bin/python samples/harness_environment.py

The package index has torchvision for CUDA only, and its operators cannot be loaded beside torch's CPU build, on which both
harnesses run here; PyTorch's own index has the CPU build of both. Where only the former was found, this writes a
`sitecustomize.py` that declares the two operators which torchvision wants at its import. No harness calls them for images and text.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares the operators of torchvision, whose own cannot be loaded here (llavamed-jax, samples/harness_environment.py)."""

import importlib.abc
import sys


class _Operators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            _Operators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _Operators.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Operators())
'''


def works() -> bool:
    """Returns whether torchvision can be imported."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    if not works():
        (Path(sysconfig.get_path("purelib")) / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        if not works():
            sys.exit("torchvision cannot be imported; the CPU builds of torch and torchvision from "
                     "https://download.pytorch.org/whl/cpu were expected")
        print("torchvision's operators are declared and not there: only its build for CUDA was found")
