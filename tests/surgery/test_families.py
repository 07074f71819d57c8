"""What becomes of each family of optimizers at the cut, beside one that has always stepped the factors."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.surgery.meanings import readable_state
from lightning_prehab.surgery.moments import factor_states
from lightning_prehab.surgery.rows_and_columns import parted, whole
from tests.same_model import assert_same_weights

try:
    from timm.optim import Lion
except ImportError:  # the oldest versions are tried without it
    Lion = None
try:
    from transformers.optimization import Adafactor as AdafactorOfTransformers
except ImportError:
    AdafactorOfTransformers = None

#: ``{name: (how it is made, entries that move exactly)}``. Second moments are exact where the entries of the gradient
#: are uncorrelated; of Adafactor, which keeps less, those of ``A``'s rows and ``B``'s columns are. The largest gradient
#: of Adamax moves to a bound.
FAMILIES = {
    "Adam": (lambda p: torch.optim.Adam(p, 0.01), {"exp_avg", "exp_avg_sq"}),
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.01, foreach=True), {"exp_avg", "exp_avg_sq"}),
    "Adamax": (lambda p: torch.optim.Adamax(p, 0.01), {"exp_avg"}),
    "NAdam": (lambda p: torch.optim.NAdam(p, 0.01), {"exp_avg", "exp_avg_sq", "mu_product"}),
    "RAdam": (lambda p: torch.optim.RAdam(p, 0.01), {"exp_avg", "exp_avg_sq"}),
    "SGD": (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), {"momentum_buffer"}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 0.01), {"square_avg"}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 0.01), {"sum"}),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, 0.01), set()),
}
if hasattr(torch.optim, "Muon"):
    FAMILIES["Muon"] = (lambda p: torch.optim.Muon(p, 0.01), {"momentum_buffer"})
if Lion is not None:
    FAMILIES["Lion"] = (lambda p: Lion(p, 0.001), {"exp_avg"})
if AdafactorOfTransformers is not None:
    FAMILIES["Adafactor of transformers"] = (
        lambda p: AdafactorOfTransformers(p, 0.01, scale_parameter=False, relative_step=False),
        set(),
    )


def stepped(make, *, steps=6):
    """An optimizer of ``W`` and one of ``A`` and ``B``, after gradients of one entry each; no weight is moved."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 8, generator=generator), torch.randn(6, 3, generator=generator)
    weight, pair = nn.Parameter(b @ a), [nn.Parameter(a.clone()), nn.Parameter(b.clone())]
    dense, low = make([weight]), make(pair)
    for optimizer in (dense, low):
        optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    for step in range(steps):
        gradient = torch.zeros(6, 8)
        gradient[step % 6, (3 * step) % 8] = 1.0 + step
        weight.grad, pair[0].grad, pair[1].grad = gradient, b.mT @ gradient, gradient @ a.mT
        dense.step()
        low.step()
    return dense, weight, low, pair, a, b


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_is_that_of_an_optimizer_on_the_factors(name):
    make, exact = FAMILIES[name]
    dense, weight, low, pair, a, b = stepped(make)
    old = dense.state[weight]
    known = readable_state(dense, weight, old)
    assert known is not None
    for side, (moved, parameter) in enumerate(zip(factor_states(known, a, b), pair, strict=True)):
        found, expected = parted(parameter, moved, old), low.state[parameter]
        assert set(found) == set(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[key].shape == value.shape, key
                assert torch.isfinite(found[key]).all(), key
            if key in exact:
                raised = "exp_avg" in expected and key == "exp_avg_sq"
                wanted = value.maximum(expected["exp_avg"].square() / 16) if raised else value
                torch.testing.assert_close(found[key], wanted, rtol=1e-4, atol=1e-7)
            elif key == "step":
                assert float(found[key]) == float(value)
        if "dafactor" in name:
            key = next(key for key in expected if ("row" if side == 0 else "col") in key)
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-7)
        if name == "Adamax":
            assert (found["exp_inf"] >= expected["exp_avg"].abs() - 1e-6).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cut_hands_it_over(name):
    """Whole states, of which nothing has started afresh."""
    net = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
    optimizer = FAMILIES[name][0](list(net.parameters()))

    def step():
        nn.functional.mse_loss(net(torch.randn(16, 12)), torch.randn(16, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        step()
    lp.compress_(net, 0.5, factorization=lp.SVD(), optimizers=[optimizer])
    states = [dict(optimizer.state[parameter]) for parameter in net.parameters()]
    assert len(states) == 4
    for state in states:
        assert all(value.any() for value in state.values() if isinstance(value, torch.Tensor))
        assert float(state.get("step", 5)) == 5
    before = [set(state) for state in states]
    step()
    assert [set(optimizer.state[parameter]) for parameter in net.parameters()] == before


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_rows_and_columns_there_and_back(shape):
    weight = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Adafactor([weight])
    for _ in range(3):
        weight.grad = torch.randn(shape)
        optimizer.step()
    state = optimizer.state[weight]
    seen = whole(weight, state)
    row, column = state["row_var"], state["col_var"]
    torch.testing.assert_close(seen["variance"], row @ column / row.mean(-2, keepdim=True))  # as torch computes it
    again = parted(weight, seen, state)
    assert set(again) == set(state)
    torch.testing.assert_close(again, dict(state))


def test_a_vector_keeps_the_whole():
    state = {"step": torch.tensor(2.0), "row_var": torch.ones(4, 1), "col_var": torch.ones(1, 5)}
    assert set(parted(torch.zeros(4), {"step": 2, "variance": torch.ones(4)}, state)) == {"step", "variance"}
    assert whole(torch.zeros(3, 5), state) == state  # of another weight: nothing is known


class Lit(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.net = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(list(self.parameters()))


class Save(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_resumes_bitwise_on_either_side_of_the_cut(name, loader, make_trainer, tmp_path):
    def fit(*callbacks, ckpt_path=None):
        torch.manual_seed(0)
        lit = Lit(FAMILIES[name][0])
        acts = [lp.CompressionCallback(2, 0.5, factorization=lp.SVD()), lp.RehabSchedule(4, end_factor=0.1)]
        trainer = make_trainer(max_epochs=4, callbacks=[*acts, *callbacks])
        trainer.fit(lit, loader, ckpt_path=ckpt_path)
        return lit, trainer.optimizers[0].state_dict()

    whole_run, state = fit(Save(tmp_path))
    for epoch in (0, 1, 2):
        resumed, other = fit(ckpt_path=tmp_path / f"{epoch}.ckpt")
        assert_same_weights(resumed, whole_run)
        torch.testing.assert_close(other, state, rtol=0, atol=0)
