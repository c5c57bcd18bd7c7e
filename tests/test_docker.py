"""Dockerfile and compose.yaml: no daemon builds them here, so what they name is compared with what is there."""

import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")


def instructions():
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    return [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]


def words(line):
    """The words of a JSON-form instruction."""
    return yaml.safe_load(line[line.index("["):])


def test_what_is_copied_is_there_and_not_ignored():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert lines[0] == "*"  # a build sends no run, no environment and no data
    kept = [line[1:] for line in lines if line.startswith("!")]
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert set(kept) == set(copied) and len(copied) > 8
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch.fnmatch(name, pattern) for name in copied for pattern in lines[1:] if not pattern.startswith("!"))


def test_what_is_installed_are_extras_of_the_project():
    import tomllib
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    run = next(rest for word, rest in instructions() if word == "RUN" and "pip install" in rest)
    assert set(re.search(r"extras=([\w,]+)", run)[1].split(",")) <= set(extras) >= {"cuda12", "cuda13"}
    image = next(rest for word, rest in instructions() if word == "FROM")
    assert re.fullmatch(r"python:3\.1[12]-slim", image)


def test_it_serves_as_a_user_without_rights_and_is_asked_for_its_health():
    found = dict(instructions())
    assert found["USER"] == "llavamed" and found["STOPSIGNAL"] == "SIGTERM" and found["EXPOSE"] == "8000"
    order = [word for word, _ in instructions()]
    assert order.index("USER") < order.index("ENTRYPOINT") and order[-1] == "CMD"
    assert words(found["ENTRYPOINT"]) == ["python", "serve.py"]
    asked = words(found["HEALTHCHECK"])[-1]
    compile(asked, "HEALTHCHECK", "exec")
    assert "http://127.0.0.1:8000/health'" in asked


def test_the_flags_of_both_files_are_the_servers():
    from llavamed_jax.cli.serve import _parser
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    for argv in (words(dict(instructions())["CMD"]), *(compose["services"][name]["command"] for name in ("server", "server-gpu"))):
        flags = _parser().parse_args(argv)
        assert (flags.checkpoint, flags.host) == ("/model", "0.0.0.0")


def test_prometheus_reads_the_servers_metrics_and_no_port_is_open_to_others():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    server, prometheus = compose["services"]["server"], compose["services"]["prometheus"]
    settings = yaml.safe_load((ROOT / prometheus["volumes"][0].split(":")[0]).read_text(encoding="utf-8"))
    target, = (target for job in settings["scrape_configs"] for each in job["static_configs"] for target in each["targets"])
    assert target.partition(":")[0] in server["networks"]["default"]["aliases"] and target.endswith(":8000")
    assert all(port.startswith("127.0.0.1:") for service in compose["services"].values() for port in service["ports"])
    assert {volume.split(":")[0] for volume in (*server["volumes"][1:], *prometheus["volumes"][1:])} == set(compose["volumes"])
    assert int(server["stop_grace_period"].rstrip("s")) > 30  # the server's --drain_timeout
