"""Targets that can be seen as more than one matrix, such as the two schemes of a convolution.

A form is told by its shape in plans and files, and by its name in statistics: those of the ordinary form stand under
the name of the target, those of another one under ``"name:form"``.
"""

from collections.abc import Mapping

from lightning_prehab.kinds import MatrixView, kind_of, view_of
from lightning_prehab.targets.find import Targets
from lightning_prehab.targets.locate import Target


def form_name(name: str, target: Target) -> str:
    """The name of a target in one of its forms.

    >>> from torch import nn
    >>> form_name("conv", nn.Conv2d(4, 4, 3)), [form_name("conv", form) for form in forms_of(nn.Conv2d(4, 4, 3))]
    ('conv', ['conv', 'conv:spatial'])
    """
    return name_in_form(name, view_of(target).form)


def name_in_form(name: str, form: str) -> str:
    """The name of a target in the named form; ``""`` is the ordinary one."""
    return f"{name}:{form}" if form else name


def forms_of(target: Target) -> list[Target]:
    """The forms that planning may choose from; a matrix that is given as a view is chosen already."""
    kind = None if isinstance(target, MatrixView) else kind_of(target)
    if kind is None or isinstance(target, MatrixView):
        return [target]
    others = [view for views in kind.choices(target)[1:] for view in views.values()]
    return [target, *others]


def in_all_forms(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Every target in all of its forms, by the names of their statistics."""
    return {form_name(name, form): form for name, target in targets.items() for form in forms_of(target)}


def form_of_shape(target: Target, shape: tuple[int, int]) -> Target:
    """The form of a target whose matrix has this shape; the target itself if none has."""
    return next((form for form in forms_of(target) if view_of(form).shape == shape), target)


def in_chosen_forms(forms: Targets, chosen: Mapping[str, str]) -> Targets:
    """Each target in one form: ``forms`` holds all of them, ``chosen`` is ``{name: name of the form}``."""
    taken = {name: forms[form] for name, form in chosen.items()}
    return Targets(taken, forms.skipped, forms.model_parameters)
