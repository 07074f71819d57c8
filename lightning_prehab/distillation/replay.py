"""The teacher is asked what the student was asked."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prehab.distillation.calls import Call, by_clean_name
from lightning_prehab.distillation.teacher import Teacher
from lightning_prehab.distillation.values import all_tensors, with_tensors
from lightning_prehab.errors import StatisticsError, TargetError, UnsupportedError
from lightning_prehab.layers.linear import LowRankLayer
from lightning_prehab.refinement.distance import answer_in
from lightning_prehab.targets.names import clean_name

WAY_OUT = (
    "Name the module whose outputs are to be compared (module=), or give a function (module, batch) -> logits "
    "(forward=)."
)


@dataclass(frozen=True, eq=False)
class Pair:
    """What both have answered.

    Attributes:
        name: Of the module.
        asked: What it was called with: masks and labels may be among that.
        answer: Its answer, with its graph.
        right: That of the teacher, on the student's device.
        output: All that the teacher has returned.
        module: The module that has.
    """

    name: str
    asked: list[Any]
    answer: Tensor
    right: Tensor
    output: Any = None
    module: nn.Module | None = None


def check_calls(student: nn.Module, calls: Sequence[Call], names: Sequence[str] | None = None) -> None:
    """Raises what :func:`pairs_of` would raise of these calls, whoever the teacher is.

    Args:
        student: The model.
        calls: Of a step.
        names: Of the features; then what :func:`features_of` would raise.
    """
    if names is None:
        calls = _answering(calls)
    else:
        calls = _featured(calls, names)
        returned = [(name, one) for call in calls for name, outputs in call.features.items() for one in outputs]
        trained = [(name, one) for name, one in returned if not _is_frozen(student, name, one)]
        _check_some(trained)
        for name, output in trained:
            _feature(name, output)
    known: set[int] = set()
    for call in calls:
        _check_asked(call, known)
        known |= {id(one) for one in all_tensors(call.output)}


def pairs_of(student: nn.Module, teacher: Teacher, calls: Sequence[Call]) -> list[Pair]:
    """The answers that end the calls of a step: those that no later call of it was given.

    A call that was given what an earlier one has returned is asked of the teacher with the teacher's own. If the model
    has low-rank layers, answers that none of them has a part in are left out.

    Raises:
        StatisticsError: If no call returns anything that can be compared.
        UnsupportedError: If a call was given something else that was computed with the model's weights.
    """
    calls = _answering(calls)
    known: dict[int, Tensor] = {}  # outputs of the student -> those of the teacher
    made: dict[int, int] = {}  # outputs of the student -> number of the call
    sources: list[set[int]] = []
    outputs: list[Any] = []
    for number, call in enumerate(calls):
        given = [id(one) for one in all_tensors((call.args, call.kwargs))]
        sources.append({made[one] for one in given if one in made})
        output = _ask(teacher, call, known)
        outputs.append(output)
        theirs, ours = list(all_tensors(output)), list(all_tensors(call.output))
        made |= {id(one): number for one in ours if id(one) not in given}
        if len(theirs) == len(ours):
            known |= {id(one): other for one, other in zip(ours, theirs, strict=True)}
    used = set[int]().union(*sources)
    ends = [number for number in range(len(calls)) if number not in used]
    cut = [number for number in ends if _is_cut(student, calls, sources, number)]
    return [_pair(teacher, calls[number], outputs[number]) for number in cut or ends]


def features_of(student: nn.Module, teacher: Teacher, calls: Sequence[Call], names: Sequence[str]) -> list[Pair]:
    """What the named modules have returned in the calls of a step, and what the teacher's do.

    What a module returns that is frozen, as is all before it, is left out.

    Raises:
        StatisticsError: If they were not called, or not as often.
        TargetError: If the teacher has no such module.
    """
    calls = _featured(calls, names)
    pairs: list[Pair] = []
    known: dict[int, Tensor] = {}
    for call in calls:
        with _features(teacher, names) as found:
            output = _ask(teacher, call, known)
        theirs, ours = list(all_tensors(output)), list(all_tensors(call.output))
        if len(theirs) == len(ours):
            known |= {id(one): other for one, other in zip(ours, theirs, strict=True)}
        for name, mine in call.features.items():
            if len(found.get(name, ())) != len(mine):
                raise StatisticsError(f"Module {name!r} is called {len(mine)} times, the teacher's another number.")
            for one, other in zip(mine, found[name], strict=True):
                if _is_frozen(student, name, one):
                    continue
                answer = _feature(name, one)
                pairs.append(Pair(name, [call.kwargs, call.args], answer, answer_in(other).to(answer.device)))
    _check_some(pairs)
    return pairs


def _check_some(found: Sequence[Any]) -> None:
    if not found:
        raise StatisticsError(
            "Nothing that comes before the modules that are compared is trained; name others (feature_modules=)."
        )


def _is_frozen(student: nn.Module, name: str, output: Any) -> bool:
    module = by_clean_name(student)[clean_name(name)]
    return not answer_in(output).requires_grad and not any(one.requires_grad for one in module.parameters())


def _answering(calls: Sequence[Call]) -> list[Call]:
    found = [call for call in calls if _has_answer(call)]
    if not found:
        raise StatisticsError(f"training_step calls no module that returns logits or numbers for each row. {WAY_OUT}")
    return found


def _featured(calls: Sequence[Call], names: Sequence[str]) -> list[Call]:
    found = [call for call in calls if call.features]
    if not found:
        raise StatisticsError(
            f"None of the modules {', '.join(map(repr, names[:3]))} ... is called in training_step, or only inside of "
            "what torch.compile has made; name others (feature_modules=), or compare the logits."
        )
    return found


def _feature(name: str, output: Any) -> Tensor:
    answer = answer_in(output)
    if not answer.requires_grad:
        raise UnsupportedError(
            f"What module {name!r} returns has no gradient: reentrant checkpointing hides it, or it is "
            "frozen. Use use_reentrant=False, name other modules (feature_modules=), or compare the logits."
        )
    return answer


def _check_asked(call: Call, known: Container[int]) -> None:
    """Raises :class:`UnsupportedError` if a teacher cannot be given what a call was given.

    Args:
        call: The call.
        known: The ids of what earlier calls have returned.
    """
    if any(one.grad_fn is not None and id(one) not in known for one in all_tensors((call.args, call.kwargs))):
        raise UnsupportedError(
            f"Module {call.name!r} is called with something that training_step has computed from the outputs of "
            f"the model, and the teacher cannot be asked the same. {WAY_OUT}"
        )
    if call.spoiled:
        raise UnsupportedError(
            f"Module {call.name!r} has changed its input in place, which it did not do before, and the teacher cannot "
            "be asked the same. Let forward work on a copy."
        )
    for name in ("past_key_values", "past_key_value"):
        if call.kwargs.get(name) is not None:
            raise UnsupportedError(
                f"Module {call.name!r} is called with {name}, of which the teacher would need its own. {WAY_OUT}"
            )


def _ask(teacher: Teacher, call: Call, known: dict[int, Tensor]) -> Any:
    _check_asked(call, known)
    device = teacher.device

    def given(tensor: Tensor) -> Tensor:
        if id(tensor) in known:
            return known[id(tensor)]
        tensor = call.copies.get(id(tensor), tensor)
        tensor = tensor.detach() if tensor.requires_grad else tensor
        return tensor if tensor.device == device else tensor.to(device)

    args, kwargs = with_tensors(call.args, given), with_tensors(call.kwargs, given)
    module = teacher.module_for(call)
    with teacher.at_work(call.autocast):
        try:
            return module(*args, **kwargs)
        except RuntimeError as error:
            _explain(error, teacher, call, (args, kwargs))
            raise


def _explain(error: Exception, teacher: Teacher, call: Call, given: Any) -> None:
    """Raises :class:`UnsupportedError` where the reason is that teacher and model compute in two dtypes."""
    theirs = {one.dtype for one in teacher.module.parameters() if one.is_floating_point()}
    ours = {one.dtype for one in all_tensors(given) if one.is_floating_point()}
    if call.autocast is None and teacher.half is None and theirs and ours and not ours <= theirs:
        raise UnsupportedError(
            f"The teacher has weights in {_dtypes(theirs)} and was given {_dtypes(ours)}, as module {call.name!r} of "
            "the model was. Convert the teacher to the dtype of the model, or give precision='half'."
        ) from error


def _dtypes(found: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(one).removeprefix("torch.") for one in found))


def _has_answer(call: Call) -> bool:
    try:
        return answer_in(call.output).requires_grad
    except StatisticsError:
        return False


def _pair(teacher: Teacher, call: Call, output: Any) -> Pair:
    answer = answer_in(call.output)
    right = answer_in(output).to(answer.device)
    return Pair(call.name, [call.kwargs, call.args], answer, right, output, teacher.module_for(call))


def _is_cut(student: nn.Module, calls: Sequence[Call], sources: Sequence[set[int]], number: int) -> bool:
    """Whether a low-rank layer has a part in what a call has returned."""
    module = by_clean_name(student)[calls[number].name]
    inside = any(isinstance(one, LowRankLayer) for one in module.modules())
    return inside or any(_is_cut(student, calls, sources, before) for before in sources[number])


@contextmanager
def _features(teacher: Teacher, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    found: dict[str, list[Any]] = {}
    handles = []
    try:
        handles += [_module(teacher, name).register_forward_hook(_note(found, name)) for name in names]
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _module(teacher: Teacher, name: str) -> nn.Module:
    module = by_clean_name(teacher.module).get(clean_name(name))
    if module is None:
        raise TargetError(f"The teacher has no module {name!r}; name others: feature_modules=.")
    return module


def _note(found: dict[str, list[Any]], name: str) -> Any:
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.setdefault(name, []).append(output)

    return after
