"""Canvas and colours of figures, through matplotlib without its global state."""

from typing import TYPE_CHECKING

from lightning_prehab.errors import PrehabError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Grey and blue differ in lightness too, for those who do not see colours, and in print.
BEFORE, AFTER = "#b6bec8", "#0b5cad"


def new_figure(height: float) -> "Figure":
    """An empty one of so many inches, 8 wide.

    Raises:
        PrehabError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrehabError("Figures need matplotlib: pip install 'lightning-prehab[plot]'.") from error
    return Figure(figsize=(8, max(height, 2.0)), layout="constrained")
