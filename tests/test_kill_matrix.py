"""Fifty kills of a run, and the proof that the matrix notices what it is there for (`make torture`: five hundred)."""

import pytest
from kill_matrix import Violation, torture

pytestmark = pytest.mark.slow


def test_after_fifty_kills_everything_is_as_if_nothing_had_happened(tmp_path):
    matrix = torture(tmp_path, kills=50, seed=1)
    print(matrix.table())
    assert matrix.total >= 50
    assert matrix.orphans, "no script outlived its Snakemake"


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("lock", "second writer"),  # jobs that do not lock their shard
        ("rename", "is not whole"),  # files that are written where they belong
        ("cache", "computed more than once|ran again"),  # results that are not found again
    ],
)
def test_the_matrix_notices_a_broken_promise(tmp_path, broken, told):
    with pytest.raises(Violation, match=told):
        torture(tmp_path, kills=50, seed=1, broken=broken)
