"""What a low-rank layer shows in the place of a dense weight: it is read like one, and nobody writes into the void."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_prehab.errors import UnsupportedError


class _TensorLike(type(Tensor)):  # type: ignore[misc]
    """Any tensor may stand where one of these does, so ``torch.testing`` and its like compare them with parameters."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class ComputedTensor(Tensor, metaclass=_TensorLike):
    """A weight that is computed from others: reading it is as with any tensor, writing to it raises.

    A write would only change a copy that is thrown away. Results are ordinary tensors in the graph; what shares the
    memory (``data``, ``detach()``, a transpose, a row) raises in the same way. What an operation writes to is read in
    its schema, behind autograd: Python has no list of all ways to write. To code that asks for overrides
    (``nn.TransformerEncoder``) it is a plain tensor.

    Raises:
        UnsupportedError: If it is written to.
    """

    owner: str
    _is_hf_initialized = True  # transformers asks before it initializes weights: those of the factors, not this one
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls an operation on ordinary tensors, unless it writes to one of these."""
        schema = getattr(func, "_schema", None)  # operators of a higher order have none, and do not write
        arguments, returns = ([], []) if schema is None else (schema.arguments, schema.returns)
        given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **(kwargs or {})}
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in _computed(given.get(argument.name)):
                    raise UnsupportedError(refusal(written.owner, func.overloadpacket.__name__))
        with torch._C._DisableTorchDispatch():
            result = func(*args, **(kwargs or {}))
        if schema is None or schema.is_mutable or all(output.alias_info is None for output in returns):
            return result
        own = [one for value in given.values() for one in _computed(value)]
        return _in_memory_of(own[0], result)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to set what a tensor has, such as ``data``."""
        if hasattr(Tensor, name):
            raise UnsupportedError(refusal(self.owner, f"{name} = ..."))
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> NoReturn:
        """Refuses: it follows from the parameters."""
        raise UnsupportedError(refusal(self.owner, "requires_grad_"))

    def register_hook(self, hook: Any) -> NoReturn:
        """Refuses: the tensor is gone after the line."""
        raise UnsupportedError(refusal(self.owner, "register_hook"))

    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor, in the graph."""
        with torch._C._DisableTorchDispatch():
            return self.as_subclass(Tensor)

    def numpy(self, *, force: bool = False) -> Any:
        """That of an ordinary tensor; so are the methods below."""
        return self.plain().numpy(force=force)

    def tolist(self) -> Any:
        """See :meth:`numpy`."""
        return self.plain().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain().__deepcopy__(memo)  # type: ignore[no-untyped-call, no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def show(value: Tensor, owner: str) -> Tensor:
    """What a layer shows of a weight that it computes: a :class:`ComputedTensor`.

    It stays a plain tensor inside of compilers, tracers and transformations (``torch.func.vmap``), and if it is of a
    class of its own.

    Args:
        value: The tensor.
        owner: What it is, as in "The weight of a LowRankLinear".
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return value
    if type(value) is not Tensor or _transformed(value):
        return value
    computed = value.contiguous().as_subclass(ComputedTensor)  # a parameter is contiguous: reshape(-1) is no copy
    computed.owner = owner
    return computed


def refusal(owner: str, what: str) -> str:
    """What is said to whoever writes."""
    return (
        f"{owner} is made of other parameters and cannot be written to ({what}). Write to those instead "
        "(named_parameters() of the layer lists them: A.weight, B.weight, ...), or bring the dense layer back first "
        "with lightning_prehab.to_dense_(model): that takes every change, such as an adapter that is merged. clone() "
        "gives an ordinary tensor."
    )


def _computed(value: Any) -> list[ComputedTensor]:
    """Those in a value, or in a list of them."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [one for one in values if type(one) is ComputedTensor]


def _in_memory_of(own: ComputedTensor, result: Any) -> Any:
    """A result that lies in the memory of a weight, or several."""
    if isinstance(result, list | tuple):
        return type(result)(_in_memory_of(own, one) for one in result)
    if type(result) is not Tensor:
        return result
    shown = Tensor._make_subclass(ComputedTensor, result)
    shown.owner = own.owner
    return shown


def _transformed(tensor: Tensor) -> bool:
    """Whether it stands for others inside of a transformation, and has no memory of its own."""
    try:
        tensor.untyped_storage()
    except NotImplementedError:
        return True
    return False
