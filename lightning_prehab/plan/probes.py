"""Measures what a small cut of each layer alone does to the model's output; nothing is changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prehab.errors import StatisticsError
from lightning_prehab.factorizations import Factors
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.linalg.storage import Layout, largest_saving_rank, rank_within
from lightning_prehab.progress import counted, naming_items, tell
from lightning_prehab.rank_policies import Probe
from lightning_prehab.rank_policies.base import check_probe_keep
from lightning_prehab.statistics.batches import (
    as_predicted,
    ask_model,
    batch_size,
    check_batches,
    has_decoder,
    to_device,
)
from lightning_prehab.statistics.calibration import Forward, as_found
from lightning_prehab.statistics.collector import recompile, run_eagerly
from lightning_prehab.statistics.divergence import divergence
from lightning_prehab.statistics.outputs import logits_in, loss_in, require_finite_output
from lightning_prehab.targets.layouts import layout_of
from lightning_prehab.targets.locate import Target, locate
from lightning_prehab.targets.names import join


@outside_inference_mode
def measure_probes(
    model: nn.Module,
    targets: Mapping[str, Target],
    factors_of: Callable[[str, int], Factors],
    batches: Iterable[Any],
    probe_keep: float = 0.9,
    forward: Forward | None = None,
    layout: Layout = "factors",
) -> dict[str, Probe]:
    """Runs the model with one target cut at a time and compares its output with that of the dense model.

    The difference is the mean over samples of the Kullback-Leibler divergence from the dense model's logits, summed
    over positions (those of the ``attention_mask`` where it fits); for a model that returns a loss only, the increase
    of the loss, and 0 if it falls. The model runs in eval mode without autograd, one pass for each target and batch,
    and is left as it was: weights, modes, gradients, hooks. Each pass starts from the same random state, the one that
    is found and left. The dense outputs of all batches stay in memory: a few batches are enough.

    Args:
        model: The module that holds the targets.
        targets: ``{name: layer}``, as from :func:`~lightning_prehab.find_targets`.
        factors_of: ``(name, rank) -> Factors`` of a target; called once for each.
        batches: A mapping is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, a tensor as
            ``model(batch)``.
        probe_keep: Share of its parameters that a layer is cut to, in ``(0, 1)``.
        forward: ``(model, batch) -> output`` instead of that. A scalar output is taken as the loss, a mean over
            samples; a tensor of two or more dimensions as logits, classes last.
        layout: How a cut layer is going to be stored, which says how many parameters a rank has.

    Returns:
        ``{name: Probe}``, without the targets that the passes do not reach.

    Raises:
        ArgumentError: If ``probe_keep`` is out of range, or the batches are no iterable of batches.
        StatisticsError: If there are no batches, or an output has no logits and no loss.
        NumericalError: If an output holds NaN or Inf (the layer that was cut is named).
    """
    check_probe_keep(probe_keep)
    check_batches(batches, forward)
    device = next(model.parameters()).device
    listed = [to_device(batch, device) for batch in batches]
    samples = sum(batch_size(batch) for batch in listed)
    if samples == 0:
        raise StatisticsError("batches is empty; probes need at least one batch.")

    def outputs() -> Iterator[Tensor]:
        for batch in listed:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                output = ask_model(model, batch) if forward is None else forward(model, batch)
            yield _logits_or_loss(output)

    probes = {}
    named = naming_items("probe", list(targets))
    with torch.no_grad(), as_found(model), closing(_Cutter(model, targets)) as cutter, named:
        tell("probe", 0, len(targets))  # the pass of the dense model belongs to it
        dense = list(outputs())
        for output in dense:
            require_finite_output(output, "The output of the dense model")
        for name, target in counted(targets.items(), "probe"):
            if name not in cutter.reached:
                continue
            view = view_of(target)
            rank = probe_rank(*view.shape, probe_keep, view.group_count, layout_of(target, layout))
            cutter.cut(name, factors_of(name, rank))
            total = 0.0
            for batch, before, after in zip(listed, dense, outputs(), strict=True):
                require_finite_output(after, f"Layer {name!r} cut to rank {rank}: the output of the model")
                total += _increase(before, after, as_predicted(batch, has_decoder(model)))
            probes[name] = Probe(rank, max(total / samples, 0.0))
    return probes


def probe_rank(
    out_features: int, in_features: int, probe_keep: float, groups: int = 1, layout: Layout = "factors"
) -> int:
    """The largest rank with at most the given share of the dense parameters; at least 1, none that saves nothing.

    >>> probe_rank(768, 768, 0.9), probe_rank(768, 768, 0.9, layout="pivot")
    (345, 525)
    """
    wanted = rank_within(probe_keep * out_features * in_features, out_features, in_features, layout, groups)
    return max(min(wanted, largest_saving_rank(out_features, in_features, layout, groups)), 1)


class _Cutter:
    """Hooks on the layers of all targets; while a matrix is cut, the hook of its layer returns what the cut one would.

    All hooks are there from the start: a compiled model is then compiled once, not once for each target.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Target]) -> None:
        recompile()
        self.reached: set[str] = set()
        self._layers = locate(model, {name: view_of(target).shape for name, target in targets.items()})
        self._names = {join(name, part): (name, part) for name, (_, views) in self._layers.items() for part in views}
        self._active: tuple[str, nn.Module] | None = None
        self._bias: tuple[Tensor, Tensor] | None = None  # the one that is shifted, and as it was
        self._handles = [
            layer.module.register_forward_hook(
                run_eagerly(cast(Callable[..., None], self._hook(name, [join(name, part) for part in views]))),
                with_kwargs=True,
            )
            for name, (layer, views) in self._layers.items()
        ]

    def cut(self, name: str, factors: Factors) -> None:
        """From now on the named matrix is cut, and no other."""
        self._restore()
        layer_name, part = self._names[name]
        layer, views = self._layers[layer_name]
        assert layer.kind is not None
        view, weight = views[part], views[part].parameter
        new = layer.kind.low_rank(layer.module, views, {part: factors})
        if factors.bias_shift is not None:
            shift = view.to_bias(factors.bias_shift).to(weight)
            if view.bias is None:
                child: Any = new.get_submodule(part)
                child.B.bias = nn.Parameter(shift, requires_grad=False)
            else:
                self._bias = view.bias, view.bias.clone()
                self._bias[0].add_(shift)
        self._active = layer_name, new

    def close(self) -> None:
        """Takes the hooks off again."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        recompile()

    def _restore(self) -> None:
        self._active = None
        if self._bias is not None:
            self._bias[0].copy_(self._bias[1])
            self._bias = None

    def _hook(self, layer: str, names: Sequence[str]) -> Callable[..., Any]:
        def replace_output(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any], output: Any) -> Any:
            self.reached.update(names)
            if self._active is None or self._active[0] != layer:
                return None
            return self._active[1](*args, **settings)

        return replace_output


def _logits_or_loss(output: Any) -> Tensor:
    """Logits of shape ``(..., classes)`` where there are any, else the loss as a scalar."""
    for found in (logits_in(output), loss_in(output)):
        if found is not None:
            return found
    shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
    raise StatisticsError(
        f"The output ({type(output).__name__}{shape}) has no logits of two or more classes in its last dimension and "
        "no loss; pass loss=, a function (model, batch) -> scalar."
    )


def _increase(before: Tensor, after: Tensor, batch: Any) -> float:
    """What the cut did to one batch, as a sum over its samples."""
    if before.dim() == 0:
        return float(after.double() - before.double()) * batch_size(batch)
    return divergence(before, after, batch)[0]
