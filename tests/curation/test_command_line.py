"""The room's command line: a registry, one sentence for each mistake, and no jax."""

import subprocess
import sys
import types

import pytest

from llavamed_jax.curation import __main__ as command_line
from llavamed_jax.curation import extra
from llavamed_jax.errors import UserError


@pytest.fixture
def toy(monkeypatch):
    module = types.ModuleType("toy_command")
    module.add_flags = lambda parser: parser.add_argument("--count", type=int, required=True, metavar="N")
    module.run = lambda args: args.count
    monkeypatch.setitem(sys.modules, "toy_command", module)
    monkeypatch.setitem(command_line.COMMANDS, "toy", ("toy_command", "Counts."))


def test_a_command_is_one_line_in_the_registry(toy, capsys):
    assert command_line.main(["toy", "--count", "75"]) == 75
    assert command_line.main(["toy"]) == 2 and "--count" in capsys.readouterr().err
    assert command_line.main(["toi"]) == 2 and "toi" in capsys.readouterr().err
    assert command_line.main([]) == 2 and "COMMAND" in capsys.readouterr().err


def test_help_needs_no_command_and_no_jax(toy):
    code = ("import sys; from llavamed_jax.curation.__main__ import main, COMMANDS\n"
            "for words in ([], *([name] for name in COMMANDS)):\n"
            "    try: main([*words, '--help'])\n"
            "    except SystemExit as end: assert end.code == 0\n"
            "sys.exit('jax' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "python -m llavamed_jax.curation" in done.stdout


def test_a_missing_package_names_the_extra():
    assert extra.needed("json", "reads JSON").loads("1") == 1
    with pytest.raises(UserError, match=r"no_such, which reads, is not installed: pip install 'llavamed-jax\[curation\]'"):
        extra.needed("no_such.etree", "reads")
