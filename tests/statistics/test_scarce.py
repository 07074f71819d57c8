"""What is said of calibration without data, or with little of it: the same at every door."""

import re
import warnings

import pytest
import torch
from torch import nn

import lightning_prehab as lp
from lightning_prehab.cli import main
from lightning_prehab.statistics.scarce import REAL_SIZE, warning_of_no_data
from tests.before_the_house.make import Lit, Loader, trainer_of


def net(width=12):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 30), nn.Tanh(), nn.Linear(30, width))


FEW = (
    r"1 of 3 layers saw fewer calibration tokens than four times their input size "
    r"\(first: '4'; 120 tokens are enough for all\)\. "
)


@pytest.mark.parametrize("layers_at_once", [None, 1])
def test_few_tokens(layers_at_once, recwarn):
    """30 inputs: 120 tokens are enough, 119 are not."""
    lp.compress_(net(), 0.5, [torch.randn(60, 12), torch.randn(60, 12)], layers_at_once=layers_at_once)
    assert not [one for one in recwarn if "tokens" in str(one.message)]
    with pytest.warns(UserWarning, match=FEW + "Give more batches") as seen:
        lp.compress_(net(), 0.5, [torch.randn(60, 12), torch.randn(59, 12)], layers_at_once=layers_at_once)
    assert len([one for one in seen if "tokens" in str(one.message)]) == 1


def test_methods_that_look_at_no_data_are_not_warned_of(recwarn):
    lp.compress_(net(), 0.5, [torch.randn(5, 12)], factorization=lp.SVD())
    assert not list(recwarn)


def test_the_callback_says_the_same(tmp_path):
    class Short(Loader):
        def __iter__(self):
            return iter([(x[:8], y[:8]) for x, y in super().__iter__()][:1])

        def __len__(self):
            return 1

    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=[lp.CompressionCallback(0, 0.5)])
    with pytest.warns(UserWarning, match="layers saw fewer calibration tokens.*Raise calibration_batches, or the shr"):
        trainer.fit(Lit("mlp"), Short("mlp"))


class Real(nn.Module):
    """Just large enough."""

    def __init__(self, size=REAL_SIZE):
        super().__init__()
        self.fc = nn.Linear(1000, size // 1000)

    def forward(self, x):
        return self.fc(x)


def test_without_data_a_model_of_real_size_is_warned_of(recwarn):
    lp.compress_(Real(REAL_SIZE - 1000), 0.5)
    assert not list(recwarn)
    for method in (None, lp.SVD()):
        with pytest.warns(
            UserWarning, match=r"1,000,000 parameters are cut by plain SVD, without data.*--data"
        ) as seen:
            lp.compress_(Real(), 0.5, factorization=method)
        (text,) = [str(one.message) for one in seen]
        assert text.count(". ") == 1  # two sentences
    assert warning_of_no_data(REAL_SIZE - 1) is None


def test_with_data_it_is_not(recwarn):
    lp.compress_(Real(), 0.5, [torch.randn(2000, 1000), torch.randn(2000, 1000)], factorization=lp.WhitenedSVD())
    lp.compress_(Real(), 0.5, [torch.randn(8, 1000)], factorization=lp.SVD())
    lp.make_plan(lp.find_targets(Real()), 0.5, lp.SVD())
    assert not list(recwarn)


def test_the_command_line_says_it_too(tmp_path, capsys):
    trainer = trainer_of(tmp_path, max_epochs=0)
    trainer.fit(Lit("mlp"), Loader("mlp"))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    words = [str(tmp_path / "dense.ckpt"), "--model", f"{Lit.__module__}.{Lit.__qualname__}", "--data"]
    torch.save([x[:3] for x, _ in Loader("mlp")][:1], tmp_path / "few.pt")
    words.append(str(tmp_path / "few.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for command in (["plan", *words], ["compress", *words, "--output", str(tmp_path / "small")]):
            assert main(command) == 0
            error = capsys.readouterr().err
            found = [line for line in error.splitlines() if "tokens" in line]
            assert len(found) == 1, error
            assert re.match(r"warning: . of . layers saw fewer calibration tokens .*--data", found[0])
