"""Collects layer statistics with temporary hooks, whoever runs the model."""

import itertools
import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prehab.errors import ArgumentError, StatisticsError
from lightning_prehab.kinds import MatrixView, kind_again, view_of
from lightning_prehab.linalg.matrices import widened, working_dtype
from lightning_prehab.linalg.sharding import local_part, whole
from lightning_prehab.statistics.batches import batch_size, padding_mask, position_ids
from lightning_prehab.statistics.hygiene import clipped, inner
from lightning_prehab.statistics.sums import (
    InputSums,
    LayerStatistics,
    Wanted,
    gradient_gram,
    input_sums,
    statistics_bytes,
)
from lightning_prehab.targets.forms import in_all_forms
from lightning_prehab.targets.locate import Target, group_names

T = TypeVar("T")

#: Tokens that a Gram matrix is estimated from, per row, where it rides on a known number of training steps.
TOKENS_PER_FEATURE = 8
#: And in any case so many of each batch; twice as many where batches are left out.
MIN_TOKENS = 256
#: Where at least ``MANY_BATCHES`` come, one pair in so many pairs of them is looked at, for all: adding a few tokens to
#: a large matrix takes as long as adding many. In pairs, so that even and odd batches are seen alike.
EVERY, MANY_BATCHES = 4, 32
#: In a pass of its own a Gram matrix is estimated from so many tokens that it costs at most so many products of all
#: tokens with the weight, of which a training step has three. On the narrow side of a weight these are all tokens.
OWN_PASS_PRODUCTS = 1.0
#: And in any case so many of each batch.
OWN_PASS_MIN_TOKENS = 2048
#: Entries that the inputs of one matrix may have at a time where they are larger than what the layer is fed with, such
#: as the patches of a convolution: 256 MB. Larger batches are taken in parts.
MAX_ENTRIES = 2**26


#: Whether what passes by is none of a collector's business.
_unseen = ContextVar("_unseen", default=False)


@contextmanager
def unseen() -> Iterator[None]:
    """Inside, no collector counts: hooks are copied with the modules that they hang on, and a copy may be run."""
    token = _unseen.set(True)
    try:
        yield
    finally:
        _unseen.reset(token)


@dataclass(eq=False)
class _Fed:
    """A tensor that one matrix, or several one after the other, were fed with."""

    source: "weakref.ref[Tensor] | None"  # None: never the same as another
    version: int
    number: int
    reads: Hashable = None  # what was made of it
    copy: Tensor | None = None
    sums: InputSums | None = None  # kept until those of another tensor are computed

    def is_made_of(self, x: Tensor, reads: Hashable) -> bool:
        same = self.source is not None and self.source() is x and self.version == x._version
        return same and self.reads == reads


@dataclass(eq=False)
class _Watched:
    """A matrix under observation: its sums, the weight gradient of this batch, and what it was fed with."""

    statistics: LayerStatistics
    weight_gradient: Tensor | None = None
    history: list[int] = field(default_factory=list)


class Collector:
    """Forward hooks on the targets that add what passes by to :class:`LayerStatistics`.

    With gradients, a token is counted when its gradient arrives, so a forward pass that is repeated (gradient
    checkpointing) or never followed by a backward pass (validation) counts once or not at all. For layers fed by the
    same tensor object one after the other (queries, keys and values; gate and up projections) the sums of that tensor
    are computed once, and layers that were fed by the same tensors all the way share one set of input sums in the end.

    Args:
        targets: ``{name: layer}``; each is watched in all forms that planning may choose from.
        wanted: What is collected.
        drop_overflow: Leave out tokens whose gradient is not finite, as loss scaling in fp16 produces now and then.
        batches: How many batches are going to come. Gram matrices are then estimated from as many tokens of each batch
            as are needed to see ``TOKENS_PER_FEATURE`` times the layer's size in all, and of many batches some stand
            for the others in layers of more than ``MIN_TOKENS`` tokens; None uses every token.
        own_pass: The model runs for the statistics alone, without gradients of the weights. Gram matrices that would
            cost more than the layer itself are then estimated from a part of the tokens, whatever ``batches`` says.

    Attributes:
        statistics: ``{name: LayerStatistics}``, complete from the start, with zero counts.
        wanted: What is collected.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        wanted: Wanted,
        *,
        drop_overflow: bool = False,
        batches: int | None = None,
        own_pass: bool = False,
    ) -> None:
        self._views: dict[str, MatrixView] = {}
        for target_name, target in in_all_forms(targets).items():
            self._views |= zip(group_names(target_name, target), view_of(target).groups(), strict=True)
        self.wanted = wanted
        self._drop_overflow = drop_overflow
        self._batches = batches
        self._own_pass = own_pass
        many = batches is not None and batches >= MANY_BATCHES and not wanted.weight_gradients and not own_pass
        self._every = EVERY if many else 1
        self._whole = (batches or 0) // (2 * EVERY) * 2 * EVERY  # later ones, of no whole cycle, stand for themselves
        self._handles: list[RemovableHandle] = []
        self._mask: Tensor | None = None
        self._present: tuple[Tensor, Tensor] | None = None  # the mask that was looked at last, and where it is True
        self._positions: Tensor | None = None
        self._batch_size = 1
        self._turn = 0
        self._counting = False
        self.loss_scale: float | Tensor = 1.0
        self.statistics = {
            name: LayerStatistics(
                view.in_features,
                view.out_features,
                gradients=wanted.gradients,
                weight_gradients=wanted.weight_gradients,
                halves=wanted.halves,
                magnitudes=wanted.magnitudes,
                device=view.parameter.device,
                dtype=working_dtype(view.parameter.dtype),
            )
            for name, view in self._views.items()
        }
        self._watched = {id(self._views[name]): _Watched(layer) for name, layer in self.statistics.items()}
        self._last: _Fed | None = None
        self._computed: _Fed | None = None
        self._numbers = itertools.count()

    def memory(self) -> int:
        """Bytes that the sums take at most."""
        layers = self.statistics.values()
        shapes = [((s.out_features, s.in_features), s.input_gram.dtype) for s in layers]
        return sum(statistics_bytes([shape], self.wanted, dtype) for shape, dtype in shapes)

    def attach(self) -> None:
        """Puts the hooks on the layers; they are idle between batches."""
        recompile()
        layers: dict[int, list[MatrixView]] = defaultdict(list)
        for view in self._views.values():
            layers[id(view.module)].append(view)
        see = run_eagerly(self._see)
        for views in layers.values():
            module = views[0].module
            kind = kind_again(module)
            if kind is None:
                raise ArgumentError(f"{type(module).__name__} is not a layer kind that can be cut.")
            self._handles += kind.watch(module, views, see)

    def detach(self) -> None:
        """Takes the hooks off again; layers that have seen the same share their input sums from now on."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            recompile()
        self._handles.clear()
        self.end_batch()
        first: dict[tuple[int, ...], LayerStatistics] = {}
        for watched in self._watched.values():
            leader = first.setdefault(tuple(watched.history), watched.statistics)
            if leader is not watched.statistics and leader.same_inputs(watched.statistics):
                watched.statistics.share_inputs_(leader)

    def begin_batch(self, batch: Any, index: int = 0) -> None:
        """Starts counting; padding mask, positions and the number of samples are read from the batch.

        Args:
            batch: The batch.
            index: Its number, from 0 and without gaps. Those of odd batches are kept apart too where halves are wanted;
                it decides which batches and tokens are looked at.
        """
        self._mask, self._batch_size = padding_mask(batch), batch_size(batch)
        self._positions = position_ids(batch) if self.wanted.gradient_trim else None
        self.loss_scale = 1.0
        self._counting = True
        self._turn = index
        for layer in self._all_statistics():
            layer.add_samples(self._batch_size)

    def end_batch(self) -> None:
        """Stops counting until the next batch begins."""
        self._counting, self._mask, self._positions, self._last, self._computed = False, None, None, None, None
        self._present = None
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
        if watched.statistics.half is not None and self._turn % 2 == 1:
            yield watched.statistics.half

    def _see(self, views: Sequence[MatrixView], given: Tensor, output: Tensor) -> None:
        if not self._counting or _unseen.get():
            return
        x, held = given.detach(), local_part(given)
        batches = 1  # that this one stands for
        if self._every > 1 and self._turn < self._whole and x.numel() > MIN_TOKENS * views[0].in_features:
            if self._turn // 2 % self._every != 0:
                return
            batches = self._every
        fed = [self._fed_by(given, view.reads) for view in views]
        if self.wanted.backward and output.requires_grad:
            frozen = not all(view.parameter.requires_grad for view in views)
            if torch.is_autocast_enabled(x.device.type) or (frozen and not self._own_pass):
                # autograd does not guard this tensor itself: it may be changed in place later
                fed[0].copy = x.clone() if fed[0].copy is None else fed[0].copy
                x = held = fed[0].copy

            shape, version = output.shape, held._version

            def add(gradient: Tensor) -> None:
                if held._version != version:  # autograd says so where it needs the input for the gradient of the weight
                    raise StatisticsError(
                        f"The input of a {type(views[0].module).__name__} was changed in place after the layer had "
                        "been called; no statistics of it can be collected. Make that operation not in place."
                    )
                for view, source in zip(views, fed, strict=True):
                    self._add(view, source, whole(x), whole(gradient).reshape(shape), batches)

            _before_changes(output).register_hook(add)  # type: ignore[no-untyped-call]
        elif not self.wanted.backward or torch.is_grad_enabled():  # frozen: there will be no gradient
            for view, source in zip(views, fed, strict=True):
                self._add(view, source, whole(x), None, batches)

    def _fed_by(self, x: Tensor, reads: Hashable) -> _Fed:
        """The tensor that the matrix before was fed with, if it is this very one, else a new one."""
        if self._last is None or not self._last.is_made_of(x, reads):
            source = None if x.is_inference() else weakref.ref(x)  # such a tensor does not tell when it is changed
            self._last = _Fed(source, 0 if source is None else x._version, next(self._numbers), reads)
        return self._last

    @torch.no_grad()
    def _add(self, view: MatrixView, fed: _Fed, x: Tensor, gradient: Tensor | None, batches: int) -> None:
        """Adds what a matrix was fed with and, unless it is None, the gradient of its output, for so many batches."""
        watched = self._watched[id(view)]
        if self._drop_overflow and gradient is not None:
            fed = _Fed(None, 0, next(self._numbers))  # other layers may drop other tokens
        sums, fresh = fed.sums, fed.sums is None
        with torch.autocast(x.device.type, enabled=False):
            parts = list(self._parts(view, x, gradient))
            for part, mask, gradient_part in parts:
                tokens = self._tokens(view.inputs(part), mask) if fresh or self.wanted.weight_gradients else None
                g, kept, copies = None, None, 1
                if gradient_part is not None:
                    aligned = mask is not None or self._drop_overflow or self.wanted.aligned
                    outputs, copies = (view.outputs, 1) if aligned else (view.distinct_outputs, view.copies)
                    g = outputs(gradient_part)
                    kept = self._inner(g, mask) if gradient_part.dim() == 3 else None
                    g = self._tokens(g, mask)
                if self._drop_overflow and g is not None:
                    finite = torch.isfinite(g).all(-1)
                    tokens, g = None if tokens is None else tokens[finite], g[finite]
                    kept = None if kept is None else kept[finite]
                if fresh and tokens is not None:
                    at_most = self._at_most(view, view.in_features, len(tokens), len(parts))
                    added = input_sums(tokens, at_most, magnitudes=self.wanted.magnitudes, turn=self._turn)
                    sums = added if sums is None else sums.plus(added)
                if g is not None:
                    at_most = self._at_most(view, view.out_features // copies, len(g), len(parts))
                    self._add_gradient(watched, tokens, g, kept, copies, at_most, batches)
        assert sums is not None
        if fresh:
            sums = sums if batches == 1 else sums.times(batches)._replace(tokens=sums.tokens * batches)
            if self._computed is not None:
                self._computed.sums = None
            fed.sums, self._computed = sums, fed
        watched.history.append(fed.number)
        for statistics in self._of(watched):
            statistics.add_inputs(sums)

    def _inner(self, g: Tensor, mask: Tensor | None) -> Tensor | None:
        """Of the tokens of a batch of sequences, those that ``sum g g^T`` does not leave out; None for all."""
        if not self.wanted.gradient_trim or g.is_nested or g.dim() != 3 or g.shape[0] != self._batch_size:
            return None
        present, positions = mask, self._positions
        if present is None or present.shape != g.shape[:2]:
            present = torch.ones(g.shape[:2], dtype=torch.bool, device=g.device)
        if positions is not None and (positions.shape[1] != g.shape[1] or len(positions) not in (1, len(g))):
            positions = None
        return inner(present, self.wanted.gradient_trim, positions)[present]

    def _add_gradient(
        self,
        watched: _Watched,
        x: Tensor | None,
        g: Tensor,
        kept: Tensor | None,
        copies: int,
        at_most: int | None,
        batches: int,
    ) -> None:
        if self.wanted.weight_gradients and x is not None:
            product = (widened(g).mT @ widened(x)) / self.loss_scale
            watched.weight_gradient = (
                product if watched.weight_gradient is None else watched.weight_gradient.add_(product)
            )
        if self.wanted.gradients:
            share = 1.0
            if kept is not None:
                share = len(kept) / max(int(kept.sum()), 1)  # what is left stands for all
                g = g[kept]
            if self.wanted.gradient_clip is not None:
                g = clipped(g, self.wanted.gradient_clip)
            # The gradient of the mean over the batch, times its size, is that of the sample's own loss.
            gram = gradient_gram(g, at_most, self._turn)
            gram *= share * (self._batch_size / self.loss_scale) ** 2
            if batches > 1:
                gram *= batches
            for statistics in self._of(watched):
                statistics.add_gradient_gram(gram, copies)

    def _parts(
        self, view: MatrixView, x: Tensor, gradient: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """So many samples at a time that not too much is unfolded at once: inputs, padding mask, gradients."""
        size = view.samples_at_once(x, MAX_ENTRIES)
        if size is None or size >= x.shape[0]:
            yield x, self._mask, gradient
            return
        for start in range(0, x.shape[0], size):
            part = slice(start, start + size)
            mask = None if self._mask is None else self._mask[part]
            yield x[part], mask, None if gradient is None else gradient[part]

    def _tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Flattened to ``(tokens, features)``, padding left out where the mask fits the leading dimensions.

        Where it is True is asked once for all layers: a GPU has to be waited for to know how many there are. Nested
        tensors, which ``nn.TransformerEncoder`` makes of padded ones, have no padding.
        """
        if x.is_nested:
            return torch.cat(x.unbind())
        rows = x.reshape(-1, x.shape[-1])
        if mask is None or mask.shape != x.shape[:-1]:
            return rows
        if self._present is None or self._present[0] is not mask:
            self._present = mask, mask.flatten().nonzero()[:, 0]
        return rows.index_select(0, self._present[1].to(x.device))

    def _at_most(self, view: MatrixView, size: int, tokens: int, parts: int) -> int | None:
        """Of so many tokens, in one of the parts of a batch, how many are enough for a Gram matrix of this size."""
        if self._own_pass:
            affordable = OWN_PASS_PRODUCTS * tokens * (view.out_features * view.in_features) / size**2
            return max(OWN_PASS_MIN_TOKENS, math.ceil(affordable))
        if self._batches is None:
            return None
        least = MIN_TOKENS if self._every == 1 else 2 * MIN_TOKENS
        return -(-max(least, -(-TOKENS_PER_FEATURE * size * self._every // self._batches)) // parts)


def _before_changes(output: Tensor) -> Tensor:
    """The tensor whose hooks see the gradient of an output, whatever happens to it afterwards.

    ``nn.Linear`` returns a view for inputs of three or more dimensions. If a view is changed in place (by a ReLU),
    autograd makes its history anew and forgets its hooks, not those of the tensor that it shows.
    """
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def run_eagerly(hook: Callable[..., T]) -> Callable[..., T]:
    """Keeps the hook out of compiled graphs, where there are any."""
    if "torch._dynamo" not in sys.modules:
        return hook
    eager: Callable[..., T] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return eager


def recompile() -> None:
    """Makes ``torch.compile`` look at the modules again: code compiled before does not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
