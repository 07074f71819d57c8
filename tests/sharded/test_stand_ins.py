"""Stand-ins of sharded layers, what is found in a sharded model, and what the engine refuses, on one process."""

import pytest
import torch
from torch import distributed, nn

import lightning_prehab as lp
from lightning_prehab.errors import UnsupportedError
from lightning_prehab.kinds import view_of
from lightning_prehab.kinds.base import plain_type
from lightning_prehab.sharded import engine
from lightning_prehab.sharded.gathered import gathered, pinned, stand_in
from lightning_prehab.sharded.shares import dtensor_like, full
from lightning_prehab.surgery.hooks import hooks_of

pytestmark = pytest.mark.skipif(engine.version() < engine.OLDEST, reason="FSDP2 on the CPU needs torch 2.10")


class Net(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.qkv = nn.Linear(16, 48)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cut = lp.LowRankLinear(16, 12, 3)

    def forward(self, x):
        x = self.qkv(torch.tanh(self.first(x)))[..., :16]
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.cut(y + self.conv(x.unflatten(-1, (4, 2, 2)).flatten(0, 1)).mean())


@pytest.fixture(scope="module", autouse=True)
def _alone():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def nets():
    """A model and the same one sharded, with units that are layers themselves."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain, net = Net(), Net()
    net.load_state_dict(plain.state_dict())
    mesh = distributed.init_device_mesh("cpu", (1,))
    for layer in (net.first, net.attention, net.cut, net):
        fully_shard(layer, mesh=mesh)
    return plain, net


def test_a_unit_has_the_class_of_what_it_was(nets):
    plain, net = nets
    pairs = list(zip(plain.modules(), net.modules(), strict=True))
    assert type(net.first) is not nn.Linear
    assert [plain_type(module) for _, module in pairs] == [type(module) for module, _ in pairs]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_the_same_is_found_in_a_sharded_model(nets, split, again):
    plain, net = (lp.find_targets(one, split_fused=split, cut_again=again) for one in nets)
    assert list(plain) == list(net)
    assert plain.skipped == net.skipped
    assert [view_of(one).shape for one in plain.values() if not again] == [
        view_of(one).shape for one in net.values() if not again
    ]


def test_what_is_shown_of_a_sharded_bias_has_its_size_and_no_values(nets):
    targets = lp.find_targets(nets[1], split_fused=True)
    assert targets["qkv.k"].bias.shape == (16,)
    assert targets["qkv.k"].bias.device.type == "meta"


def all_views(net):
    targets = lp.find_targets(net, split_fused=True, cut_again=True)
    return {name: view_of(one) for name, one in targets.items()}


def test_stand_ins_hold_what_they_are_given_and_share_the_rest(nets):
    plain, net = (all_views(one) for one in nets)
    for name, view in net.items():
        whole = gathered(view)
        torch.testing.assert_close(whole.weight, plain[name].weight, rtol=0, atol=0)
        assert type(whole.parameter.data) is torch.Tensor
        assert type(whole.module) is plain_type(view.module)
        assert whole.shape == view.shape
        assert whole.part == view.part
        held = pinned(view)
        assert held.parameter is view.parameter
        other = stand_in(view, torch.zeros(view.parameter.shape))
        if view.rank is None:
            assert not other.weight.any()
        assert other.parameter is not view.parameter


def test_a_pinned_stand_in_keeps_the_sharded_parameter_while_the_unit_is_whole(nets):
    from torch.distributed.tensor import DTensor

    net = nets[1]
    held, before = pinned(view_of(net.first)), net.first.weight
    net.first.unshard()
    assert not isinstance(net.first.weight, DTensor)
    assert held.parameter is before
    engine.reshard_(net)
    assert net.first.weight is before


def test_a_stand_in_has_no_hooks_and_no_say_in_its_layer(nets):
    net = nets[1]
    net.qkv.register_forward_hook(lambda *_: None)
    whole = gathered(view_of(net.qkv))
    assert hooks_of(net.qkv)
    assert not hooks_of(whole.module)
    whole.module.weight = nn.Parameter(torch.zeros(48, 16))
    assert net.qkv.weight is not whole.module.weight


def test_full_gives_what_is_plain_itself_and_the_other_way_round(nets):
    net = nets[1]
    plain = torch.zeros(3)
    assert full(plain).data_ptr() == plain.data_ptr()
    weight = net.qkv.weight
    local = weight.detach().to_local()
    assert dtensor_like(local, weight).placements == weight.placements
    torch.testing.assert_close(full(dtensor_like(2 * local, weight)), 2 * full(weight))


def test_sharded_models_are_told_from_others(nets):
    assert [engine.is_sharded(one) for one in nets] == [False, True]
    for one in nets:
        engine.check_engine(one)


NAMES = [(what, name) for what, names in engine.NAMES.items() for name in names]


@pytest.mark.parametrize(("what", "name"), NAMES)
def test_a_torch_without_a_name_is_refused_before_training(nets, monkeypatch, what, name):
    """Whatever is used has to be probed: hiding it from the probe must be seen."""
    monkeypatch.setitem(engine.NAMES, what, (*engine.NAMES[what][:-1], "not_" + name))
    with pytest.raises(UnsupportedError, match=f"torch {torch.__version__.split('+')[0]}.*not_{name}"):
        engine.check_engine(nets[1])


def test_old_versions_are_refused_on_the_cpu(nets, monkeypatch):
    monkeypatch.setattr(engine, "version", lambda: (2, 8))
    with pytest.raises(UnsupportedError, match="needs torch 2.10"):
        engine.check_engine(nets[1])
    engine.check_engine(nets[0])


def test_a_weight_of_which_processes_have_addends_is_left_alone():
    from torch.distributed.tensor import DTensor, Partial

    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = distributed.init_device_mesh("cpu", (1,))
    net[0].weight = nn.Parameter(DTensor.from_local(torch.zeros(8, 8), mesh, [Partial()]))
    found = lp.find_targets(net)
    assert list(found) == ["1"]
    assert "neither shards nor copies" in found.skipped["0"]
