"""Collects layer statistics in a loop of its own."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.documents.checks import check_kind
from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.kinds import view_of
from lightning_prehab.linalg.matrices import require_finite, widened
from lightning_prehab.linalg.modes import in_full_precision, outside_inference_mode
from lightning_prehab.progress import counted
from lightning_prehab.statistics.backward import cheaply_if_possible, gradients_for
from lightning_prehab.statistics.batches import NO_BATCHES, ask_model, batch_size, check_batches, to_device
from lightning_prehab.statistics.collector import Collector
from lightning_prehab.statistics.sums import LayerStatistics, Wanted
from lightning_prehab.targets.locate import Target

#: Calls the model on a batch and returns its output, or the loss as a scalar tensor.
Forward = Callable[[nn.Module, Any], Any]

_log = logging.getLogger("lightning_prehab.calibration")  # a name that people filter by


@outside_inference_mode
def collect_statistics(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Any],
    forward: Forward | None = None,
    gradients: bool = False,
    wanted: Wanted | None = None,
) -> dict[str, LayerStatistics]:
    """Runs the model over some batches and sums what goes through the targets.

    The model runs in eval mode and is left as it was: modes, gradients, ``requires_grad``, hooks, global random state.
    Batches are moved to the device of the first parameter. An ``attention_mask`` in a batch leaves the padding out.
    Every token is counted; the Gram matrix of the wide side of a matrix may be estimated from a part of them, if it
    would cost more than the layer itself.

    Args:
        model: The module that holds the targets.
        targets: ``{name: layer}``, as from :func:`~lightning_prehab.find_targets`.
        batches: A mapping is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, a tensor as
            ``model(batch)``.
        forward: ``(model, batch) -> output`` instead of that. A scalar output is taken as the loss.
        gradients: Collect output and weight gradients too. The loss is a scalar output, else the output's ``.loss``,
            else the cross-entropy of labels sampled from the model's own logits (last dimension: classes), which needs
            no labels: the true Fisher matrix (Martens, 2014, https://arxiv.org/abs/1412.1193).
        wanted: Exactly what to collect, for example ``factorization.wanted``, instead of what ``gradients`` says.

    Returns:
        ``{name: LayerStatistics}`` for every target; those of a grouped convolution for each group, ``"name:0"`` and
        so on.

    Raises:
        ArgumentError: If an argument is something else, or the model cannot be called on a batch.
        StatisticsError: If there are no batches, or no loss can be found.
        NumericalError: If a weight (the layer is named) or the model's logits are not finite.
    """
    check_kind("model", model, nn.Module, "an nn.Module")
    check_kind("targets", targets, Mapping, "a mapping of layers by name, as find_targets returns it")
    check_kind("wanted", wanted, Wanted, "a Wanted, such as factorization.wanted", optional=True)
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"{type(model).__name__} has no parameters, so there is nothing to collect statistics of.")
    batches = [] if batches is None else batches
    check_batches(batches, forward)
    if wanted is None:
        gradients = bool(gradients)
        wanted = Wanted(inputs=True, gradients=gradients, weight_gradients=gradients, magnitudes=True)
    for name, layer in targets.items():
        require_finite(view_of(layer).weight.detach(), f"Layer {name!r}: the weight")
    if isinstance(batches, Iterator) or not wanted.backward:
        return _pass(model, targets, batches, forward, wanted, cheap=True)
    return cheaply_if_possible(lambda cheap: _pass(model, targets, batches, forward, wanted, cheap))


def _pass(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Any],
    forward: Forward | None,
    wanted: Wanted,
    cheap: bool,
) -> dict[str, LayerStatistics]:
    """One run over the batches; if it is to be cheap, without weight gradients."""
    collector = Collector(targets, wanted, own_pass=True)
    _log.info("Calibration of %d layers: at most %.1f MB of sums.", len(targets), collector.memory() / 1e6)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    seen = 0
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with as_found(model), random, gradients_for(model, targets, wanted.backward, cheap):
        collector.attach()
        try:
            for batch in (to_device(found, device) for found in counted(batches, "calibrate")):
                collector.begin_batch(batch, seen)
                with torch.set_grad_enabled(wanted.backward):
                    output = ask_model(model, batch) if forward is None else forward(model, batch)
                    if wanted.backward:
                        loss = loss_of(output, batch_size(batch), generator)
                        if not loss.requires_grad:
                            raise StatisticsError(
                                "The loss has no gradient: it was computed under torch.no_grad(), detached, or does "
                                "not depend on the model. Return it with its graph."
                            )
                        # Not autograd.grad: reentrant checkpointing does not support it.
                        in_full_precision(loss.backward)()  # autocast is for forward passes
                        model.zero_grad(set_to_none=True)
                collector.end_batch()
                seen += 1
        finally:
            collector.detach()
    if seen == 0:
        raise StatisticsError(NO_BATCHES)
    return collector.statistics


def loss_of(output: Any, size: int, generator: torch.Generator) -> Tensor:
    """The loss of a batch, a mean over its samples."""
    if isinstance(output, Tensor) and output.dim() == 0:
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise StatisticsError(
            f"The output ({type(output).__name__}{shape}) has no loss and no logits of two or more classes in its last "
            "dimension; pass loss=, a function (model, batch) -> scalar."
        )
    flat = widened(logits).reshape(-1, logits.shape[-1])
    require_finite(flat.detach(), "The model's logits on the calibration data: the tensor")
    labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(flat.device)
    return nn.functional.cross_entropy(flat, labels, reduction="sum") / size


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside; everything as before outside, buffers that a forward pass writes to too."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]  # frozen: none
    try:
        model.eval()
        model.zero_grad(set_to_none=True)
        with _same_buffers(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever a forward pass does to buffers (a counter, a cache) is undone."""
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    found = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in plain
        for name, buffer in module._buffers.items()
        if buffer is not None and type(buffer) in (Tensor, nn.Buffer) and buffer.layout == torch.strided
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in found:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)
                buffers[name] = buffer
