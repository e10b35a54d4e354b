"""Fifty kills of a run, and the proof that the matrix notices what it is there for (`make torture`: five hundred)."""

import pytest
from kill_matrix import Kill, Matrix, Violation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix(tmp_path_factory, site):
    matrix = Matrix(tmp_path_factory.mktemp("kills"), seed=1)
    matrix.reference(site)
    return matrix


def test_after_fifty_kills_everything_is_as_if_nothing_had_happened(matrix, site):
    matrix.run(site, kills=50)
    print(matrix.table())
    assert matrix.total >= 50
    assert matrix.orphans, "no script outlived its Snakemake"


@pytest.mark.parametrize(
    ("broken", "told", "kill"),
    [
        # Jobs do not lock their shard: the next run works beside the orphan.
        ("lock", "second writer", Kill("transcribe", "inside the model", 1, "snakemake", "SIGKILL")),
        # Files are written where they belong: half of one is there.
        ("rename", "is not whole", Kill("transcribe", "inside a Parquet write", 2, "tree", "SIGKILL")),
        # What was computed is not found again.
        ("cache", "computed more than once", Kill("transcribe", "inside the model", 4, "tree", "SIGKILL")),
    ],
)
def test_the_matrix_notices_a_broken_promise(matrix, site, broken, told, kill):
    with pytest.raises(Violation, match=told):
        matrix.once(site, kill, broken)


def test_the_same_kill_does_no_harm_when_the_promises_are_kept(matrix, site):
    matrix.once(site, Kill("transcribe", "inside the model", 4, "tree", "SIGKILL"))
