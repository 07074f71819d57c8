"""Gives a sharded model the structure of a checkpoint, or dense layers back: nothing is sent, values come later."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prehab.linalg.factors import Factors
from lightning_prehab.linalg.modes import in_full_precision
from lightning_prehab.linalg.sparse import Sparse
from lightning_prehab.sharded.engine import Managed, managed_by, reshard_
from lightning_prehab.sharded.exchange import ShardedExchange, Shell
from lightning_prehab.sharded.swap import change_of
from lightning_prehab.surgery.optimizers import check_optimizer
from lightning_prehab.surgery.pretrained import check_pretrained
from lightning_prehab.surgery.stored import shapes_of
from lightning_prehab.surgery.swap import kind_of_exchange
from lightning_prehab.targets.locate import Layer, locate, low_rank_layers
from lightning_prehab.targets.names import clean_name


@in_full_precision
def put_structure_(
    model: nn.Module, factors: Mapping[str, Factors], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Puts low-rank layers in the place of dense ones, for values that are loaded afterwards; sends nothing.

    Args:
        model: A sharded module.
        factors: By the name of the matrix; they may be on the meta device, and are then zeros. A ``bias_shift`` stands
            for a bias where there is none.
        optimizers: Those that hold the weights; they start afresh with what takes their place.

    Raises:
        UnsupportedError: If an optimizer cannot be edited. Model and optimizers are as they were.
    """
    optimizers = list(optimizers)
    reshard_(model)
    index, exchanges = managed_by(model), []
    located = list(locate(model, shapes_of(factors)).values())
    check_pretrained(model, (layer.module for layer, _ in located))
    for layer, views in located:
        shell = Shell.of(layer, views, {})
        device = next(iter(shell.views.values())).parameter.device
        mine = {name: _with_values(one, device) for name, one in factors.items()}
        made = kind_of_exchange(views).prepare(shell.layer, shell.views, mine)
        heirs = {id(shell.originals[id(one)]): list(made.parameters(one)) for one in made.replaced()}
        exchanges.append(_divided(layer.module, made.new, heirs, shell, index))
    _commit(model, exchanges, optimizers)


@in_full_precision
def drop_structure_(model: nn.Module, names: Iterable[str], optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Puts dense layers in the place of low-rank ones, for values that are loaded afterwards; sends nothing.

    Args:
        model: A sharded module.
        names: Of the low-rank layers.
        optimizers: Those that hold the factors; they start afresh with what takes their place.

    Raises:
        UnsupportedError: If an optimizer cannot be edited. Model and optimizers are as they were.
    """
    optimizers, wanted = list(optimizers), set(names)
    reshard_(model)
    index, exchanges = managed_by(model), []
    for path, module in low_rank_layers(model):
        if clean_name(path) not in wanted:
            continue
        shell = Shell.of(Layer(clean_name(path), module, None, None, None), {}, {})
        plain = shell.layer.module
        dense = plain.to_dense()  # type: ignore[operator]
        heirs = _heirs(dict(module.named_parameters()), dict(dense.named_parameters()))
        exchanges.append(_divided(module, dense, heirs, shell, index))
    _commit(model, exchanges, optimizers)


def _commit(model: nn.Module, exchanges: list[ShardedExchange], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    weights = [weight for one in exchanges for weight in one.replaced()]
    for optimizer in optimizers:
        check_optimizer(optimizer, (), weights)
    change_of(model, exchanges, optimizers).commit()


def _divided(
    old: nn.Module, new: nn.Module, heirs: Mapping[int, list[str]], shell: Shell, index: Mapping[int, Managed]
) -> ShardedExchange:
    exchange = ShardedExchange(old, new, dict(heirs))
    exchange.divide_(shell, index)
    return exchange


def _with_values(factors: Factors, device: torch.device) -> Factors:
    """Factors on a device, with zeros for values that there are not, and places in ascending order."""

    def here(tensor: Tensor | None, places: bool = False) -> Tensor | None:
        if tensor is None or tensor.device.type != "meta":
            return None if tensor is None else tensor.detach().to(device)
        if places:
            return torch.arange(len(tensor), dtype=tensor.dtype, device=device)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    a, b, shift, order, indices, values = factors.parts()
    sparse = None if indices is None or values is None else Sparse(here(indices, True), here(values))  # type: ignore[arg-type]
    return Factors(here(a), here(b), here(shift), sparse, here(order, True))  # type: ignore[arg-type]


def _heirs(old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter]) -> dict[int, list[str]]:
    """For the id of each parameter the names of what takes its place: one of as many dimensions, from as near by."""
    found: dict[int, list[str]] = {id(one): [] for one in old.values()}
    for name, one in new.items():
        alike = [key for key, theirs in old.items() if (theirs.dim() > 1) == (one.dim() > 1)] or list(old)
        found[id(old[max(alike, key=lambda key: _shared(key, name))])].append(name)
    return found


def _shared(one: str, other: str) -> int:
    """How many parts of two dotted names agree, from the first on."""
    pairs = list(zip(one.split(".")[:-1], other.split(".")[:-1], strict=False))
    return next((count for count, (left, right) in enumerate(pairs) if left != right), len(pairs))
