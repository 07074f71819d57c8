"""A small network that is taught by another one, step by step: how far an optimizer goes over a cut."""

import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.layers import LowRankLayer
from lightning_prehab.surgery.wrapped import family


class Training:
    """The network, its data and its optimizer.

    Args:
        make: ``model -> optimizer``.
        bias: Whether the layers that are cut have one.
    """

    def __init__(self, make, bias=True):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            *(
                nn.Linear(24, 32, bias=bias),
                nn.Tanh(),
                nn.Linear(32, 24, bias=bias),
                nn.Tanh(),
                nn.Linear(24, 8, bias=bias),
            )
        )
        self.teacher = torch.randn(24, 8)
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = make(self.model)

    def backward(self):
        x = torch.randn(32, 24, generator=self.generator)
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), torch.tanh(x @ self.teacher))
        (loss / 100).backward()  # so that gradients and steps are of different sizes

    def walk(self, count):
        for _ in range(count):
            self.backward()
            self.optimizer.step()

    def steps(self, count):
        """The largest change of an entry in any step: of each parameter, and of each matrix ``W`` or ``B A``."""
        changes = []
        for _ in range(count):
            self.backward()
            old = [[one.detach().clone() for one in ones] for ones in (self.model.parameters(), self.matrices())]
            self.optimizer.step()
            new = [[one.detach() for one in ones] for ones in (self.model.parameters(), self.matrices())]
            changes.append(
                [
                    [float((a - b).abs().max()) for a, b in zip(*pair, strict=True)]
                    for pair in zip(old, new, strict=True)
                ]
            )
        return [[max(steps) for steps in zip(*ones, strict=True)] for ones in zip(*changes, strict=True)]

    def matrices(self):
        return [module.weight for module in self.model if isinstance(module, nn.Linear | LowRankLayer)]

    def cut(self, method=None):
        """Mildly."""
        targets, method = lp.find_targets(self.model), method or lp.SVD()
        batches = [torch.randn(256, 24, generator=torch.Generator().manual_seed(0)) + 1]
        statistics = lp.collect_statistics(self.model, targets, batches) if method.needs_inputs else None
        plan = lp.make_plan(targets, 0.9, method, statistics)
        assert sum(rank is not None for rank in plan.ranks.values()) == 3
        lp.apply_plan_(self.model, plan, statistics, [self.optimizer])

    def parameters_keep_to_themselves(self):
        """No tensor or container of a state belongs to two parameters, and no parameter is one of the past."""
        live = {id(parameter) for parameter in self.model.parameters()}
        for one in family(self.optimizer):
            assert {id(p) for group in one.param_groups for p in group["params"]} <= live
            keyed = [one.state, *(value for value in vars(one).values() if isinstance(value, dict))]
            assert {id(key) for found in keyed for key in found if isinstance(key, torch.Tensor)} <= live
            owned = [address for state in one.state.values() for address in addresses(state)]
            assert len(owned) == len(set(owned))

    def next_steps(self, model, optimizer):
        """The parameters after a step, of this training and of a twin that is given the same gradients."""
        self.backward()
        for own, other in zip(self.model.parameters(), model.parameters(), strict=True):
            other.grad = own.grad.clone()
        for one in (self.optimizer, optimizer):
            torch.manual_seed(0)  # some draw numbers
            one.step()
        return list(self.model.parameters()), list(model.parameters())


def addresses(value):
    """Where the tensors and containers within a value lie."""
    if isinstance(value, torch.Tensor):
        return [value.data_ptr()] if value.numel() else []
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [id(value), *(address for one in inner for address in addresses(one))]
    return []
