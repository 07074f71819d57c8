"""Collects layer statistics with temporary hooks, whoever runs the model."""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prehab.batches import batch_size, padding_mask
from lightning_prehab.statistics import LayerStatistics, Wanted, statistics_bytes

#: Tokens that a Gram matrix is estimated from, per row, where the number of batches is known.
TOKENS_PER_FEATURE = 8
#: And in any case so many of each batch.
MIN_TOKENS = 256


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
        recompile()
        for name, layer in self._targets.items():
            hook = run_eagerly(self._hook(self._watched[name]))
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Takes the hooks off again."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            recompile()
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


def run_eagerly(hook: Callable[..., None]) -> Callable[..., None]:
    """Keeps the hook out of compiled graphs, where there are any."""
    if "torch._dynamo" not in sys.modules:
        return hook
    eager: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return eager


def recompile() -> None:
    """Makes ``torch.compile`` look at the modules again: code compiled before does not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
