"""What the command line measures of a model's worth, and on which rows."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_prehab.cli.inputs import Batches, read_batches
from lightning_prehab.cli.outputs import note
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
_KEPT = "evaluation.json"


class Measured(NamedTuple):
    """What a model is measured on.

    Attributes:
        batches: Some batches.
        source: The name of the file that they are from.
        held_back: Whether they are the part of it that is left out of the calibration.
        found: How to find them again: the file and its checksum, and what else they depend on.
    """

    batches: Batches
    source: str
    held_back: bool
    found: Mapping[str, Any]

    def evaluation(self) -> Evaluation:
        """One that has measured nothing yet."""
        return Evaluation(self.batches, held_back=self.held_back, source=self.source)

    def save(self, folder: Path) -> None:
        """Says beside the statistics of a plan where the rows are; they are not stored twice."""
        (folder / _KEPT).write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def read_evaluation(settings: Any, batches: Batches | None) -> tuple[Batches | None, Measured | None]:
    """The batches to calibrate with, and what ``--evaluate`` says: a share of them, other data, or nothing.

    Raises:
        ArgumentError: If the file cannot be read, or there is nothing to hold back.
    """
    wish = settings.evaluate
    if wish is None:
        wish = SHARE if batches is not None and _rows(batches) >= FEWEST_ROWS else 0.0
    if isinstance(wish, str):
        return batches, Measured(_read(wish, settings), Path(wish).name, False, _found(wish, settings, None))
    if wish == 0.0:
        return batches, None
    if batches is None:
        raise ArgumentError(f"--evaluate {wish} holds rows of --data back; give --data, or --evaluate a file.")
    rest, held = hold_back(batches, wish)
    return rest, Measured(held, Path(settings.data).name, True, _found(settings.data, settings, wish))


def kept_evaluation(folder: Path, source: str) -> Measured | None:
    """The rows that are named beside the statistics of a plan; None, with a note, if their file is not what it was.

    Args:
        folder: That of the statistics.
        source: The Hugging Face folder whose tokenizer reads text.

    Raises:
        ArgumentError: If what is there cannot be read.
    """
    path = folder / _KEPT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        file, share = Path(found["file"]), found["share"]
        if not file.is_file() or _checksum(file) != found["sha256"]:
            note(f"{file} is not what it was when the plan was made; --evaluate FILE says what the model is worth.")
            return None
        batches = read_batches(str(file), source, found["batch_size"], found["max_length"])
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise ArgumentError(f"{path} cannot be read ({error}); give --evaluate 0, or a file.") from error
    held = batches if share is None else hold_back(batches, share)[1]
    return Measured(held, file.name, share is not None, found)


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


def _found(file: str, settings: Any, share: float | None) -> dict[str, Any]:
    if settings.output is None:  # nothing is kept that could be found again
        return {}
    rows = {"batch_size": settings.batch_size, "max_length": settings.max_length, "share": share}
    return {"file": str(Path(file).absolute()), "sha256": _checksum(Path(file)), **rows}


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
