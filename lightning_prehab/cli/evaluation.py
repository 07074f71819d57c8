"""What the command line measures of a model's worth, and on which rows."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_prehab.cli.inputs import Batches, read_batches, reason
from lightning_prehab.documents.settings import read_file
from lightning_prehab.errors import ArgumentError
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.evaluation import Evaluation
from lightning_prehab.report.scores import Scores
from lightning_prehab.statistics.batches import batch_size
from lightning_prehab.statistics.held_back import hold_back

#: Of the rows of the data, held back where nobody says otherwise.
SHARE = 0.1
#: With fewer rows than this nothing is held back unless asked for: less than three would be left to measure on.
FEWEST_ROWS = 30
#: Of the folder that ``plan --output`` writes beside a plan.
_KEPT = "evaluation.pt"


class Measured(NamedTuple):
    """What a model is measured on.

    Attributes:
        batches: Some batches.
        source: The name of the file that they are from.
        held_back: Whether they are the part of it that is left out of the calibration.
    """

    batches: Batches
    source: str
    held_back: bool = False

    def evaluation(self) -> Evaluation:
        """One that has measured nothing yet."""
        return Evaluation(self.batches, held_back=self.held_back, source=self.source)

    def save(self, folder: Path) -> None:
        """Puts it beside the statistics of a plan."""
        torch.save(self._asdict(), folder / _KEPT)


def read_evaluation(settings: Any, batches: Batches | None) -> tuple[Batches | None, Measured | None]:
    """The batches to calibrate with, and what ``--evaluate`` says: a share of them, other data, or nothing.

    Raises:
        ArgumentError: If the file cannot be read, or there is nothing to hold back.
    """
    wish = settings.evaluate
    if wish is None:
        wish = SHARE if batches is not None and _rows(batches) >= FEWEST_ROWS else 0.0
    if isinstance(wish, str):
        return batches, Measured(_read(wish, settings), Path(wish).name)
    if wish == 0.0:
        return batches, None
    if batches is None:
        raise ArgumentError(f"--evaluate {wish} holds rows of --data back; give --data, or --evaluate a file.")
    rest, held = hold_back(batches, wish)
    return rest, Measured(held, Path(settings.data).name, held_back=True)


def kept_evaluation(folder: Path) -> Measured | None:
    """What lies beside the statistics of a plan, if something does.

    Raises:
        ArgumentError: If it cannot be read.
    """
    path = folder / _KEPT
    if not path.is_file():
        return None
    try:
        return Measured(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged file leads to
        raise ArgumentError(f"{path} cannot be read ({reason(error)}); give --evaluate 0, or a file.") from error


def compare_scores(
    settings: Any, dense: nn.Module, low: nn.Module, batches: Batches | None, report: Path
) -> Scores | None:
    """What both models are worth on the data, if there is any and something can be told.

    Data of the name that the compressed model was calibrated with is called so, as far as its report, a file that may
    be missing, says that.
    """
    if batches is None:
        return None
    name = Path(settings.data).name
    known = _calibrated_with(name, report)
    evaluation = Evaluation(batches, source=f"{name} (the name of the calibration data)" if known else name)
    before = evaluation.score(dense)
    after = None if before is None else evaluation.score(low)
    return None if before is None or after is None else Scores(before, after)


def scores_in(bench: str) -> Scores | None:
    """Those in a file that holds what ``bench --json`` has printed, if it has some.

    Raises:
        CheckpointError: If they are something else.
    """
    found = json.loads(read_file(bench)).get("scores")
    return None if found is None else Scores.from_dict(found)


def _read(file: str, settings: Any) -> Batches:
    try:
        return read_batches(file, settings.source, settings.batch_size, settings.max_length)
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("--data", "--evaluate", 1)) from error


def _calibrated_with(name: str, report: Path) -> bool:
    if not report.is_file():
        return False
    scores = CompressionReport.load_json(report).scores
    return scores is not None and scores.data.endswith(f"held-back rows of {name}")


def _rows(batches: Batches) -> int:
    return sum(batch_size(batch) for batch in batches)
