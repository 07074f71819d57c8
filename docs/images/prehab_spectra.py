"""Draws prehab_spectra.png, the picture of the README: python docs/images/prehab_spectra.py (extras examples, plot).

The Vision Transformer of examples/vit_digits.py is trained for 16 epochs, prepared for 6, cut to a tenth, and trained
on for 6, with the default recipe. Drawn are the singular values of the weight of one layer, as they are at the end of
each of these times. It takes a minute on one core.
"""

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import lightning as L
import lightning_prehab as lp
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from vit_digits import Digits, DigitsViT

LAYER, KEEP = "model.blocks.1.attn.qkv", 0.1
#: The smallest singular value that is drawn.
LOWEST = 1e-3


class Spectra(L.Callback):
    """Singular values of one layer at the end of each epoch, and the report of the cut."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.report: lp.CompressionReport | None = None

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: DigitsViT
    ) -> None:
        """Looks at the layer."""
        self.values.append(
            torch.linalg.svdvals(
                pl_module.get_submodule(LAYER).weight.detach()
            ).cpu()
        )

    def on_surgery(
        self,
        trainer: L.Trainer,
        pl_module: DigitsViT,
        report: lp.CompressionReport,
    ) -> None:
        """Remembers the report."""
        self.report = report


def train(epochs: int, prehab: int, rehab: int) -> Spectra:
    """One run: ``epochs`` of ordinary training, then ``prehab``, the cut, ``rehab``."""
    L.seed_everything(0, verbose=False)
    data, spectra = Digits(0), Spectra()
    total = epochs + prehab + rehab
    trainer = L.Trainer(
        max_epochs=total,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[
            lp.PrehabCallback(start_epoch=epochs),
            lp.CompressionCallback(
                epochs + prehab, KEEP, exclude_modules="head"
            ),
            lp.RehabSchedule(warmup_epochs=1),
            spectra,
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(DigitsViT(steps=total * len(data.train_dataloader())), data)
    return spectra


def draw(spectra: Spectra, epochs: int, prehab: int) -> Figure:
    """The three spectra in one picture of 800 by 360 pixels, black on white: it is read on dark pages too."""
    assert spectra.report is not None
    rank = spectra.report.ranks[LAYER]
    before, *between, at_cut = spectra.values[epochs - 1 : epochs + prehab]
    after = spectra.values[-1]
    figure = Figure(
        figsize=(8, 3.6), dpi=100, layout="constrained", facecolor="white"
    )
    axes = figure.subplots()
    places = range(1, len(before) + 1)
    axes.semilogy(
        places, before, color="#6b7480", linewidth=2.5, label="before prehab"
    )
    for number, values in enumerate(between, start=1):
        axes.semilogy(
            places, values, color="#c2410c", alpha=0.6, linewidth=1, zorder=1
        )
        if LOWEST < values[-1] < 0.8 * before[-1]:
            text = f"after {number} epochs of prehab"
            axes.text(
                len(before),
                0.8 * float(values[-1]),
                text,
                ha="right",
                va="top",
                fontsize=9,
            )
    axes.semilogy(
        places,
        at_cut,
        color="#c2410c",
        linewidth=2.5,
        linestyle="--",
        label="at the cut, after prehab",
    )
    axes.semilogy(
        places[:rank],
        after[:rank],
        "o",
        color="#0b5cad",
        markersize=7,
        label="after cut and rehab",
    )
    if rank is not None:
        axes.axvspan(
            rank + 0.5,
            len(before) + 0.5,
            color="#0b5cad",
            alpha=0.07,
            linewidth=0,
        )
        axes.axvline(rank + 0.5, color="black", linewidth=1)
        note = f" rank {rank} of {len(before)}: nothing is left beyond it when the cut comes"
        axes.text(rank + 0.5, 1.6 * LOWEST, note, fontsize=10)
    axes.set(
        xlim=(0.5, len(before) + 0.5),
        ylim=(LOWEST, 3 * float(max(before.max(), after.max()))),
    )
    axes.set_xlabel(
        f"singular values of {LAYER.removeprefix('model.')}, largest first",
        fontsize=10,
    )
    axes.set_ylabel("size", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", ncols=3, frameon=False, fontsize=10)
    return figure


def main() -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(
        description="Draws the spectra of a layer before prehab, at the cut, and after it."
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).with_suffix(".png")
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="few epochs only, to see that it runs",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    epochs, prehab, rehab = (1, 1, 1) if args.fast else (16, 6, 6)
    draw(train(epochs, prehab, rehab), epochs, prehab).savefig(
        args.output, metadata={"Software": None}
    )


if __name__ == "__main__":
    main()
