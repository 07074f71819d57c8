"""Where the tests of this folder run: on a GPU. Elsewhere they are skipped.

``CUDA_VISIBLE_DEVICES=0 pytest -n 8 tests/cuda`` (other tests hide the GPU). ``PREHAB_TEST_DEVICE=cpu`` runs on the CPU
what needs no GPU by its nature, which tests the tests, and ``=pretended:0`` on a device that is not there.
"""

import os
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prehab.layers import LowRankLayer
from tests.pretended import NAME, install, trainer_settings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that products can be the same bit by bit
_WISH = os.environ.get("PREHAB_TEST_DEVICE", "cuda")
if _WISH.startswith(NAME):
    install()
DEVICE = torch.device(_WISH)
HAS_GPU = torch.cuda.is_available()
if DEVICE.type == "cuda" and HAS_GPU:
    DEVICE = torch.device("cuda", 0)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with that of the CPU
    torch.backends.cuda.matmul.allow_tf32 = False
needs_device = pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_GPU, reason="there is no GPU, or it is hidden")
needs_gpu = pytest.mark.skipif(not HAS_GPU or DEVICE.type != "cuda", reason="there is no GPU, or it is hidden")


def not_pretended() -> None:
    """Skips what a pretended device cannot do."""
    if DEVICE.type == NAME:
        pytest.skip("for GPUs")


ACCELERATOR = "gpu" if DEVICE.type == "cuda" else DEVICE.type
#: On a pretended device: the lines that had to wait for it, with how often.
WAITS: Counter[str] = Counter()


def decisive_(model: nn.Module) -> nn.Module:
    """Weights whose spectra fall, so that rounding decides nothing: neither a rank nor a subspace."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
                u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator))
                v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator))
                module.weight.copy_((u * 3.0 * torch.exp(-torch.arange(min(m, n)) / 6)) @ v.mT)
    return model


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return decisive_(nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6)))


def labelled(count: int = 6, rows: int = 128) -> list[list[Tensor]]:
    """Batches on the CPU."""
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randn(rows, 24, generator=generator), torch.randint(6, (rows,), generator=generator)]
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """The same on all devices; labels that are drawn from logits need not be."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The whole matrix of each layer that is cut or could be, on the CPU, in float32."""
    found, inside = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, LowRankLayer):
            inside |= {id(one) for one in module.modules() if one is not module}  # factors differ in signs
        weight = None if id(module) in inside or isinstance(module, nn.Embedding) else getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            found[name] = weight.detach().float().cpu()
    return found


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: object = "") -> None:
    """The difference is small beside the whole, in the Frobenius norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape, what
    assert torch.isfinite(found).all(), what
    distance = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    assert distance <= tolerance, f"{what}: {distance:.2e}"


def assert_here(model: nn.Module, device: torch.device = DEVICE) -> None:
    """Every parameter and every buffer is on the device."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.device.type == device.type, f"{name} is on {tensor.device}"


def states_here(optimizer: torch.optim.Optimizer, device: torch.device = DEVICE) -> None:
    """Every moment is beside its parameter."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                assert value.device == parameter.device, key
    assert all(one.device.type == device.type for group in optimizer.param_groups for one in group["params"])


class Lit(pl.LightningModule):
    """A plain module that knows nothing of this package."""

    def __init__(self, make_optimizer: Any = None, manual: bool = False, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.make_optimizer = make_optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
        self.automatic_optimization = not manual
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        found = loss(self.net, batch)
        self.losses.append(found.detach().clone())  # on_before_backward adds to it in place
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(found)
            optimizer.step()
        return found

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", loss(self.net, batch))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def loader() -> DataLoader:
    """Six batches of 64 rows, always in the same order."""
    x, y = (torch.cat(parts) for parts in zip(*labelled(3), strict=True))
    return DataLoader(TensorDataset(x, y), 64)


def make_trainer(folder: Any, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": 4,
        "num_sanity_val_steps": 0,
    }
    if settings.setdefault("accelerator", ACCELERATOR) == NAME:
        settings |= trainer_settings()
    return pl.Trainer(**{**defaults, "callbacks": callbacks, **settings})
