"""What PrehabCallback accepts."""

from lightning_prehab.documents.checks import check_real, check_whole
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError
from lightning_prehab.regularizers import Penalty, Shrinkage

#: Settings that only penalties have, and their values where they are not given.
_PENALTY_ONLY = {"strength": None, "strength_share": None, "ramp_steps": 0, "every_n_steps": 1, "injection": "auto"}


def changed_for_penalties(*values: object) -> dict[str, object]:
    """Those of the settings that only penalties have which are given, in the order of :func:`check_regularizer`."""
    pairs = zip(_PENALTY_ONLY.items(), values, strict=True)
    return {name: value for (name, unset), value in pairs if value != unset}


def default_strength(regularizer: Penalty | Shrinkage) -> float:
    """The strength where none is given."""
    return regularizer.default_strength if isinstance(regularizer, Penalty) else 0.0


def check_regularizer(
    regularizer: object,
    strength: float | None,
    strength_share: float | None,
    ramp_steps: int,
    every_n_steps: int,
    injection: str,
) -> None:
    """Checks a regularizer and the settings that only penalties have."""
    if not isinstance(regularizer, Penalty | Shrinkage):
        hint = "; a strength comes second: PrehabCallback(StableRank(), 0.1)" if isinstance(regularizer, float) else ""
        if isinstance(regularizer, type | str):
            hint = f"; write {getattr(regularizer, '__name__', 'StableRank')}()"
        raise ArgumentError(f"Expected a Penalty or a Shrinkage, got {show(regularizer)}{hint}.")
    check_real("strength", strength, "[0, inf)", optional=True)
    check_real("strength_share", strength_share, "(0, inf)", optional=True)
    check_whole("ramp_steps", ramp_steps, 0)
    check_whole("every_n_steps", every_n_steps, 1)
    if injection not in ("auto", "loss", "gradient"):
        raise ArgumentError(f"injection must be 'auto', 'loss' or 'gradient', got {injection!r}.")
    if strength_share is not None and (strength is not None or injection == "loss"):
        raise ArgumentError(
            "strength_share replaces strength, and compares gradients: give no strength, and injection='gradient' or "
            "'auto'."
        )
    if isinstance(regularizer, Shrinkage):
        changed = changed_for_penalties(strength, strength_share, ramp_steps, every_n_steps, injection)
        for name, value in changed.items():
            raise ArgumentError(
                f"{regularizer} is applied to the weights after each optimizer step; {name}={value!r} belongs to "
                "penalties, which are added to the loss. Set the fields of the shrinkage instead."
            )


def check_when_and_where(
    space: str | None, start_epoch: int, stop_epoch: int | None, update_steps: int, forecast_every_n_steps: int
) -> None:
    """Checks the settings that all regularizers have."""
    if space not in (None, "weight", "activation", "loss"):
        raise ArgumentError(f"space must be 'weight', 'activation' or 'loss', got {space!r}.")
    check_whole("start_epoch", start_epoch, 0)
    check_whole("stop_epoch", stop_epoch, 1, optional=True)
    if stop_epoch is not None and stop_epoch <= start_epoch:
        raise ArgumentError(f"stop_epoch must come after start_epoch={start_epoch}, got {stop_epoch}.")
    check_whole("update_steps", update_steps, 0)
    check_whole("forecast_every_n_steps", forecast_every_n_steps, 0)
