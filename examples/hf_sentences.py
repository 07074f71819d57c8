"""What both Hugging Face examples need: sentences to classify, and a small BERT where no model is given.

Sentences come from files with lines of ``text<TAB>label``, as SST-2 is kept, or are generated: "the plot was not bad
but the ending was very dull" is what its last part says it is, but for one label in twenty.
"""

import argparse
import itertools
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lightning_prehab as lp

THINGS = ["plot", "ending", "film", "cast", "music", "camera", "script", "hero", "joke", "scene"]
GOOD = ["good", "lovely", "clever", "warm", "bright", "funny", "moving", "fresh"]
BAD = ["bad", "dull", "silly", "cold", "dark", "flat", "stale", "slow"]
DEGREES = ["", "not", "very", "not very", "quite"]
#: Share of the generated labels that are wrong.
NOISE = 0.05

Example = dict[str, list[int] | int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that both examples have."""
    parser.add_argument("--model", help="name on the hub, or folder; without it a small BERT with random weights")
    parser.add_argument("--train", type=Path, help="file with lines of text<TAB>label; without it generated sentences")
    parser.add_argument("--validation", type=Path, help="the same, to validate; goes with --train")
    parser.add_argument("--keep", type=float, default=0.1, help="share of the layers' parameters to keep, in (0, 1]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="peak learning rate; 3e-5 with --model, else 1e-3")
    parser.add_argument("--max-length", type=int, default=128, help="tokens after which a sentence is cut off")
    parser.add_argument("--output", type=Path, default=Path("small-classifier"), help="folder for the compressed model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="two epochs on few sentences, to see that it runs")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what depends on other arguments; the number of threads too."""
    if (args.train is None) != (args.validation is None):
        parser.error("--train and --validation go together")
    if args.lr is None:
        args.lr = 1e-3 if args.model is None else 3e-5
    if args.model is None:
        torch.set_num_threads(1)  # the matrices of the small BERT are small: threads would only wait for each other


def generate(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of two parts; the second one decides."""
    random = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=random))]

    pairs = []
    for _ in range(count):
        parts = []
        for _ in range(2):
            degree, word = pick(DEGREES), pick(GOOD + BAD)
            parts.append(" ".join(["the", pick(THINGS), "was", *degree.split(), word]))
            label = "good" if (word in GOOD) != degree.startswith("not") else "bad"
        if float(torch.rand((), generator=random)) < NOISE:
            label = "bad" if label == "good" else "good"
        pairs.append((" but ".join(parts), label))
    return pairs


def read(file: Path) -> list[tuple[str, str]]:
    """Text and label of each line; a heading ``sentence<TAB>label`` is passed over."""
    pairs = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        text, tab, label = line.rpartition("\t")
        if not tab or not text.strip():
            raise SystemExit(f"{file}, line {number}: no text<TAB>label: {line[:60]!r}")
        if (number, label) != (1, "label"):
            pairs.append((text, label))
    return pairs


def load_sentences(args: argparse.Namespace) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """Sentences to train on, sentences to validate, and the names of the classes in alphabetical order."""
    if args.train is not None:
        train, validation = read(args.train), read(args.validation)
    else:
        train, validation = generate(2048, args.seed), generate(512, args.seed + 1)
    if args.fast:
        train, validation = train[:256], validation[:64]
    labels = sorted({label for _, label in train})
    unknown = {label for _, label in validation} - set(labels)
    if len(labels) < 2 or unknown:
        raise SystemExit(f"Classes of the training sentences: {labels}; of the others too: {sorted(unknown)}.")
    return train, validation, labels


def write_small_bert(folder: Path) -> Path:
    """A BERT with random weights that knows the words of the generated sentences, as a folder for from_pretrained."""
    degrees = itertools.chain.from_iterable(degree.split() for degree in DEGREES)
    words = dict.fromkeys(["the", "was", "but", *THINGS, *GOOD, *BAD, *degrees])
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def load_model(source: str | Path, labels: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, with one output for each class."""
    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)}
    )
    return model, AutoTokenizer.from_pretrained(source)


def encode(
    pairs: list[tuple[str, str]], labels: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Token ids and class of each sentence, of different lengths."""
    texts = tokenizer([text for text, _ in pairs], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "labels": labels.index(label)}
        for ids, (_, label) in zip(texts["input_ids"], pairs, strict=True)
    ]


def show(rows: dict[str, tuple[float, float]], count: int, report: lp.CompressionReport) -> None:
    """Prints accuracy and loss at each moment, and what was gained."""
    print(f"\n{'':24}  accuracy  loss     ({count} sentences to validate)")
    for moment, (accuracy, loss) in rows.items():
        print(f"{moment:24}  {accuracy:<8.4f}  {loss:<.4f}")
    before, *_, end = (100 * accuracy for accuracy, _ in rows.values())
    fewer = report.parameters_before / report.parameters_after
    print(f"\n{fewer:.1f} times fewer parameters: accuracy {before:.1f} % before the cut, {end:.1f} % at the end.")


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Makes a batch with ``input_ids``, ``attention_mask`` and ``labels``; the mask keeps padding out of statistics."""
    return DataCollatorWithPadding(tokenizer)
