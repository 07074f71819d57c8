"""How each target is stored once it is cut: as wished, or as two factors where it cannot be."""

from lightning_prehab.kinds import kind_again, view_of
from lightning_prehab.linalg.storage import Layout
from lightning_prehab.targets.locate import Target

#: How it is said of a layer that keeps two factors though another layout was asked for.
AS_FACTORS = "stored as two factors"


def layout_of(target: Target, wished: Layout) -> Layout:
    """How a target is stored if it is cut; what is in the pivot layout already stays in it."""
    if view_of(target).layout == "pivot":
        return "pivot"
    return wished if why_factors(target, wished) is None else "factors"


def why_factors(target: Target, wished: Layout) -> str | None:
    """Why a target keeps two factors, or None if it is stored as wished."""
    if wished == "factors":
        return None
    view = view_of(target)
    kind = kind_again(view.module)
    if kind is not None and kind.can_pivot(view):
        return None
    what = "a grouped convolution" if view.group_count > 1 else type(view.module).__name__
    what = f"the {view.form} form of a convolution" if view.form else what
    return f"{AS_FACTORS}: {what} has no {wished} layout"
