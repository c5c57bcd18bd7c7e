"""The cache of compiled programs: where it lies, who may turn it off, and that a second start compiles nothing of the engine."""

import contextlib
import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from llavamed_jax.cli import compilation_cache
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request
from llavamed_jax.utils import paths
from tests.support.random_params import random_params

CFG = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(40, 16, 24, 1, 2, 1, 8, 1e-5, 1e4, 128))
KEYS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache directory, and a jax that has been told nothing about it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    earlier = {key: getattr(jax.config, key) for key in KEYS}
    jax_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "llavamed_jax" / "programs"
    for key, value in earlier.items():
        jax.config.update(key, value)
    jax_cache.reset_cache()


@contextlib.contextmanager
def counted():
    """What jax says of its cache meanwhile: {"cache_hits": …, "compile_requests_use_cache": …}."""
    found = {}

    def count(event, **_):
        name = event.rsplit("/", 1)[-1]
        found[name] = found.get(name, 0) + 1

    jax.monitoring.register_event_listener(count)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(count)


def answers(params):
    """What a new engine, which has compiled nothing, says to a prompt about an image."""
    request = Request([1] + [-200] * CFG.tokens_per_image + [8], [np.full((16, 16, 3), 200, np.uint8)], 9)
    return Engine(CFG, params, batch_size=4, steps=4).generate([request])


def test_a_second_start_compiles_nothing_of_the_engine(cache, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LEAST_SECONDS", 0.0)  # a machine may compile the smallest of these in no time
    params = random_params(CFG, seed=1)
    compilation_cache.enable()
    first = answers(params)
    programs = sorted(path.name.partition("-")[0] for path in cache.glob("*-cache"))
    assert "jit__decode" in programs and "jit__encode" in programs, programs
    with counted() as found:
        assert answers(params) == first
    assert found["cache_hits"] == found["compile_requests_use_cache"] >= 4, found
    assert sorted(path.name.partition("-")[0] for path in cache.glob("*-cache")) == programs


def test_a_donated_buffer_is_given_away_by_a_program_from_the_disk_too(cache, monkeypatch):
    """The decode loop's cache would otherwise be there twice."""
    monkeypatch.setattr(compilation_cache, "LEAST_SECONDS", 0.0)
    compilation_cache.enable()
    for hits in (0, 1):
        x = jax.numpy.arange(1000.0)
        where = x.unsafe_buffer_pointer()
        with counted() as found:
            y = jax.jit(lambda x: x + 1, donate_argnums=0)(x)
        assert found.get("cache_hits", 0) == hits and x.is_deleted() and y.unsafe_buffer_pointer() == where
        assert y[-1] == 1000


def test_an_entry_of_other_flags_is_not_taken(cache, monkeypatch):
    """One of another jaxlib neither: both are part of an entry's key."""
    monkeypatch.setattr(compilation_cache, "LEAST_SECONDS", 0.0)
    compilation_cache.enable()
    compiled = lambda **options: jax.jit(lambda x: x * 3, compiler_options=options)(jax.numpy.ones(3)).block_until_ready()
    for options in ({}, {"xla_cpu_enable_fast_math": True}):
        with counted() as found:
            compiled(**options)
        assert not found.get("cache_hits"), options
    with counted() as found:
        compiled()
    assert found["cache_hits"] == 1


def test_a_damaged_entry_is_compiled_anew(cache, monkeypatch):
    monkeypatch.setattr(compilation_cache, "LEAST_SECONDS", 0.0)
    compilation_cache.enable()
    double = lambda: jax.jit(lambda x: x * 2)(jax.numpy.ones(3)).sum()
    assert double() == 6
    for path in cache.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:-40])  # of a process that was killed
    with pytest.warns(UserWarning, match="compilation cache entry for 'jit__lambda'"):
        assert double() == 6


def test_the_users_directory_is_respected_and_so_is_the_switch(cache, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "named"))
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named") and not cache.exists()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compilation_cache.LEAST_SECONDS
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None and not cache.exists()


def test_the_directory_follows_the_rules(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for named, wanted in (("/var/cache/ada", "/var/cache/ada"), ("", "/home/ada/.cache"), ("not/absolute", "/home/ada/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert str(paths.user_cache()) == f"{wanted}/llavamed_jax"


def test_a_directory_that_cannot_be_written_is_a_warning(cache, capsys):
    cache.parent.parent.joinpath("llavamed_jax").write_text("in the way")
    compilation_cache.enable()
    said = capsys.readouterr().err
    assert said.startswith("warning: compiled programs are not cached: Not a directory: ") and str(cache) in said and said.count("\n") == 1
    assert jax.config.jax_compilation_cache_dir is None


def test_nobody_else_may_write_there(cache):
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(cache) and cache.stat().st_mode & 0o777 == 0o700


def test_the_longest_unused_go_first(tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1e9 - age, 1e9 - age))
    (tmp_path / "other").write_bytes(bytes(1000))
    compilation_cache.prune(tmp_path, 300)
    assert len(list(tmp_path.glob("*-cache"))) == 3
    compilation_cache.prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle-cache", "new-cache", "other"]
