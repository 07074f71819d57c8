"""Collects layer statistics with temporary hooks, from a loop of its own or from somebody else's training steps."""

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.statistics import LayerStatistics, Wanted, statistics_bytes

_log = logging.getLogger(__name__)

#: Tokens that a Gram matrix is estimated from, per row, where the number of batches is known.
TOKENS_PER_FEATURE = 8
#: And in any case so many of each batch.
MIN_TOKENS = 256

#: Calls the model on a batch and returns its output, or the loss as a scalar tensor.
Forward = Callable[[nn.Module, Any], Any]


@dataclass(eq=False)
class _Watched:
    """A layer under observation: its sums, the weight gradient of this batch, and with whom it shares inputs."""

    statistics: LayerStatistics
    weight_gradient: Tensor | None = None
    leader: "_Watched | None" = None
    followers: "list[_Watched]" = field(default_factory=list)
    calls: int = 0

    def follow(self, leader: "_Watched") -> None:
        """From now on the input sums are those of the leader."""
        self.leader = leader
        leader.followers.append(self)
        self.statistics.share_inputs_(leader.statistics)

    def leave(self, sums: Mapping[str, Tensor] | None = None) -> None:
        """Goes on with a copy of the common sums, or with those given."""
        assert self.leader is not None
        self.leader.followers.remove(self)
        self.leader = None
        self.statistics.unshare_inputs_(sums)


@dataclass(eq=False)
class _Meal:
    """A tensor that a leader was just fed with; followers that are fed with it too confirm, the others leave."""

    tensor: "weakref.ref[Tensor]"
    version: int
    leader: _Watched
    before: dict[str, Tensor] | None  # the leader's sums without this tensor, if it is counted at once
    confirmed: list[_Watched] = field(default_factory=list)

    def is_made_of(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version == x._version

    def close(self) -> None:
        for follower in [f for f in self.leader.followers if f not in self.confirmed]:
            follower.leave(self.before)


class Collector:
    """Forward hooks on the targets that add what passes by to :class:`LayerStatistics`.

    With gradients, a token is counted when its gradient arrives, so a forward pass that is repeated (gradient
    checkpointing) or never followed by a backward pass (validation) counts once or not at all. Layers fed by the same
    tensor object (queries, keys and values; gate and up projections) share one set of input sums.

    Args:
        targets: ``{name: layer}``.
        wanted: What is collected.
        drop_overflow: Leave out tokens whose gradient is not finite, as loss scaling in fp16 produces now and then.
        batches: How many batches are going to come. Gram matrices are then estimated from as many tokens of each batch
            as are needed to see ``TOKENS_PER_FEATURE`` times the layer's size in all; None uses every token.

    Attributes:
        statistics: ``{name: LayerStatistics}``, complete from the start, with zero counts.
        wanted: What is collected.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Linear],
        wanted: Wanted,
        *,
        drop_overflow: bool = False,
        batches: int | None = None,
    ) -> None:
        self._targets = dict(targets)
        self.wanted = wanted
        self._drop_overflow = drop_overflow
        self._batches = batches
        self._handles: list[RemovableHandle] = []
        self._mask: Tensor | None = None
        self._batch_size = 1
        self._odd = False
        self._counting = False
        self.loss_scale = 1.0
        self.statistics = {
            name: LayerStatistics(
                layer.in_features,
                layer.out_features,
                gradients=wanted.gradients,
                weight_gradients=wanted.weight_gradients,
                halves=wanted.halves,
                device=layer.weight.device,
            )
            for name, layer in self._targets.items()
        }
        self._watched = {name: _Watched(layer) for name, layer in self.statistics.items()}
        self._meal: _Meal | None = None

    def memory(self) -> int:
        """Bytes that the sums take at most."""
        return statistics_bytes(((s.out_features, s.in_features) for s in self.statistics.values()), self.wanted)

    def attach(self) -> None:
        """Puts the hooks on the layers; they are idle between batches."""
        _recompile()
        for name, layer in self._targets.items():
            hook = _run_eagerly(self._hook(self._watched[name]))
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _recompile()
        self._handles.clear()
        self.end_batch()

    def begin_batch(self, batch: Any, index: int = 0) -> None:
        """Starts counting; the padding mask and the number of samples are read from the batch.

        Args:
            batch: The batch.
            index: Its number; those of odd batches are kept apart too where halves are wanted.
        """
        self._mask, self._batch_size = padding_mask(batch), batch_size(batch)
        self.loss_scale = 1.0
        self._counting = True
        self._odd = index % 2 == 1
        for layer in self._all_statistics():
            layer.add_samples(self._batch_size)

    def end_batch(self) -> None:
        """Stops counting until the next batch begins."""
        self._close_meal()
        self._counting, self._mask = False, None
        for watched in self._watched.values():
            if watched.weight_gradient is not None:
                watched.statistics.update_weight_gradient(watched.weight_gradient, self._batch_size)
                watched.weight_gradient = None

    def _all_statistics(self) -> Iterator[LayerStatistics]:
        """Those of the layers, and those of the half that this batch belongs to."""
        for watched in self._watched.values():
            yield from self._of(watched)

    def _of(self, watched: _Watched) -> Iterator[LayerStatistics]:
        yield watched.statistics
        if watched.statistics.half is not None and self._odd:
            yield watched.statistics.half

    def _hook(self, watched: _Watched) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], settings: dict[str, Any], output: Any) -> None:
            if not self._counting:
                return
            given: Tensor = args[0] if args else settings["input"]
            waits = self.wanted.backward and output.requires_grad
            shared = self._is_fed_by_the_same(watched, given, at_once=not waits)
            x = given.detach()
            if waits:
                if torch.is_autocast_enabled(x.device.type) or not module.weight.requires_grad:
                    x = x.clone()  # autograd does not guard this tensor itself: it may be changed in place later
                output.register_hook(lambda gradient: self._add(watched, x, gradient, shared))
            elif not self.wanted.backward or torch.is_grad_enabled():  # frozen: there will be no gradient
                self._add_inputs(watched, self._tokens(x), shared)

        return count

    def _is_fed_by_the_same(self, watched: _Watched, x: Tensor, *, at_once: bool) -> bool:
        """Whether the leader of this layer was just fed by this very tensor, so that the input sums are in already.

        Layers that have seen the same so far become leader and follower when they are fed by the same tensor one after
        the other, and part when they are not.
        """
        meal = self._meal
        if meal is not None and meal.is_made_of(x) and watched is not meal.leader:
            if watched.leader is None and not watched.followers and self._may_follow(watched, meal.leader):
                watched.follow(meal.leader)
            if watched.leader is meal.leader:
                watched.calls += 1
                meal.confirmed.append(watched)
                return True
        self._close_meal()
        if watched.leader is not None:
            watched.leave()
        watched.calls += 1
        before = watched.statistics.snapshot() if at_once and watched.followers else None
        self._meal = _Meal(weakref.ref(x), x._version, watched, before)
        return False

    @staticmethod
    def _may_follow(watched: _Watched, leader: _Watched) -> bool:
        both_new = (leader.calls, watched.calls) == (1, 0)
        return both_new or watched.statistics.same_inputs(leader.statistics)

    def _close_meal(self) -> None:
        if self._meal is not None:
            self._meal.close()
        self._meal = None

    def _add(self, watched: _Watched, x: Tensor, gradient: Tensor, shared: bool) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x, g = self._tokens(x), self._tokens(gradient.detach())
            if self._drop_overflow:
                finite = torch.isfinite(g).all(-1)
                x, g = x[finite], g[finite]
            self._add_inputs(watched, x, shared)
            g = g.float() / self.loss_scale
            if self.wanted.weight_gradients:
                product = g.mT @ x.float()
                watched.weight_gradient = (
                    product if watched.weight_gradient is None else watched.weight_gradient.add_(product)
                )
            if self.wanted.gradients:
                # The gradient of the mean over the batch, times its size, is that of the sample's own loss.
                for statistics in self._of(watched):
                    statistics.update_gradients(g * self._batch_size, self._at_most(statistics.out_features))

    def _add_inputs(self, watched: _Watched, x: Tensor, shared: bool) -> None:
        if not shared:
            for statistics in self._of(watched):
                statistics.update_inputs(x, self._at_most(statistics.in_features))

    def _at_most(self, size: int) -> int | None:
        """Tokens of one batch that are enough for a Gram matrix of this size."""
        if self._batches is None:
            return None
        return max(MIN_TOKENS, -(-TOKENS_PER_FEATURE * size // self._batches))

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
    wanted: Wanted | None = None,
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
        gradients: Collect output and weight gradients too. The loss is a scalar output, else the output's ``.loss``,
            else the cross-entropy of labels sampled from the model's own logits (last dimension: classes), which needs
            no labels: the true Fisher matrix (Martens, 2014, https://arxiv.org/abs/1412.1193).
        wanted: Exactly what to collect, for example ``factorization.wanted``, instead of what ``gradients`` says.

    Returns:
        ``{name: LayerStatistics}`` for every target.

    Raises:
        StatisticsError: If there are no batches, or no loss can be found.
    """
    if isinstance(batches, Tensor):
        raise ArgumentError("batches is one tensor; give an iterable of batches, for example batches=[tensor].")
    if wanted is None:
        wanted = Wanted(inputs=True, gradients=gradients, weight_gradients=gradients)
    collector = Collector(targets, wanted)
    _log.info("Calibration of %d layers: at most %.1f MB of sums.", len(targets), collector.memory() / 1e6)
    generator = torch.Generator().manual_seed(0)
    weights = [cast(nn.Parameter, layer.weight) for layer in targets.values()]
    device = next(model.parameters()).device
    seen = 0
    with _as_found(model, weights):
        collector.attach()
        try:
            for batch in (_to_device(found, device) for found in batches):
                collector.begin_batch(batch, seen)
                with torch.set_grad_enabled(wanted.backward):
                    output = _call(model, batch) if forward is None else forward(model, batch)
                    if wanted.backward:
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
