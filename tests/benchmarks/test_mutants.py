"""The mutants of `benchmarks/mutants.py` fit the package."""

import pytest

from benchmarks.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests(mutant):
    text = (ROOT / "llavamed_jax" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.text) == 1
    compile(text.replace(mutant.text, mutant.wrong), mutant.file, "exec")
    assert mutant.tests and all((ROOT / "tests" / name).exists() for name in mutant.tests)
