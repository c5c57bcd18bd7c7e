"""The house rules, read from the code itself: who may import whom, how long a file may be, what lies at the top."""

import ast
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llavamed_jax"

# Lowest first. A file imports rooms of its own group and of the groups before it, never of a later one.
LAYERS = [
    ("errors",),
    ("utils", "config", "parallel", "recipes", "openai_client"),
    ("images", "text", "quantized"),
    ("models",),
    ("checkpoints", "datasets", "generation"),
    ("adapters",),
    ("processor",),
    ("assistant", "pipeline"),
    ("training", "serving", "curation"),
    ("evaluation", "preflight"),
    ("verification",),
    ("cli", "chat"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COMMAND_LINES = {"llavamed_jax.cli", "llavamed_jax.chat", "llavamed_jax.curation.__main__", "llavamed_jax.serving.batch"}
DOORS = {"train.py": "train", "eval.py": "eval", "serve.py": "serve", "convert/__main__.py": "convert"}
TOP_LEVEL = {
    "llavamed_jax", "configs", "convert", "tests", "benchmarks", "samples", "docs", ".ci",
    "train.py", "eval.py", "serve.py", "pyproject.toml", "requirements.txt", "Makefile",
    "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore",
    "Dockerfile", ".dockerignore", "compose.yaml",
}  # fmt: skip
LONGEST_FILE = 400


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """`llavamed_jax.models.towers.clip` -> `models`; the package itself -> the empty string."""
    return (module.split(".") + [""])[1]


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of a file's syntax tree, its root first."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return name.startswith("llavamed_jax.") and (path.is_dir() or path.with_suffix(".py").is_file())


@functools.cache
def imports(path: Path, at_top_only: bool = False) -> frozenset[str]:
    """Every module that a file imports, by absolute name; `from a import b` gives `a.b` where that is a module of ours."""
    found = set()
    for node in nodes(path)[0].body if at_top_only else nodes(path):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; absolute names were expected"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if is_module(inner) else node.module)
    return frozenset(found)


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "llavamed_jax"}


def test_every_file_has_a_layer():
    unknown = {room(module_name(path)) for path in sources()} - set(LEVEL) - {""}
    assert not unknown, f"{sorted(unknown)} stand in no layer of tests/test_architecture.py"


def test_imports_point_downwards():
    wrong = []
    for path in sources():
        module = module_name(path)
        here = "cli" if module in COMMAND_LINES else room(module)
        if not here:
            continue  # the package's own file is the public API, checked below
        for name in ours(imports(path)):
            there = room(name)
            if there == "":  # `import llavamed_jax as lm` stands for the assistant
                there = "assistant"
            if LEVEL[there] > LEVEL[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "upward imports:\n" + "\n".join(wrong)


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, directly or through others (Tarjan's strongly connected components)."""
    index, lowest, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in edges.get(node, ()):
            if other not in index:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], index[other])
        if lowest[node] == index[node]:
            group = stack[stack.index(node):]
            del stack[stack.index(node):]
            if len(group) > 1 or node in edges.get(node, ()):
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count: a lazy import hides a circle and does not end it."""
    edges = {module_name(path): ours(imports(path)) for path in sources()}
    assert len(edges) > 150
    assert circles(edges) == []


def test_what_is_printed_passes_through_one_place():
    """`utils.terminal.Screen` stands in the place of both streams: nobody takes the ones of before, or writes beside them."""
    beside = re.compile(r"(?<!terminal\.Screen\()sys\.__std(out|err)__|sys\.std(out|err)\.buffer")
    wrong = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in sources()
             for line in path.read_text(encoding="utf-8").splitlines() if beside.search(line)]
    assert all(line.startswith("llavamed_jax/images/dicom.py: ") for line in wrong), wrong  # a child's pixels, which are no text


def test_every_command_line_cleans_what_it_prints():
    """Each `main` ends in `cli.common.command`, which ends in `run`, which opens `utils.terminal.cleaned`."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[2].partition("[")[0].splitlines()
    modules = {line.split('"')[1].partition(":")[0] for line in lines if '"' in line}
    modules |= {name for name in COMMAND_LINES if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()}
    assert len(modules) >= 4
    for module in sorted(modules):
        tree = nodes((ROOT / module.replace(".", "/")).with_suffix(".py"))[0]
        (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        assert re.search(r"\b(common\.)?command\(", ast.unparse(main.body[-1])), f"{module}.main does not end in cli.common.command"


def test_data_needs_no_jax():
    for path in sources():
        if room(module_name(path)) in ("images", "text", "datasets", "processor", "pipeline") and path.name != "loader.py":
            heavy = {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax"}
            assert not heavy, f"{path.relative_to(ROOT)} imports {sorted(heavy)}"


def test_processor_reaches_no_jax():
    """What the imports reach counts, not only what a file names: a processor must load beside torch or none."""
    todo, seen = ["llavamed_jax.processor"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        base = ROOT / module.replace(".", "/")
        path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        found = imports(path, at_top_only=True)
        assert "jax" not in {name.split(".")[0] for name in found}, f"the processor reaches jax through {module}"
        todo += ours(found) - seen
    assert len(seen) > 1


def test_command_lines_are_imported_by_their_doors_only():
    for path in sources():
        module = module_name(path)
        if module.startswith("llavamed_jax.cli"):
            continue  # they share cli/common.py
        wrong = {name for name in ours(imports(path)) if any(name == c or name.startswith(f"{c}.") for c in COMMAND_LINES)}
        if module in COMMAND_LINES:
            wrong -= {"llavamed_jax.cli.common"}
        assert not wrong, f"{path.relative_to(ROOT)} imports the command line {sorted(wrong)}"


def test_recipes_import_no_command_line():
    """A recipe is data: the command line reads recipes, and recipes know nothing of it. Nor do their arguments, `recipes.py`."""
    paths = sorted((ROOT / "configs").rglob("*.py"))
    assert len(paths) >= 17
    for path in paths:
        wrong = {name for name in ours(imports(path)) if room(name) == "cli"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"
    assert {room(name) for name in ours(imports(PACKAGE / "recipes.py"))} <= {"errors", "utils"}


@pytest.mark.parametrize("door", DOORS)
def test_doors_are_thin(door):
    path = ROOT / door
    if not path.exists():
        pytest.skip(f"{door} is not there yet")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 4, f"{door} has {len(lines)} lines; three were expected"
    assert ours(imports(path)) == {f"llavamed_jax.cli.{DOORS[door]}"}


def test_files_are_of_one_idea():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE}
    assert not long, f"files longer than {LONGEST_FILE} lines: {long}"


def test_top_level():
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert top <= TOP_LEVEL, f"unexpected at the top: {sorted(top - TOP_LEVEL)}"


def test_import_is_cheap():
    """`import llavamed_jax` starts no accelerator, so that flags and environment can still be set after it."""
    code = "import llavamed_jax, sys; b = sys.modules.get('jax._src.xla_bridge'); sys.exit(bool(b and b._backends))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_dir_shows_what_is_meant_to_be_used():
    """Before anything of it is imported, and without importing it: tab completion must be quick."""
    code = ("import sys, llavamed_jax as lm; names = [n for n in dir(lm) if not n.startswith('__')]; heavy = 'jax' in sys.modules; "
            "lm.Processor; print(names, heavy, names == [n for n in dir(lm) if not n.startswith('__')], '__version__' in dir(lm))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.stdout == "['Completion', 'IMAGE_TOKEN', 'LlavaMed', 'Processor', 'load'] False True True\n", done.stderr


def calls(path):
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield node, name, {keyword.arg: keyword.value for keyword in node.keywords}


def is_text_without_encoding(node, name, keywords) -> bool:
    """Whether a call reads or writes text in the encoding of whatever locale there is."""
    if "encoding" in keywords or None in keywords:
        return False
    if name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & keywords.keys():
        return True
    is_method = isinstance(node.func, ast.Attribute)
    if name == "read_text" and is_method:
        return not node.args
    if name == "write_text" and is_method:
        return len(node.args) < 2
    if name == "open" and not is_method:
        modes = [argument.value for argument in [*node.args[1:], *keywords.values()] if isinstance(argument, ast.Constant)]
        return not any("b" in mode for mode in modes if isinstance(mode, str))
    return False


def test_text_is_read_and_written_with_an_encoding():
    examples = {"open(f)": True, "open(f, 'w')": True, "open(f, 'rb')": False, "open(f, encoding='utf-8')": False, "p.read_text()": True,
                "p.write_text(s)": True, "p.write_text(s, encoding='utf-8')": False, "run(x, text=True)": True, "Image.open(f)": False,
                "write_text(path, text)": False}
    for text, wanted in examples.items():
        node = ast.parse(text).body[0].value
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        assert is_text_without_encoding(node, name, {k.arg: k.value for k in node.keywords}) is wanted, text
    sources = [path for folder in ("llavamed_jax", "samples", "benchmarks", "configs", "convert") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 150
    wrong = [f"{path.relative_to(ROOT)}:{call[0].lineno}" for path in sources for call in calls(path) if is_text_without_encoding(*call)]
    assert not wrong, f"text without an encoding: {', '.join(wrong)}"
