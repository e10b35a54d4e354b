"""How near vectors come to those of the same model in float32."""

from dataclasses import dataclass

import numpy as np

SAMPLE = 128  # passages that are compared: enough for the worst of a corpus, seconds of work for a small model
_NEIGHBOURS = 10


@dataclass(frozen=True)
class Quality:
    """What `compare` found."""

    passages: int
    least_cosine: float
    recall_at_10: float
    """Share of each passage's ten nearest passages that are the same ten in float32."""

    def __str__(self) -> str:
        return (
            f"least cosine {self.least_cosine:.5f} and recall@10 {self.recall_at_10:.3f} against float32, "
            f"on {self.passages} passages"
        )


def compare(found: np.ndarray, reference: np.ndarray) -> Quality:
    """Vectors against those that they should be, both (n, d) with n > 0."""
    one, other = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (found, reference))
    mine, wanted = (_neighbours(vectors) for vectors in (one, other))
    shared = [len(set(a) & set(b)) / max(1, len(b)) for a, b in zip(mine, wanted, strict=True)]
    return Quality(
        passages=len(found),
        least_cosine=round(float((one * other).sum(axis=1).min()), 6),
        recall_at_10=round(float(np.mean(shared)), 4) if len(found) > 1 else 1.0,
    )


def spread(count: int, most: int = SAMPLE) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()


def _neighbours(vectors: np.ndarray) -> np.ndarray:
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argsort(-likeness)[:, : min(_NEIGHBOURS, len(vectors) - 1)]
