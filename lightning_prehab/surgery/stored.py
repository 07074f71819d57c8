"""What a state dict says of the layers of a model: their factors, and layers that would fit it. Changes nothing."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prehab.errors import CheckpointError
from lightning_prehab.factorizations import Factors
from lightning_prehab.kinds import MatrixView, kind_of
from lightning_prehab.layers.linear import LowRankLayer, weights_in
from lightning_prehab.layers.pivot import bias_holder
from lightning_prehab.linalg.pivot import as_factor, is_order
from lightning_prehab.linalg.sparse import Sparse
from lightning_prehab.targets.locate import Layer
from lightning_prehab.targets.names import join, stored_name


def stored_factors(state_dict: Mapping[str, Any], prefix: str = "") -> dict[str, Factors]:
    """The factors that a state dict holds, by layer name; ``bias_shift`` is the stored bias."""
    found: dict[str, Factors] = {}
    for key, a in state_dict.items():
        name = key.removeprefix(prefix).removesuffix(".A.weight")
        b = state_dict.get(f"{prefix}{name}.B.weight")
        if key == f"{prefix}{name}.A.weight" and isinstance(a, Tensor) and isinstance(b, Tensor):
            places, values = (state_dict.get(f"{prefix}{name}.{part}") for part in ("indices", "values"))
            sparse = Sparse(places, values) if isinstance(places, Tensor) and isinstance(values, Tensor) else None
            found[name] = Factors(a, b, state_dict.get(f"{prefix}{name}.B.bias"), sparse)
        name = key.removeprefix(prefix).removesuffix(".D.weight")
        parts = [state_dict.get(f"{prefix}{name}.{part}") for part in ("D.weight", "C.weight", "order")]
        d, c, order = (part if isinstance(part, Tensor) else None for part in parts)
        if key == f"{prefix}{name}.D.weight" and d is not None and c is not None and order is not None:
            found[name] = _pivoted(name, d, c, order)._replace(bias_shift=state_dict.get(f"{prefix}{name}.bias"))
    return found


def _pivoted(name: str, d: Tensor, c: Tensor, order: Tensor) -> Factors:
    """Factors in the pivot layout, checked against each other."""
    if c.dim() != d.dim() or c.dim() < 2 or c.shape[1] != len(d) or not is_order(order, len(d) + len(c)):
        raise CheckpointError(
            f"Layer {name!r}: the checkpoint holds pivot rows of shape {tuple(d.shape)} and {tuple(c.shape)} with an "
            f"order of shape {tuple(order.shape)}, which do not belong together; the file is damaged."
        )
    return Factors(d, as_factor(c, order), order=order)


def follower(
    modules: Mapping[str, nn.Module],
    name: str,
    stored: Mapping[str, Factors],
    state_dict: Mapping[str, Any],
    prefix: str,
) -> nn.Module | None:
    """What a layer has to be replaced by to fit a state dict, or None if it fits already."""
    module, key = modules[name], stored_name(name)
    dense = module.to_dense() if isinstance(module, LowRankLayer) else module
    found = factors_of_layer(key, Layer.at(name, dense, modules), stored)
    if found is not None:
        new = _low_rank_like(dense, *found)
        return None if isinstance(module, LowRankLayer) and _alike(module, new) else new
    if dense is module or not any(f"{prefix}{key}.{own}" in state_dict for own, _ in dense.named_parameters()):
        return None
    if isinstance(dense, nn.Linear | nn.Conv1d | nn.Conv2d):
        _fit_bias(dense, f"{prefix}{key}.bias" in state_dict, dense.weight)
    return dense


def factors_of_layer(
    name: str, layer: Layer, stored: Mapping[str, Factors]
) -> tuple[dict[str, MatrixView], dict[str, Factors]] | None:
    """The matrices of a dense layer and those of the stored factors that belong to it, by part; None if none do.

    Args:
        name: Name of the layer as it stands in the state dict.
        layer: The layer.
        stored: As from :func:`stored_factors`.

    Raises:
        CheckpointError: If the shapes do not fit.
    """
    error: CheckpointError | None = None
    for views in [*layer.candidates(split_fused=False), *layer.candidates(split_fused=True)]:
        found = {part: stored[join(name, part)] for part in views if join(name, part) in stored}
        try:
            if found:
                return views, {part: _fitting(join(name, part), views[part], found[part]) for part in found}
        except CheckpointError as caught:
            error = caught if error is None else error
    if error is not None:
        raise error
    return None


def shapes_of(factors: Mapping[str, Factors]) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices that factors stand for, by name."""
    return {name: (found.B.shape[0], found.A.shape[1]) for name, found in factors.items()}


def _fitting(name: str, view: MatrixView, stored: Factors) -> Factors:
    """Stored factors as matrices, checked against the matrix that they stand for."""
    m, n, groups = *view.shape, view.group_count
    a, b, bias, sparse, order = stored
    try:
        a, b = view.unfold(a, b)
        rank = b.shape[1] if b.dim() == 2 else 0
        fits = b.shape == (m, rank) and a.shape == (groups * rank, n) and rank > 0
    except RuntimeError:
        fits = False
    if not fits:
        raise CheckpointError(
            f"Layer {name!r}: the checkpoint holds factors of shapes {tuple(stored.B.shape)} and "
            f"{tuple(stored.A.shape)}, the model has a {m}x{n} layer. Build the model with the same sizes as the one "
            "that was saved."
        )
    if sparse is not None and not sparse.fits(m, n):
        raise CheckpointError(
            f"Layer {name!r}: the checkpoint holds a sparse part of {sparse.values.numel()} values that has no place "
            f"in a {m}x{n} weight; the file is damaged, or the model has other sizes than the one that was saved."
        )
    return Factors(a, b, bias, sparse, order)


def _low_rank_like(dense: nn.Module, views: Mapping[str, MatrixView], factors: Mapping[str, Factors]) -> LowRankLayer:
    """The low-rank layer for stored factors, with the biases that were stored with them."""
    kind = kind_of(dense)
    assert kind is not None
    new = kind.low_rank(dense, views, factors)
    for part, stored in factors.items():
        child: Any = new.get_submodule(part)
        _fit_bias(bias_holder(child), stored.bias_shift is not None, next(weights_in(child)), stored.bias_shift)
    return new


def _fit_bias(module: nn.Module, wanted: bool, like: Tensor, value: Tensor | None = None) -> None:
    """Gives a layer a bias, or takes it away; one that is there is left as it is."""
    if not wanted:
        module.register_parameter("bias", None)
    elif module._parameters["bias"] is None:
        start = like.new_zeros(len(like)) if value is None else value.detach().to(like, copy=True)
        module.register_parameter("bias", nn.Parameter(start, requires_grad=like.requires_grad))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers have the same structure, of the same sizes."""
    shapes = [{key: tensor.shape for key, tensor in module.state_dict().items()} for module in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]
