"""A transformers text classifier in a Lightning Trainer: prehab, surgery and rehab, saved as transformers saves it.

``python examples/hf_text_classifier.py --model MODEL --train train.tsv --validation dev.tsv`` fine-tunes and compresses
any model that ``AutoModelForSequenceClassification`` loads, from the hub or a folder. Without arguments it takes a
small BERT and generated sentences, and less than a minute on one CPU core.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from hf_sentences import (
    add_arguments,
    check_arguments,
    collator,
    encode,
    load_model,
    load_sentences,
    show,
    write_small_bert,
)
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification, BatchEncoding, PreTrainedModel

import lightning_prehab as lp


class TextClassifier(L.LightningModule):
    """An ordinary classifier around a transformers model; it knows nothing of lightning_prehab."""

    def __init__(self, model: PreTrainedModel, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.model = model.train()  # from_pretrained gives it in eval mode, and Lightning keeps the mode
        self.accuracy = MulticlassAccuracy(num_classes=model.config.num_labels, average="micro")

    def training_step(self, batch: BatchEncoding, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: BatchEncoding, batch_idx: int) -> None:
        output = self.model(**batch)
        self.accuracy(output.logits, batch["labels"])
        self.log("val_loss", output.loss, batch_size=len(batch["labels"]))
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(L.Callback):
    """Validation accuracy and loss after every epoch, and once more right after the cut."""

    def __init__(self, data: DataLoader) -> None:
        self.data = data
        self.per_epoch: list[tuple[float, float]] = []
        self.right_after = float("nan"), float("nan")

    @torch.no_grad()
    def on_surgery(self, trainer: L.Trainer, pl_module: TextClassifier, report: lp.CompressionReport) -> None:
        pl_module.eval()
        self.right_after = validate(pl_module.model, self.data)
        pl_module.train()

    def on_validation_end(self, trainer: L.Trainer, pl_module: TextClassifier) -> None:
        logged = trainer.callback_metrics
        self.per_epoch.append((logged["val_accuracy"].item(), logged["val_loss"].item()))


@torch.no_grad()
def validate(model: PreTrainedModel, data: DataLoader) -> tuple[float, float]:
    """Accuracy and loss."""
    accuracy, loss = MulticlassAccuracy(num_classes=model.config.num_labels, average="micro"), MeanMetric()
    for batch in data:
        output = model(**batch.to(model.device))
        accuracy(output.logits.cpu(), batch["labels"].cpu())
        loss(output.loss.cpu(), len(batch["labels"]))
    return accuracy.compute().item(), loss.compute().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a transformers text classifier while it is fine-tuned.")
    add_arguments(parser)
    parser.add_argument("--prehab-epochs", type=int, default=4, help="epochs before the surgery")
    parser.add_argument("--rehab-epochs", type=int, default=2, help="epochs after the surgery")
    parser.add_argument("--accelerator", default="auto", help="as for lightning.Trainer, e.g. cpu or gpu")
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.fast:
        args.prehab_epochs = args.rehab_epochs = 1
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no hints
    warnings.filterwarnings("ignore", module=r"lightning\.")

    L.seed_everything(args.seed, verbose=False)
    train, validation, labels = load_sentences(args)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(args.model or write_small_bert(Path(folder)), labels)
    batches, sentences = (
        DataLoader(
            encode(pairs, labels, tokenizer, args.max_length),
            batch_size=args.batch_size,
            shuffle=pairs is train,
            collate_fn=collator(tokenizer),
        )
        for pairs in (train, validation)
    )

    watch, surgery = Watch(sentences), lp.CompressionCallback(args.prehab_epochs, args.keep)
    trainer = L.Trainer(
        max_epochs=args.prehab_epochs + args.rehab_epochs,
        accelerator=args.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            lp.PrehabCallback(),
            surgery,
            lp.RehabSchedule(warmup_steps=len(batches) // 2),
            watch,
        ],
    )
    trainer.fit(TextClassifier(model, args.lr), batches, sentences)

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    again = AutoModelForSequenceClassification.from_pretrained(args.output).to(model.device)
    rows = {
        "before the cut": watch.per_epoch[args.prehab_epochs - 1],
        "right after": watch.right_after,
        "after rehab": watch.per_epoch[-1],
        "saved and loaded again": validate(again, sentences),
    }
    show(rows, len(validation), surgery.report)


if __name__ == "__main__":
    main()
