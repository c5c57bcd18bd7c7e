"""XLA's flags: whose they are, and that the user's win."""

import jaxlib.version
import pytest

from llavamed_jax.parallel import xla


def test_each_platform_has_its_own():
    is_new = jaxlib.version.__version_info__ >= (0, 10, 2)
    new = {"xla_gpu_enable_dus_accumulator_zero_init_elimination": True} if is_new else {}
    assert xla.options("gpu", xla.UPDATE) == {
        "xla_gpu_memory_limit_slop_factor": 150, "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 20,
        "xla_gpu_all_gather_combine_threshold_bytes": 1 << 20, **new}
    whole = {"xla_gpu_experimental_force_split_k": 1} if is_new else {}  # 0 would be XLA's own choice
    assert xla.options("gpu", xla.ENGINE) == {"xla_gpu_dot_merger_threshold_mb": 0, **whole}
    assert set(xla.options("tpu", xla.UPDATE)) == {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}
    assert xla.options("tpu", xla.ENGINE) is xla.options("cpu", xla.UPDATE) is xla.options("metal", xla.ENGINE) is None


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_a_flag_that_the_user_sets_is_left_to_the_user(monkeypatch, variable):
    monkeypatch.setenv(variable, "--xla_dump_to=/tmp/x --xla_gpu_memory_limit_slop_factor=90")
    rest = set(xla.FLAGS["gpu"][xla.UPDATE]) - {"xla_gpu_memory_limit_slop_factor"}
    assert set(xla.options("gpu", xla.UPDATE) or {}) == rest and xla.options("gpu", xla.ENGINE)
    monkeypatch.setenv(variable, "--xla_gpu_memory_limit_slop_factor_of_another=90")
    assert set(xla.options("gpu", xla.UPDATE)) == {*rest, "xla_gpu_memory_limit_slop_factor"}
    monkeypatch.setenv(variable, " ".join(f"--{name}=1" for name in xla.FLAGS["gpu"][xla.UPDATE]))
    assert xla.options("gpu", xla.UPDATE) is None


def test_a_version_of_jaxlib_without_a_flag_is_not_given_it(monkeypatch):
    monkeypatch.setattr(xla.jaxlib.version, "__version_info__", (0, 10, 1))
    assert set(xla.options("gpu", xla.UPDATE)) == set(xla.FLAGS["gpu"][xla.UPDATE]) - set(xla._SINCE)
    assert set(xla.options("gpu", xla.ENGINE)) == set(xla.FLAGS["gpu"][xla.ENGINE]) - set(xla._SINCE)
    assert not set(xla._SINCE) & set(xla.options("gpu", xla.UPDATE)) and "xla_gpu_memory_limit_slop_factor" in xla.options("gpu", xla.UPDATE)
