"""XLA's flags: whose they are, and that the user's win."""

import pytest

from llavamed_jax.parallel import xla


def test_each_platform_has_its_own():
    assert xla.options("gpu", xla.UPDATE) == {"xla_gpu_memory_limit_slop_factor": 115}
    assert set(xla.options("gpu", xla.ENGINE)) == {"xla_gpu_dot_merger_threshold_mb"}
    assert set(xla.options("tpu", xla.UPDATE)) == {"xla_jf_spmd_threshold_for_windowed_einsum_mib"}
    assert xla.options("tpu", xla.ENGINE) is xla.options("cpu", xla.UPDATE) is xla.options("metal", xla.ENGINE) is None


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_a_flag_that_the_user_sets_is_left_to_the_user(monkeypatch, variable):
    monkeypatch.setenv(variable, "--xla_dump_to=/tmp/x --xla_gpu_memory_limit_slop_factor=90")
    assert xla.options("gpu", xla.UPDATE) is None and xla.options("gpu", xla.ENGINE)
    monkeypatch.setenv(variable, "--xla_gpu_memory_limit_slop_factor_of_another=90")
    assert xla.options("gpu", xla.UPDATE)
