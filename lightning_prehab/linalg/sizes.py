"""The gradient of the size of a product, by its parts; the product itself is never formed."""

from torch import Tensor


def product_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``0.5 |B A|_F^2``: ``B^T (B A)`` and ``(B A) A^T``, by way of the small Gram matrices.

    Frobenius decay (Wang et al., "Pufferfish", 2021, https://arxiv.org/abs/2103.03936, and "Cuttlefish", 2023,
    https://arxiv.org/abs/2305.02538) takes them in the place of ``A`` and ``B``, the gradients of weight decay.

    Args:
        a: Shape ``(*, r, n)``.
        b: Shape ``(*, m, r)``.

    Returns:
        Of the shapes of ``a`` and ``b``.

    >>> import torch
    >>> product_gradients(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))
    (tensor([[12., 16.]]), tensor([[50.]]))
    """
    return (b.mT @ b) @ a, b @ (a @ a.mT)


def pivot_gradients(d: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``0.5 |[D; C D]|_F^2``, the matrix in the pivot layout.

    Args:
        d: Shape ``(r, n)``.
        c: Shape ``(m - r, r)``.

    Returns:
        Of the shapes of ``d`` and ``c``.
    """
    for_d, for_c = product_gradients(d, c)
    return d + for_d, for_c
