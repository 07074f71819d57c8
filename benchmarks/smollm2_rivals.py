"""What ``smollm2.py`` compares with and this package does not have: pruning, rounding, fewer blocks, SVD-LLM's update.

Each is changed in place, and is given the same calibration text as the rows that are ours.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lightning_prehab as lp

Batch = dict[str, Tensor]
#: Rank and scale of the updates as published; the rate is ten times the published one, which is for thousands of steps.
UPDATE_RANK, UPDATE_SCALE, UPDATE_RATE = 8, 2.0, 1e-3
REHAB_RATE = 1e-4


@torch.no_grad()
def prune_by_magnitude_(model: nn.Module, keep: float) -> float:
    """Sets the smallest entries of each matrix to zero, the same share of each; gives the share that is kept.

    The zeros count as saved, and the places of what is left, which a file would have to hold too, do not count.
    """
    kept = total = 0
    for layer in lp.find_targets(model).values():
        weight = layer.weight
        count = math.floor(keep * weight.numel())
        least = weight.abs().flatten().kthvalue(weight.numel() - count + 1).values if count else math.inf
        mask = weight.abs() >= least
        weight *= mask
        kept, total = kept + int(mask.sum()), total + weight.numel()
    return kept / total


@torch.no_grad()
def round_again_(model: nn.Module, bits: int = 4, group: int = 32) -> None:
    """Rounds each matrix to so many bits: to even steps from the least to the largest of a group of neighbours.

    The groups begin half a group later than those of the file that the model is read from, which has been rounded so
    already and would come out as it is.
    """
    for layer in lp.find_targets(model).values():
        entries = layer.weight.flatten().roll(-group // 2)
        padded = nn.functional.pad(entries[None], (0, -len(entries) % group), mode="replicate").view(-1, group)
        least, largest = padded.aminmax(dim=1, keepdim=True)
        step = ((largest - least) / (2**bits - 1)).clamp(min=torch.finfo(padded.dtype).tiny)
        rounded = ((padded - least) / step).round() * step + least
        layer.weight.copy_(rounded.flatten()[: len(entries)].roll(group // 2).view_as(layer.weight))


@torch.no_grad()
def drop_blocks_(model: Any, keep: float, batches: Sequence[Batch]) -> float:
    """Leaves out whole blocks, those that change what passes through them least; gives the share that is kept.

    The influence of a block is one minus the cosine of what goes in and what comes out, a mean over tokens (ShortGPT,
    Men et al., 2024, https://arxiv.org/abs/2403.03853).
    """
    blocks = model.model.layers
    influence = torch.zeros(len(blocks), dtype=torch.float64)
    for batch in batches:
        tokens = batch["input_ids"].to(model.device)
        states = model(input_ids=tokens, output_hidden_states=True, logits_to_keep=1).hidden_states
        for index, (before, after) in enumerate(pairwise(states[:-1])):
            influence[index] += 1 - float(nn.functional.cosine_similarity(before, after, dim=-1).double().mean())
    influence[-1] = math.inf  # what comes out of the last one is shown behind a norm; it stays
    count = math.floor(keep * len(blocks) + 1e-9)
    left = sorted(influence.argsort(descending=True)[:count].tolist())
    share = count / len(blocks)
    model.model.layers = nn.ModuleList(blocks[index] for index in left)
    for index, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = index
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:count]
    return share


class _Update(nn.Module):
    """A weight and a low-rank update that starts as zero (LoRA)."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(UPDATE_RANK, *weight.shape)
        down = torch.randn(rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + UPDATE_SCALE * self.up @ self.down


def update_in_sequence_(model: nn.Module, batches: Sequence[Batch], steps: int, seed: int) -> None:
    """The parameter update of SVD-LLM: low-rank updates of all B, merged, then of all A, by the loss of the text.

    Half of the steps each. Source: Wang et al., 2024, https://arxiv.org/abs/2403.07378, section 3.3; there with another
    text (50,000 instructions) and thousands of steps.
    """
    layers = [module for module in model.modules() if isinstance(module, lp.LowRankLinear)]
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for part, count in (("B", steps - steps // 2), ("A", steps // 2)):
        factors = [getattr(layer, part) for layer in layers]
        for factor in factors:
            parametrize.register_parametrization(factor, "weight", _Update(factor.weight, generator))
        updates = [update for factor in factors for update in factor.parametrizations.weight[0].parameters()]
        train_(model, updates, text_loss, batches, count, UPDATE_RATE)
        for factor in factors:
            parametrize.remove_parametrizations(factor, "weight", leave_parametrized=True)
    model.requires_grad_(True)


def rehab_(model: nn.Module, batches: Iterable[Batch], steps: int) -> None:
    """Ordinary training of everything by the loss of the text: what may be done with any model, a dense one too."""
    train_(model, list(model.parameters()), text_loss, batches, steps, REHAB_RATE)


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean negative log-likelihood of the text."""
    loss: Tensor = model(**batch).loss
    return loss


def train_(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    steps: int,
    rate: float,
) -> None:
    """AdamW, a tenth of the steps to warm up, then a cosine to a tenth of the rate, gradients clipped at norm 1."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(step - warm, 0) / max(steps - warm, 1))
        ),
    )
    endless: Iterator[Batch] = islice(cycle(batches), steps)
    device = parameters[0].device
    for batch in endless:
        with torch.autocast(device.type, torch.bfloat16):
            found = loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        found.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
