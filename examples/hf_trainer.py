"""Without Lightning: ``compress_``, then your own ``transformers.Trainer``, then ``save_pretrained``.

``python examples/hf_trainer.py --model MODEL --train train.tsv --validation dev.tsv --epochs 0`` compresses a
classifier that is fine-tuned already, and trains it on for an epoch. Without arguments it trains a small BERT on
generated sentences first; that takes less than a minute on one CPU core.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from hf_sentences import (
    Example,
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
from transformers import AutoModelForSequenceClassification, EvalPrediction, Trainer, TrainingArguments

import lightning_prehab as lp


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def validate(trainer: Trainer) -> tuple[float, float]:
    """Accuracy and loss."""
    found = trainer.evaluate()
    return found["eval_accuracy"], found["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compress a transformers text classifier between two trainings.")
    add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning before the cut; 0 for none")
    parser.add_argument("--recovery-epochs", type=int, default=2, help="of training after the cut")
    parser.add_argument("--calibration-batches", type=int, default=32, help="batches for the statistics of the cut")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    args = parser.parse_args()
    check_arguments(parser, args)
    if args.fast:
        args.epochs = args.recovery_epochs = 1

    transformers.set_seed(args.seed)
    train, validation, labels = load_sentences(args)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(args.model or write_small_bert(Path(folder)), labels)
    examples = encode(train, labels, tokenizer, args.max_length)
    sentences = encode(validation, labels, tokenizer, args.max_length)

    def trainer(epochs: int) -> Trainer:
        """A new one for each stage: a Trainer keeps its optimizer, and the surgery has changed the parameters."""
        settings = TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=epochs,
            learning_rate=args.lr,
            warmup_steps=max(epochs * len(examples) // (10 * args.batch_size), 1),
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            seed=args.seed,
            use_cpu=args.cpu,
            dataloader_pin_memory=torch.cuda.is_available() and not args.cpu,
            save_strategy="no",
            report_to="none",
        )
        return Trainer(
            model,
            settings,
            data_collator=collator(tokenizer),
            train_dataset=examples,
            eval_dataset=sentences,
            compute_metrics=accuracy,
        )

    rows: dict[str, tuple[float, float]] = {}
    first = trainer(args.epochs)
    if args.epochs:
        first.train()
    rows["before the cut"] = validate(first)

    loader: DataLoader[Example] = DataLoader(examples, args.batch_size, collate_fn=collator(tokenizer))
    batches = [batch for batch, _ in zip(loader, range(args.calibration_batches), strict=False)]
    report = lp.compress_(model, args.keep, batches)
    print(report)

    second = trainer(args.recovery_epochs)
    rows["right after"] = validate(second)
    second.train()
    rows["after recovery"] = validate(second)

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    model = AutoModelForSequenceClassification.from_pretrained(args.output)
    rows["saved and loaded again"] = validate(trainer(1))
    show(rows, len(validation), report)


if __name__ == "__main__":
    main()
