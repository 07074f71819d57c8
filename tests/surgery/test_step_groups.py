import pytest
import torch

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.surgery.step_groups import Apart, StepGroups
from lightning_prehab.surgery.wrapped import family


def parameters():
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    for parameter in made:
        parameter.grad = torch.randn(4, 3)
    return made


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, fused=True),
    "AdamW, tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), weight_decay=0.2, foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("apart", [1, 3], ids=["some", "all"])
def test_a_step_is_that_of_an_optimizer_with_such_groups(name, apart):
    ours, theirs = parameters(), parameters()
    optimizer = OPTIMIZERS[name](ours)
    decay = optimizer.param_groups[0]["weight_decay"]
    reference = OPTIMIZERS[name](
        [
            {"params": theirs[:apart], "lr": optimizer.param_groups[0]["lr"] * 3, "weight_decay": 0.0},
            *([{"params": theirs[apart:]}] if apart < 3 else []),
        ]
    )
    groups = StepGroups(family(optimizer))
    before = optimizer.state_dict()["param_groups"]
    for _ in range(3):
        groups.open({id(parameter): Apart(3.0, False) for parameter in ours[:apart]})
        rates = groups.rates()
        assert float(rates[id(ours[0])]) == pytest.approx(0.3)
        optimizer.step()
        groups.close()
        reference.step()
        assert optimizer.param_groups[0]["params"] == ours
    assert len(optimizer.param_groups) == 1
    assert optimizer.state_dict()["param_groups"] == before
    assert optimizer.param_groups[0]["weight_decay"] == decay == 0.2
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_names_and_lists_stay_the_users():
    made = parameters()
    named = [("a", made[0]), ("b", made[1]), ("c", made[2])]
    optimizer = torch.optim.AdamW(named, lr=0.1)
    held, of_groups = optimizer.param_groups[0]["params"], optimizer.param_groups
    groups = StepGroups([optimizer])
    groups.open({id(made[1]): Apart(2.0)})
    assert [group["param_names"] for group in optimizer.param_groups] == [["a", "c"], ["b"]]
    groups.open({id(made[0]): Apart(2.0)})  # a step that was never finished
    assert [group["param_names"] for group in optimizer.param_groups] == [["b", "c"], ["a"]]
    groups.close()
    assert optimizer.param_groups is of_groups
    assert optimizer.param_groups[0]["params"] is held
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c"]


class Counting(torch.optim.SGD):
    """Counts in its groups, as schedule-free optimizers do, and as Adan of timm does."""

    def __init__(self, params, by_rate):
        super().__init__(params, lr=0.1)
        self.by_rate = by_rate

    def step(self, closure=None):
        for group in self.param_groups:
            if group["params"]:
                group["seen"] = group.get("seen", 0) + (group["lr"] if self.by_rate else 1)
        return super().step(closure)


@pytest.mark.parametrize("apart", [1, 3])
def test_counters_in_groups_go_on(apart):
    made = parameters()
    optimizer, groups = Counting(made, by_rate=False), None
    groups = StepGroups([optimizer])
    for step in range(3):
        groups.open({id(parameter): Apart(2.0) for parameter in made[:apart]})
        optimizer.step()
        groups.close()
        assert optimizer.param_groups[0]["seen"] == step + 1


def test_a_counter_that_depends_on_the_rate_is_refused_and_the_groups_are_back():
    made = parameters()
    optimizer = Counting(made, by_rate=True)
    groups = StepGroups([optimizer])
    groups.open({id(made[0]): Apart(2.0)})
    optimizer.step()
    with pytest.raises(UnsupportedError, match=r"Counting keeps 'seen' in its parameter groups"):
        groups.close()
    assert optimizer.param_groups[0]["params"] == made
    groups.close()


def test_a_wrapper_that_shares_the_groups():
    made = parameters()
    base = torch.optim.SGD(made, lr=0.1)

    class Wrapper(torch.optim.Optimizer):
        def __init__(self):
            super().__init__([torch.nn.Parameter(torch.zeros(1))], {})
            self.base, self.param_groups = base, base.param_groups

        def step(self, closure=None):
            self.base.step()

    wrapper = Wrapper()
    groups = StepGroups(family(wrapper))
    groups.open({id(made[0]): Apart(2.0)})
    assert [len(group["params"]) for group in wrapper.param_groups] == [2, 1]
    wrapper.step()
    groups.close()
    assert [len(group["params"]) for group in base.param_groups] == [3]
