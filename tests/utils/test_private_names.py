"""Private names of other libraries stand in `llavamed_jax/utils/private.py` alone, and each may be missing."""

import ast
import asyncio
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.utils import private

PACKAGE = Path(private.__file__).resolve().parent.parent
# Documented in spite of their underscore: namedtuples, Python's `os` and `sys`. argparse has no public list of a parser's flags.
PUBLIC = {"_replace", "_asdict", "_exit", "_getframe", "_actions"}
# A script that runs without the package; its docstring has the versions, and it does without the name where there is none.
SCRIPTS = {"text/template_child.py": {"_compile_jinja_template"}}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(path):
    """Private names in a file that nothing in that file defines: imported ones, and attributes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            defined.add(node.attr)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in defined | PUBLIC:
            yield node.attr
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if is_private(part))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "llavamed_jax":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in names if is_private(part))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "importlib.import_module"):
            words = [part for each in node.args if isinstance(each, ast.Constant) for part in str(each.value).split(".")]
            yield from (part for part in words if is_private(part) and part not in defined | PUBLIC)


def test_private_names_of_libraries_stand_in_one_file():
    found = {path.relative_to(PACKAGE).as_posix(): set(private_names(path)) for path in PACKAGE.rglob("*.py")}
    own = found.pop("utils/private.py")
    assert own == {"_src", "_run_sync_via_new_loop", "_cache_size", "_Unpickler"}
    assert {name: names for name, names in found.items() if names} == SCRIPTS
    assert all(f"`{name}`" in private.__doc__ or f".{name}" in private.__doc__ for name in own), "each is in the file's table"


@pytest.mark.parametrize("line", [
    "from jax._src import core", "import orbax.checkpoint._src.asyncio_utils", "from pickle import _Unpickler", "x = flax.core._y",
    "def f(model): return model._trace", "y = getattr(jax, '_src')", "importlib.import_module('jax._src.core')", "jax.x._y = 1"])
def test_each_way_to_a_private_name_is_found(tmp_path, line):
    (tmp_path / "x.py").write_text(line)
    assert list(private_names(tmp_path / "x.py"))


def test_the_versions_are_those_that_are_tried_here():
    said = private.__doc__
    assert f"orbax-checkpoint {version('orbax-checkpoint')}" in said and f"jax {version('jax')}" in said


def test_without_jaxs_client_one_sentence(monkeypatch):
    from jax._src import distributed
    monkeypatch.delattr(distributed, "global_state")
    with pytest.raises(UserError, match=r"^jax .* has no jax._src.distributed.global_state, which several processes need; jax 0.10 was"):
        private.coordination_client()


def test_without_orbaxs_function_nothing_is_replaced(monkeypatch):
    from orbax.checkpoint._src import asyncio_utils
    assert asyncio_utils._run_sync_via_new_loop is private._run_to_the_end or not sys.modules.get("llavamed_jax.checkpoints.tree.store")
    monkeypatch.delattr(asyncio_utils, "_run_sync_via_new_loop")
    private.let_orbax_finish_writes()
    assert not hasattr(asyncio_utils, "_run_sync_via_new_loop")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint._src", None)
    private.let_orbax_finish_writes()


def test_other_writes_end_before_a_failed_one_is_raised():
    ended = []

    async def slow():
        await asyncio.sleep(0.05)
        ended.append(1)

    async def main():
        asyncio.get_running_loop().create_task(slow())
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        private._run_to_the_end(main())
    assert ended


def test_without_pythons_unpickler_one_sentence(tmp_path):
    """And whatever else imports the module goes on."""
    file = tmp_path / "x.pkl"
    file.write_bytes(pickle.dumps([1]))
    code = f"""
import pickle
from pathlib import Path
del pickle._Unpickler
from llavamed_jax.datasets import pathvqa, pickles
pickles.read_plain_pickle(Path({str(file)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: this Python has no pickle._Unpickler, which is needed to read pickles; Python 3.11" in done.stderr


@pytest.mark.parametrize("data", ['b"})" + b"\\x85" * 1_000_000 + b"K\\x01s."', r'b"K\x01r\xff\xff\xff\x0f."'])
def test_why_the_public_unpickler_does_not_serve(data):
    """It dies of a nested key, and takes gigabytes for a number: were it bounded one day, the private name could go."""
    code = f"""
import io, pickle, resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
pickle.Unpickler(io.BytesIO({data})).load()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode < 0 or "MemoryError" in done.stderr
