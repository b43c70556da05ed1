"""Identity and copying, as pure functions of embeddings.

Embeddings are unit vectors from the judge's recogniser. Identity is measured against *another* picture of the person
(the ground truth, which shows the person as the prompt describes), because similarity to the reference also rewards
copying the reference (WithAnyone, arXiv 2510.14975).
"""

from torch import Tensor

SMALLEST_ANGLE = 1e-2  # radians; keeps the copy-paste score finite where ground truth and reference are nearly equal


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of unit vectors, row by row: (N, D), (N, D) -> (N,)."""
    return (a * b).sum(-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Return the angle between unit vectors in radians, row by row: (N, D), (N, D) -> (N,)."""
    return similarity(a, b).clamp(-1, 1).arccos()


def copy_paste(output: Tensor, truth: Tensor, reference: Tensor, smallest: float = SMALLEST_ANGLE) -> Tensor:
    """M_CP of WithAnyone (arXiv 2510.14975): (angle(out, gt) - angle(out, ref)) / max(angle(gt, ref), eps), (N,).

    1: the output equals the reference. 0: it is as far from the reference as from the truth. -1: it equals the truth.
    """
    return (angle(output, truth) - angle(output, reference)) / angle(truth, reference).clamp(min=smallest)


def rank1(output: Tensor, gallery: Tensor, person: Tensor) -> Tensor:
    """Return 1 where the nearest row of the gallery (G, D), one row per person, is the right person, else 0.

    output (N, D), person (N,) -> (N,). A row of zeros, which stands for a picture without an embedding, is never right.
    """
    return (((output @ gallery.T).argmax(-1) == person) & output.any(-1)).float()
