"""What a CompressionCallback tells people of a run, in one place: checkpoints that it follows, cuts that never came."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_prehab.callbacks._cuts import Cut, plain_recipe
from lightning_prehab.callbacks._trainer import epochs_begun
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import NumericalError, PrehabError
from lightning_prehab.targets.find import count_parameters
from lightning_prehab.targets.locate import low_rank_layers


def say_followed(module: nn.Module, before: int, keep: float | None = None) -> None:
    """One line, if a module has taken another structure from a checkpoint.

    Args:
        module: As it is now.
        before: Parameters that it had.
        keep: Of the targets, as the report in the checkpoint says; None if there is none.
    """
    after, cut = count_parameters(module), len(low_rank_layers(module))
    if after != before:
        share = "" if keep is None or not cut else f", keep {keep:.3f}"
        layers = f"{cut} low-rank layers" if cut else "no low-rank layers"
        rank_zero_info(f"The model follows the checkpoint: {layers}{share} ({before:,} -> {after:,} parameters).")


def say_other_cuts(state: Mapping[str, Any], cuts: Sequence[Cut], with_epochs: bool) -> None:
    """Says whose settings count, where a run resumes with others than those of the checkpoint.

    Args:
        state: Of the callback that has written the checkpoint.
        cuts: Of the callback of this run.
        with_epochs: Whether their epochs are given, rather than waited for.
    """
    made = state.get("made", int(state.get("report") is not None))
    theirs = state.get("cuts") or [{"epoch": state["epoch"], "recipe": state.get("recipe")}]
    for index, (then, now) in enumerate(zip(theirs, cuts, strict=False)):
        _say_other_settings(then, now, with_epochs, done=index < made)
    if len(theirs) != len(cuts):
        rank_zero_info(
            f"The run that wrote the checkpoint was going to make {len(theirs)} cuts, of which it has made {made}; "
            f"this CompressionCallback makes {len(cuts)} in all."
        )


def say_passed_over(epochs: Sequence[int]) -> None:
    """Says that several cuts are due at the same time: the last one is made."""
    *others, last = epochs
    rank_zero_info(
        f"The cuts of the epochs {', '.join(map(str, epochs))} are all due: that of epoch {last} is made, and "
        f"{'those' if len(others) > 1 else 'that'} before it left out."
    )


def _say_other_settings(cut: Mapping[str, Any], own: Cut, with_epochs: bool, done: bool) -> None:
    """The same of one cut."""
    then, now = cut["recipe"], plain_recipe(own.recipe)
    epoch = own.epoch if with_epochs else None
    if then is None or now is None:  # an older file, or a class of the user's own
        then = now = {}
    if epoch is not None:
        then, now = {"epoch": cut["epoch"], **then}, {"epoch": epoch, **now}
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not changed:
        return
    old, new = (", ".join(f"{name}={show(wish.get(name))}" for name in changed) for wish in (then, now))
    if done:
        rank_zero_warn(
            f"The checkpoint comes from after a cut with {old}: the model stays as it was cut, and {new} of this "
            "CompressionCallback has no effect. For another cut, resume from a checkpoint of before it."
        )
    else:
        rank_zero_info(f"The run that wrote the checkpoint was going to cut with {old}; from now on {new} counts.")


def say_it_never_came(trainer: "pl.Trainer", epoch: int, number: str = "") -> None:
    """Warns that training has ended before the surgery.

    Args:
        trainer: The Trainer.
        epoch: Of the surgery.
        number: Which one it is, if others have been made.
    """
    begun = epochs_begun(trainer)
    which = {0: "", 1: " (0)", 2: " (0 and 1)"}.get(begun, f" (0 to {begun - 1})")
    what, still = (number, "stays as it was cut before") if number else ("the surgery", "is still dense")
    rank_zero_warn(
        f"Training ended after {begun} epoch{'s' * (begun != 1)}{which}; {what} waits for the start of epoch "
        f"{epoch}, and the model {still}. Train longer (max_epochs={epoch + 1} or more; max_steps, max_time and "
        f"EarlyStopping end a run too), or give CompressionCallback(epoch={max(begun - 1, 0)})."
    )


def diverged(error: NumericalError) -> NumericalError:
    """The error of a surgery, of a plan for one, or of a regularizer that has met NaN, with what to do."""
    return NumericalError(
        f"{error} Training has diverged, or started with such weights: see where the loss became NaN, then lower the "
        "learning rate, clip gradients (Trainer(gradient_clip_val=1.0)), or resume from an earlier checkpoint. The "
        "model has not been cut now."
    )


@contextmanager
def saying_what_to_do() -> Iterator[None]:
    """Inside, numbers that are not finite are explained, see :func:`diverged`."""
    try:
        yield
    except NumericalError as error:
        raise diverged(error) from error


def named(error: PrehabError, layer: str) -> PrehabError:
    """The error with the name of the layer that it is about."""
    found = type(error)(f"Layer {layer!r}: {error}")
    return diverged(found) if isinstance(found, NumericalError) else found
