"""Collects layer statistics with temporary hooks, from a loop of its own or from somebody else's training steps."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.statistics import LayerStatistics

#: Calls the model on a batch and returns its output, or the loss as a scalar tensor.
Forward = Callable[[nn.Module, Any], Any]


class Collector:
    """Forward hooks on the targets that add what passes by to :class:`LayerStatistics`.

    With gradients, a token is counted when its gradient arrives, so a forward pass that is repeated (gradient
    checkpointing) or never followed by a backward pass (validation) counts once or not at all.

    Args:
        targets: ``{name: layer}``.
        gradients: Whether output gradients are collected too.
        drop_overflow: Leave out tokens whose gradient is not finite, as loss scaling in fp16 produces now and then.

    Attributes:
        statistics: ``{name: LayerStatistics}``, complete from the start, with zero counts.
    """

    def __init__(self, targets: Mapping[str, nn.Linear], *, gradients: bool, drop_overflow: bool = False) -> None:
        self._targets = dict(targets)
        self._gradients = gradients
        self._drop_overflow = drop_overflow
        self._handles: list[RemovableHandle] = []
        self._mask: Tensor | None = None
        self._batch_size = 1
        self._counting = False
        self.loss_scale = 1.0
        self.statistics = {
            name: LayerStatistics(
                layer.in_features, layer.out_features, gradients=gradients, device=layer.weight.device
            )
            for name, layer in self._targets.items()
        }

    def attach(self) -> None:
        """Puts the hooks on the layers; they are idle between batches."""
        _recompile()
        for name, layer in self._targets.items():
            self._handles.append(
                layer.register_forward_hook(_run_eagerly(self._hook(self.statistics[name])), with_kwargs=True)
            )

    def detach(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _recompile()
        self._handles.clear()
        self._counting = False

    def begin_batch(self, batch: Any) -> None:
        """Starts counting; the padding mask and the number of samples are read from the batch."""
        self._mask, self._batch_size = padding_mask(batch), batch_size(batch)
        self.loss_scale = 1.0
        self._counting = True
        for statistics in self.statistics.values():
            statistics.add_samples(self._batch_size)

    def end_batch(self) -> None:
        """Stops counting until the next batch begins."""
        self._counting, self._mask = False, None

    def _hook(self, statistics: LayerStatistics) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any], output: Any) -> None:
            if not self._counting:
                return
            x = (args[0] if args else settings["input"]).detach()
            if not self._gradients:
                statistics.update_inputs(self._tokens(x))
            elif output.requires_grad:
                if torch.is_autocast_enabled(x.device.type) or not module.weight.requires_grad:
                    x = x.clone()  # autograd does not guard this tensor itself: it may be changed in place later
                output.register_hook(lambda gradient: self._add(statistics, x, gradient))
            elif torch.is_grad_enabled():  # frozen: there will be no gradient
                statistics.update_inputs(self._tokens(x))

        return count

    def _add(self, statistics: LayerStatistics, x: Tensor, gradient: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, g = self._tokens(x), self._tokens(gradient.detach())
            if self._drop_overflow:
                finite = torch.isfinite(g).all(-1)
                x, g = x[finite], g[finite]
            statistics.update_inputs(x)
            # The gradient of the mean over the batch, times its size, is that of the sample's own loss.
            statistics.update_gradients(g.float() * (self._batch_size / self.loss_scale))

    def _tokens(self, x: Tensor) -> Tensor:
        """Flattened to ``(tokens, features)``, padding left out where the mask fits the leading dimensions."""
        if self._mask is not None and self._mask.shape == x.shape[:-1]:
            return x[self._mask]
        return x.reshape(-1, x.shape[-1])


def collect_statistics(
    model: nn.Module,
    targets: Mapping[str, nn.Linear],
    batches: Iterable[Any],
    forward: Forward | None = None,
    gradients: bool = False,
) -> dict[str, LayerStatistics]:
    """Runs the model over some batches and sums what goes through the targets.

    The model runs in eval mode and is left as it was: modes, gradients, ``requires_grad``, hooks, global random state.
    Batches are moved to the device of the first parameter. An ``attention_mask`` in a batch leaves the padding out.

    Args:
        model: The module that holds the targets.
        targets: ``{name: layer}``, as from :func:`~lightning_prehab.find_targets`.
        batches: A mapping is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, a tensor as
            ``model(batch)``.
        forward: ``(model, batch) -> output`` instead of that. A scalar output is taken as the loss.
        gradients: Collect output gradients too. The loss is a scalar output, else the output's ``.loss``, else the
            cross-entropy of labels sampled from the model's own logits (last dimension: classes), which needs no
            labels: the true Fisher matrix (Martens, 2014, https://arxiv.org/abs/1412.1193).

    Returns:
        ``{name: LayerStatistics}`` for every target.

    Raises:
        StatisticsError: If there are no batches, or no loss can be found.
    """
    if isinstance(batches, Tensor):
        raise ArgumentError("batches is one tensor; give an iterable of batches, for example batches=[tensor].")
    collector = Collector(targets, gradients=gradients)
    generator = torch.Generator().manual_seed(0)
    weights = [cast(nn.Parameter, layer.weight) for layer in targets.values()]
    device = next(model.parameters()).device
    seen = 0
    with _as_found(model, weights):
        collector.attach()
        try:
            for batch in (_to_device(found, device) for found in batches):
                collector.begin_batch(batch)
                with torch.set_grad_enabled(gradients):
                    output = _call(model, batch) if forward is None else forward(model, batch)
                    if gradients:
                        loss = _loss_of(output, batch_size(batch), generator)
                        # Not autograd.grad: reentrant checkpointing does not support it.
                        loss.backward()  # type: ignore[no-untyped-call]
                        model.zero_grad(set_to_none=True)
                collector.end_batch()
                seen += 1
        finally:
            collector.detach()
    if seen == 0:
        raise StatisticsError("batches is empty; calibration needs at least one batch.")
    return collector.statistics


def _run_eagerly(hook: Callable[..., None]) -> Callable[..., None]:
    """Keeps the hook out of compiled graphs, where there are any."""
    if "torch._dynamo" not in sys.modules:
        return hook
    eager: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return eager


def _recompile() -> None:
    """Makes ``torch.compile`` look at the modules again: code compiled before does not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def batch_size(batch: Any) -> int:
    """Size of the first dimension of the first tensor found in a batch; 1 if there is none.

    >>> batch_size({"x": torch.zeros(4, 3), "y": torch.zeros(4)})
    4
    """
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    return 1


def padding_mask(batch: Any) -> Tensor | None:
    """The ``attention_mask`` of a mapping, or of one inside a tuple or list.

    Returns:
        Booleans of shape ``(batch, positions)``, True for tokens; None if there is no such mask.
    """
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if isinstance(batch, tuple | list):
        return next((mask for part in batch if (mask := padding_mask(part)) is not None), None)
    return None


def _call(model: nn.Module, batch: Any) -> Any:
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, tuple | list):
            return model(*batch)
        if isinstance(batch, Tensor):
            return model(batch)
    except TypeError as error:
        raise ArgumentError(
            f"The model cannot be called on a batch of type {type(batch).__name__} ({error}); pass forward= or loss=, "
            "a function of (model, batch)."
        ) from error
    raise ArgumentError(
        f"A batch must be a mapping, a tuple, a list or a tensor, got {type(batch).__name__}; pass forward= or "
        "loss= to call the model yourself."
    )


def _loss_of(output: Any, size: int, generator: torch.Generator) -> Tensor:
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
    flat = logits.float().reshape(-1, logits.shape[-1])
    labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(flat.device)
    return nn.functional.cross_entropy(flat, labels, reduction="sum") / size


@contextmanager
def _as_found(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Eval mode and differentiable weights inside; everything as before outside."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in weights]
    try:
        model.eval()
        model.zero_grad(set_to_none=True)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, requires_grad in flags:
            weight.requires_grad_(requires_grad)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _to_device(batch: Any, device: torch.device) -> Any:
    """The batch on the device; its type is kept wherever it can be."""
    if all(tensor.device == device for tensor in _tensors(batch)):
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_to_device(value, device) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)
