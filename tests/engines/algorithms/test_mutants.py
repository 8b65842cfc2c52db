"""The mutation run's list fits the code as it is, and its record the list. `make mutants` runs it."""

import json

import pytest

from tests.engines.algorithms.mutants import MUTANTS
from tests.engines.algorithms.mutate import RESULTS, ROOT, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_every_mutant_can_be_made_of_the_code_as_it_is(mutant):
    file = ROOT / "engines" / "algorithms" / mutant.file
    compile(mutated(mutant, file.read_text()), mutant.file, "exec")


def test_the_record_has_every_mutant_and_a_test_that_kills_it():
    record = json.loads(RESULTS.read_text())
    assert [one["mutant"] for one in record] == [mutant.name for mutant in MUTANTS]
    assert all(one["killed_by"] for one in record)
