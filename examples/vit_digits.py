"""A Vision Transformer on scikit-learn's digits: prehab, surgery and rehab, beside the same run with a plain SVD cut.

Run ``python examples/vit_digits.py``; it takes about a minute and a half on one CPU core. The LightningModule below
knows nothing of lightning_prehab: three callbacks do the work.
"""

import argparse
import logging
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

import lightning_prehab as lp


class DigitsViT(L.LightningModule):
    """An ordinary image classifier: timm's VisionTransformer on 8x8 grey images in 16 patches of 2x2."""

    def __init__(self, steps: int, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr, self.steps = lr, steps
        self.model = timm.models.VisionTransformer(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=4,
            num_heads=4,
            global_pool="avg",
            class_token=False,
            qk_norm=True,
        )
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.model(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(L.LightningDataModule):
    """The 1,797 digits that scikit-learn ships: 1,200 to train on, 597 to validate."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
        data = TensorDataset(images, torch.tensor(digits.target))
        self.train, self.val = random_split(data, [1200, 597], generator=torch.Generator().manual_seed(seed))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=597)


class Watch(L.Callback):
    """Validation accuracy after every epoch, printed as it comes, and once more right after the cut."""

    def __init__(self, data: Digits) -> None:
        self.data = data
        self.per_epoch: list[float] = []
        self.right_after = float("nan")

    @torch.no_grad()
    def on_surgery(self, trainer: L.Trainer, pl_module: DigitsViT, report: lp.CompressionReport) -> None:
        metric = MulticlassAccuracy(num_classes=10, average="micro").to(pl_module.device)
        pl_module.eval()
        for images, labels in self.data.val_dataloader():
            metric(pl_module.model(images.to(pl_module.device)), labels.to(pl_module.device))
        pl_module.train()
        self.right_after = metric.compute().item()

    def on_validation_end(self, trainer: L.Trainer, pl_module: DigitsViT) -> None:
        self.per_epoch.append(trainer.callback_metrics["val_accuracy"].item())
        print(f"{100 * self.per_epoch[-1]:.0f}", end=" ", flush=True)


@dataclass(frozen=True)
class Outcome:
    """What came of one run: parameters before and after, and accuracies in %."""

    parameters: tuple[int, int]
    before: float
    right_after: float
    end: float


def run(name: str, callbacks: list[L.Callback], args: argparse.Namespace) -> Outcome:
    """Trains one model with the given callbacks."""
    print(f"\n--- {name}: validation accuracy after each epoch, in %")
    L.seed_everything(args.seed, verbose=False)
    data = Digits(args.seed)
    epochs = args.prehab_epochs + args.rehab_epochs
    watch = Watch(data)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, watch],
    )
    trainer.fit(DigitsViT(steps=epochs * len(data.train_dataloader())), data)
    report = next(callback.report for callback in callbacks if isinstance(callback, lp.CompressionCallback))
    print()
    accuracies = (watch.per_epoch[args.prehab_epochs - 1], watch.right_after, watch.per_epoch[-1])
    return Outcome((report.parameters_before, report.parameters_after), *(100 * accuracy for accuracy in accuracies))


def recipes(args: argparse.Namespace) -> dict[str, Callable[[], list[L.Callback]]]:
    """What is compared; the classifier head stays dense in every row."""

    def cut(**settings: object) -> lp.CompressionCallback:
        return lp.CompressionCallback(args.prehab_epochs, args.keep, exclude_modules="head", **settings)

    return {
        "prehab, surgery, rehab": lambda: [
            lp.PrehabCallback(),
            cut(),
            lp.RehabSchedule(warmup_epochs=1),
        ],
        "without prehab": lambda: [cut(), lp.RehabSchedule(warmup_epochs=1)],
        "by plain SVD": lambda: [cut(factorization=lp.SVD()), lp.RehabSchedule(warmup_epochs=1)],
    }


def table(outcomes: dict[str, Outcome]) -> str:
    """A row for each run."""
    rows = [["run", "parameters", "before the cut", "right after", "after rehab"]]
    for name, one in outcomes.items():
        before, after = one.parameters
        accuracies = (f"{accuracy:.1f} %" for accuracy in (one.before, one.right_after, one.end))
        rows.append([name, f"{before:,} -> {after:,}", *accuracies])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def conclusion(outcomes: dict[str, Outcome]) -> str:
    """What was gained by the first run, in words, beside the others."""
    first = next(iter(outcomes.values()))
    before, after = first.parameters
    cuts = [f"cut {name} {one.end:.1f} % ({one.right_after:.1f} %)" for name, one in [*outcomes.items()][1:]]
    return (
        f"{before / after:.1f} times fewer parameters: accuracy {first.before:.1f} % before the cut, {first.end:.1f} % "
        f"at the end ({first.right_after:.1f} % right after the cut). For comparison: {', '.join(cuts)}. "
        "These are single runs: differences of up to two points are noise."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a small Vision Transformer while it trains.")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the targets' parameters to keep, in (0, 1]")
    parser.add_argument("--prehab-epochs", type=int, default=16, help="epochs before the surgery")
    parser.add_argument("--rehab-epochs", type=int, default=6, help="epochs after the surgery")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer, e.g. cpu or gpu")
    parser.add_argument("--fast", action="store_true", help="two epochs only, to see that it runs")
    args = parser.parse_args()
    if args.fast:
        args.prehab_epochs = args.rehab_epochs = 1
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no hints
    warnings.filterwarnings("ignore", module=r"lightning\.")
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other

    outcomes = {name: run(name, callbacks(), args) for name, callbacks in recipes(args).items()}
    print(f"\nkeep {args.keep:g} of the targets' parameters; validation accuracy on 597 digits\n")
    print(table(outcomes))
    print(f"\n{textwrap.fill(conclusion(outcomes), 100)}")


if __name__ == "__main__":
    main()
