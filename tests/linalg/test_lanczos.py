"""The leading right singular vector against numpy's SVD."""

import numpy as np
import pytest
import torch

from lightning_prehab.linalg.lanczos import leading_right_vector


def found(matrix: torch.Tensor, at_most: int = 300) -> torch.Tensor:
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(5), dtype=matrix.dtype)
    return leading_right_vector(matrix, start, at_most)


def sine(vector: torch.Tensor, exact: np.ndarray) -> float:
    u = torch.from_numpy(exact)
    return float((vector - u * (u @ vector)).norm())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 12), (40, 60), (60, 40), (200, 200)])
def test_it_is_the_vector_of_a_full_decomposition(shape, seed):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, s, vt = np.linalg.svd(matrix.numpy())
    vector = found(matrix)
    assert float(vector.norm()) == pytest.approx(1.0)
    assert sine(vector, vt[0]) < 1e-4
    assert float((matrix @ vector).norm()) == pytest.approx(s[0], rel=1e-9)


@pytest.mark.parametrize("values", [[2.0, 1.0, 1.0], [3.0, 0.0, 0.0], [1.0, 1.0 - 1e-6, 0.5]], ids=str)
def test_few_directions_and_close_ones(values):
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    assert sine(found(matrix), np.eye(3)[0]) < 1e-4


def test_equal_values_zeros_and_what_is_not_finite_give_some_unit_vector():
    for matrix in (torch.eye(30), torch.zeros(30, 20), torch.full((20, 30), float("nan"))):
        vector = found(matrix.double())
        assert float(vector.norm()) == pytest.approx(1.0)


def test_no_more_steps_than_are_allowed():
    class Counted:
        products = 0
        dtype = torch.float64

        def __init__(self, matrix):
            self.matrix = matrix

        @property
        def mT(self):
            return Counted(self.matrix.mT)

        def __matmul__(self, vector):
            Counted.products += 1
            return self.matrix @ vector

    matrix = Counted(torch.randn(50, 50, dtype=torch.float64))
    leading_right_vector(matrix, torch.ones(50, dtype=torch.float64), 7)
    assert Counted.products == 14
