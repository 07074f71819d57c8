"""The choice between several ways to see a layer as a matrix: the two schemes of a convolution."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prehab as lp
from lightning_prehab.kinds import view_of
from lightning_prehab.kinds.conv import ChannelView, ConvKind, SpatialView
from lightning_prehab.plan.form_choice import cheapest_forms
from lightning_prehab.rank_policies import LayerChoices
from lightning_prehab.targets.forms import form_name, form_of_shape, forms_of, in_all_forms


def conv(matrix_rank, scheme, channels=6, kernel=3):
    """A convolution whose matrix in one scheme has the given rank; in the other one it has full rank."""
    layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    view = {"channel": ChannelView, "spatial": SpatialView}[scheme](layer)
    m, n = view.shape
    view.write_(torch.randn(m, matrix_rank) @ torch.randn(matrix_rank, n))
    return layer


def net():
    return nn.Sequential(
        conv(2, "channel"),
        nn.ReLU(),
        conv(2, "spatial"),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.Flatten(1),
        nn.LazyLinear(3),
    )


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 6, 5, 5, generator=generator) for _ in range(count)]


def schemes(model):
    return {name: layer.scheme for name, layer in model.named_modules() if isinstance(layer, lp.LowRankConv2d)}


@pytest.fixture
def model():
    made = net()
    made(batches(1)[0])
    return made


def test_names_and_shapes():
    layer = nn.Conv2d(4, 6, (3, 5))
    channel, spatial = forms_of(layer)
    assert channel is layer
    assert (view_of(layer).shape, view_of(spatial).shape) == ((6, 60), (30, 12))
    assert list(in_all_forms({"a": layer, "b": nn.Linear(3, 3)})) == ["a", "a:spatial", "b"]
    assert form_name("a", spatial) == "a:spatial"
    assert form_of_shape(layer, (30, 12)).form == "spatial"
    assert form_of_shape(layer, (6, 60)) is layer
    assert forms_of(spatial) == [spatial]  # chosen already
    for alone in (nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, (1, 3)), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3)):
        assert forms_of(alone) == [alone]


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_a_kind_with_a_scheme_leaves_no_choice(scheme):
    kind = ConvKind(scheme)
    (views,) = kind.choices(nn.Conv2d(4, 6, 3))
    assert views[""].scheme == scheme
    assert len(kind.candidates(nn.Conv2d(4, 6, 3))) == 2  # stored files may hold both


@pytest.mark.parametrize("method", [lp.SVD(), lp.ActivationSVD(), lp.WhitenedSVD(centered=True), lp.KroneckerSVD()])
@pytest.mark.parametrize("policy", [lp.ParameterBudget(0.6), lp.RankRatio(0.6), lp.EnergyThreshold(0.99)])
def test_each_layer_takes_the_form_in_which_it_has_low_rank(model, method, policy):
    dense = copy.deepcopy(model)
    report = lp.compress_(model, batches=batches(), factorization=method, policy=policy, exclude_modules=["4", "6"])
    assert schemes(model) == {"0": "channel", "2": "spatial"}
    assert [layer.form for layer in report.plan.layers] == ["", "spatial"]
    assert [layer.relative_error for layer in report.plan.layers] == pytest.approx([0, 0], abs=2e-3)
    assert "18x18 spatial" in str(report)
    x = batches(1)[0]
    torch.testing.assert_close(model(x), dense(x), atol=2e-4, rtol=2e-3)


def test_step_by_step_and_from_a_file(model, tmp_path):
    """Statistics hold both forms, the plan says which one, and applying it finds the statistics of that one."""
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, batches(), gradients=True)
    assert list(statistics) == ["0", "0:spatial", "2", "2:spatial", "4", "6"]
    assert statistics["2:spatial"].input_gram.shape == (18, 18)
    plan = lp.make_plan(targets, 0.6, statistics=statistics)
    plan.to_yaml(tmp_path / "plan.yaml")
    again = lp.CompressionPlan.from_yaml(tmp_path / "plan.yaml")
    assert again.to_dict() == plan.to_dict()
    whole = copy.deepcopy(model)
    report = lp.apply_plan_(model, again, statistics)
    assert schemes(model) == {"0": "channel", "2": "spatial"}
    assert lp.CompressionReport.from_dict(report.to_dict(), plan.factorization).to_dict() == report.to_dict()
    other = copy.deepcopy(whole)
    lp.compress_(other, 0.6, batches())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_statistics_of_one_form_alone_leave_no_choice(model):
    targets = lp.find_targets(model)
    statistics = lp.collect_statistics(model, targets, batches(), gradients=True)
    without = {name: found for name, found in statistics.items() if not name.endswith(":spatial")}
    assert [layer.form for layer in lp.make_plan(targets, 0.6, statistics=without).layers] == [""] * 4
    del without["2"]
    plan = lp.make_plan(targets, 0.6, statistics=without)
    assert plan.skipped["2"] == "no statistics were collected for it"
    assert "2:spatial" not in plan.skipped
    only = {name: found for name, found in statistics.items() if name != "2"}
    assert next(layer for layer in lp.make_plan(targets, 0.6, statistics=only).layers if layer.name == "2").form


def test_a_rank_by_hand_is_a_rank_of_the_ordinary_form(model):
    targets = lp.find_targets(model, ["0", "2"])
    plan = lp.make_plan(targets, lp.ParameterBudget(0.7), lp.SVD(), rank_overrides={"2": 4})
    assert [(layer.name, layer.form) for layer in plan.layers] == [("0", ""), ("2", "")]
    assert plan.ranks["2"] == 4


def test_policies_that_count_operations_stay_in_the_ordinary_form(model):
    policy = lp.ParameterBudget(0.7, cost="flops")
    report = lp.compress_(model, batches=batches(), policy=policy, target_modules=["0", "2"])
    assert set(schemes(model).values()) == {"channel"}
    assert report.keep < 1


@pytest.mark.parametrize("policy", [lp.ProbeBudget(0.6), lp.ZeroSum(0.6)], ids=repr)
def test_policies_that_measure(model, policy):
    lp.compress_(model, batches=batches(), policy=policy, exclude_modules=["4", "6"])
    assert schemes(model) == {"0": "channel", "2": "spatial"}


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("policy", [lp.ParameterBudget(0.5), lp.ProbeBudget(0.5)], ids=repr)
def test_in_training_with_a_pass_of_its_own_and_with_probes(policy, epoch, make_trainer):
    """The surgery chooses from ordinary steps, on a copy of the module, and before probes are measured."""
    lit = Lit()
    with torch.no_grad():
        ChannelView(lit.net[0]).write_(torch.randn(8, 2) @ torch.randn(2, 54))
        lit.net[2].weight.copy_(conv(2, "spatial", channels=8).weight)
    lit.configure_optimizers = lambda: torch.optim.SGD(lit.parameters(), lr=0.0)
    compression = lp.CompressionCallback(
        epoch, policy=policy, calibration_batches=12, exclude_modules="net.4", rank_multiple_of=2
    )
    x = torch.cat(batches(12))
    make_trainer(max_epochs=epoch + 1, callbacks=[compression]).fit(
        lit, DataLoader(TensorDataset(x, x.mean((1, 2, 3)).gt(0).long()), 16)
    )
    assert lit.forms == ["", "spatial"]
    assert [layer.relative_error for layer in compression.report.plan.layers] == pytest.approx([0, 0], abs=2e-3)
    assert schemes(lit.net) == {"0": "channel", "2": "spatial"}
    x = batches(1)[0]
    assert lit.after.isfinite().all()
    torch.testing.assert_close(lit.net(x), lit.after, atol=1e-4, rtol=1e-3)


def test_a_few_layers_at_once(model):
    other = copy.deepcopy(model)
    for made, settings in ((model, {}), (other, {"layers_at_once": 1})):
        lp.compress_(made, 0.6, batches(), **settings)
    assert schemes(other) == schemes(model) == {"0": "channel", "2": "spatial"}
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def spectrum_of(generator, m, n):
    decay = float(torch.rand((), generator=generator)) * 0.5
    return torch.exp(-decay * torch.arange(min(m, n), dtype=torch.float64)) * torch.rand(
        1, generator=generator, dtype=torch.float64
    )


def choices(name, m, n, generator):
    ranks = tuple(range(1, (m * n - 1) // (m + n) + 1))
    return LayerChoices(name, m, n, spectrum_of(generator, m, n), ranks)


def lost(policy, layers):
    ranks = policy(layers)
    retained = {layer.name: layer.retained() for layer in layers}
    return sum(float(r[-1] - (r[-1] if ranks[n] is None else r[ranks[n]])) for n, r in retained.items())


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_against_all_combinations(keep):
    """Never worse than all layers in their first form; in the mean most of what the best combination wins is won."""
    policy, won = lp.ParameterBudget(keep), []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        layers = {name: [choices(name, *shape, generator) for shape in ((8, 72), (24, 24))] for name in "abc"}
        chosen = cheapest_forms(policy, layers)
        found = lost(policy, [layers[name][index] for name, index in chosen.items()])
        first = lost(policy, [forms[0] for forms in layers.values()])
        best = min(lost(policy, list(forms)) for forms in itertools.product(*layers.values()))
        assert best - 1e-12 <= found <= first + 1e-12
        won.append((first - found, first - best))
    gained, possible = map(sum, zip(*won, strict=True))
    assert gained > 0.9 * possible > 0


def test_units_are_compared_only_where_there_is_one():
    """The same curve in other units: without a common unit the form with the larger share wins."""
    flat, steep = torch.ones(24, dtype=torch.float64), torch.exp(-torch.arange(24.0, dtype=torch.float64)) * 100
    forms = {"a": [LayerChoices("a", 24, 24, flat, tuple(range(1, 12))), LayerChoices("a", 24, 24, steep, (1, 2, 3))]}
    assert cheapest_forms(lp.RankRatio(0.2), forms, comparable=False) == {"a": 1}
    assert cheapest_forms(lp.RankRatio(0.1), forms, comparable=True) == {"a": 0}


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(1), nn.Linear(32, 3)
        )
        self.after = None

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_surgery(self, trainer, pl_module, report):
        self.after = self.net(batches(1)[0]).detach()
        self.forms = [layer.form for layer in report.plan.layers]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def test_prehab_makes_the_cut_free_in_the_form_that_it_is_made_in():
    """The default prehab shrinks the tail in the form of the plan; the surgery then finds that form the cheapest."""
    torch.manual_seed(0)
    x = torch.cat(batches(12))
    data = DataLoader(TensorDataset(x, x.mean((1, 2, 3)).gt(0).long()), 16)
    lit, before = Lit(), []
    with torch.no_grad():  # nearly separable
        lit.net[2].weight.add_(0.3 * conv(3, "spatial", channels=8).weight)

    class Before(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            before.append(pl_module.net(batches(1)[0]).detach())

    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=9, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            lp.PrehabCallback(update_steps=10), lp.CompressionCallback(8, 0.5, calibration_batches=12), Before(),
        ],
    )  # fmt: skip
    trainer.fit(lit, data)
    assert "spatial" in lit.forms
    torch.testing.assert_close(lit.after, before[7], atol=1e-3, rtol=1e-2)
    assert (lit.after - before[0]).abs().max() > 0.1
