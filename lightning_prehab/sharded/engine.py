"""The only file that knows FSDP2 from within: its parameter groups, and the private names by which they are reached.

torch has no public way to add parameters to what ``fully_shard`` has sharded, or to take some away. So what replaces a
weight is put into the group of that weight, and everything else of the unit (hooks, streams, flags, prefetch lists)
stays as the user has set it. FSDP2 itself makes what is put in: :func:`sharded_by` calls the public ``fully_shard`` on
a module that is thrown away.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement

from lightning_prehab.errors import UnsupportedError

#: The private names that are used, by what has them; found on torch 2.6, 2.8, 2.10 and 2.14.
NAMES: dict[str, tuple[str, ...]] = {
    "unit": ("_get_fsdp_state",),
    "state": ("_mp_policy",),
    "group": (
        "fsdp_params",
        "mesh_info",
        "mp_policy",
        "offload_policy",
        "lazy_init",
        "_reset_sharded_params",
        "_partial_reduce_output",
        "_module_to_pre_save_state_dict_hook_handle",
        "_module_to_pre_load_state_dict_hook_handle",
    ),
    "parameter": (
        "sharded_param",
        "post_forward_mesh_info",
        "reset_sharded_param",
        "unsharded_accumulated_grad",
        "_init_sharded_post_forward_param_metadata",
        "_module_info",
        "_orig_size",
        "_post_load_hook_handle",
    ),
    "place": ("module", "param_name", "shared_modules"),
    "mesh": ("mesh", "shard_mesh_size"),
}
#: FSDP2 on the CPU averages gradients from this version on, tensor parallelism clips them rightly.
OLDEST = (2, 10)
_PENDING = (
    "gradients are waiting that have not been reduced (accumulated with set_requires_gradient_sync(False)); cut after "
    "an optimizer step"
)


class Managed(NamedTuple):
    """A parameter as FSDP2 manages it.

    Attributes:
        group: What is gathered at once; ``FSDPParamGroup`` in torch.
        parameter: The parameter in it; ``FSDPParam`` in torch.
    """

    group: Any
    parameter: Any


class UnitLayout(NamedTuple):
    """What ``fully_shard`` was called with.

    Attributes:
        modules: That make one unit.
        settings: For another call; without where each parameter is divided, which the parameters say themselves.
    """

    modules: list[nn.Module]
    settings: dict[str, Any]


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of a model is a ``DTensor``, or a module a unit of FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def check_engine(model: nn.Module) -> None:
    """Raises :class:`UnsupportedError` for a sharded model that could not be cut; for before the training.

    Args:
        model: After ``fully_shard``, a plan of tensor parallelism, or both. One that is not sharded passes.
    """
    _check_fsdp1(model)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        _check_names(module, "unit")
        _check_names(module._get_fsdp_state(), "state")
        for group in groups(module):
            _check_group(group)
    index = managed_by(model)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or version() >= OLDEST:
            continue
        if parameter.device_mesh.device_type == "cpu":
            raise UnsupportedError(
                "Sharded training on the CPU needs torch 2.10 or newer (older ones sum gradients, or cannot do it), "
                f"and this is torch {torch.__version__}."
            )
        if is_tensor_parallel(parameter, index.get(id(parameter))):
            raise UnsupportedError(
                f"{name!r} is tensor parallel, which needs torch 2.10 or newer here (older ones clip gradients by a "
                f"wrong norm), and this is torch {torch.__version__}; use FSDP2 alone, or compress before the training."
            )


def reshard_(model: nn.Module) -> None:
    """Puts the sharded parameters back everywhere: after a forward pass some units may hold whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def groups(unit: nn.Module) -> list[Any]:
    """The parameter groups of a unit: one, none, or several where parameters lie on several meshes."""
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    found = getattr(state, "_fsdp_param_groups", None)  # torch 2.14; before, one or None
    if found is not None:
        return list(found)
    return [group for group in [getattr(state, "_fsdp_param_group", None)] if group is not None]


def managed_by(model: nn.Module) -> dict[int, Managed]:
    """What FSDP2 manages, by the id of the sharded parameter."""
    found: dict[int, Managed] = {}
    for module in model.modules():
        for group in groups(module) if isinstance(module, FSDPModule) else ():
            found |= {id(one.sharded_param): Managed(group, one) for one in group.fsdp_params}
    return found


def unit_layouts(model: nn.Module) -> list[UnitLayout]:
    """The units of a model, those inside of others before them: in this order a copy of it can be sharded.

    A copy is gathered anew for its backward pass, whatever the unit does.

    Raises:
        UnsupportedError: If the parameters of a unit lie on several meshes.
    """
    states: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            states.setdefault(id(module._get_fsdp_state()), []).append(module)
    found = [(modules, groups(modules[0])) for modules in states.values()]
    if any(len(own) > 1 for _, own in found):
        raise UnsupportedError(
            "The parameters of one unit of FSDP2 lie on several meshes, and such a unit is not copied."
        )
    meshes = [group.mesh_info.mesh for _, own in found for group in own]
    layouts = []
    for modules, own in reversed(found):  # a module comes after those that it is in
        state: Any = modules[0]._get_fsdp_state()
        settings = {"mesh": meshes[0], "reshard_after_forward": True, "mp_policy": state._mp_policy}
        for group in own:
            settings |= {"mesh": group.mesh_info.mesh, "offload_policy": group.offload_policy}
        layouts.append(UnitLayout(modules, settings))
    return layouts


def is_tensor_parallel(parameter: Tensor, managed: Managed | None) -> bool:
    """Whether a parameter would be a ``DTensor`` without FSDP2, too."""
    return parallel_plan(parameter, managed) is not None


def parallel_plan(parameter: Tensor, managed: Managed | None) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """Mesh and placements that a parameter would have without FSDP2; None if it would be an ordinary tensor."""
    if managed is None:
        return (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
    spec = getattr(managed.parameter, "_unsharded_dtensor_spec", None)  # torch 2.14; before, _tp_spec
    spec = getattr(managed.parameter, "_tp_spec", None) if spec is None else spec
    return None if spec is None else (spec.mesh, tuple(spec.placements))


def why_not_now(managed: Managed) -> str | None:
    """Why a parameter cannot be replaced at this moment, or None if it can."""
    whole = getattr(managed.parameter, "_unsharded_param", None)  # there after the first forward pass
    pending = [None if whole is None else whole.grad, managed.parameter.unsharded_accumulated_grad]
    if any(one is not None for one in (*pending, managed.group._partial_reduce_output)):
        return _PENDING
    if managed.parameter._module_info.shared_modules:
        return "its weight is tied to another layer"
    return None


def sharded_by(managed: Managed, holder: nn.Module) -> list[Any]:
    """Lets FSDP2 shard the parameters of a module as it has sharded another one; nothing is sent.

    Args:
        managed: The other one.
        holder: Thrown away afterwards; the modules in it, whose parameters are ``DTensor`` then, are not. They have no
            parameters but those that are to be sharded.

    Returns:
        What the group of the other one has to manage.
    """
    mesh, policy = managed.group.mesh_info.mesh, managed.group.mp_policy
    fully_shard(
        holder, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=managed.group.offload_policy
    )
    (made,) = groups(holder)
    after_forward = managed.parameter.post_forward_mesh_info
    for one in made.fsdp_params if after_forward is not None else ():
        one.post_forward_mesh_info = after_forward
        one._init_sharded_post_forward_param_metadata(torch.empty(one._orig_size, device="meta"))
    return list(made.fsdp_params)


def replace_in_group_(old: Managed, made: Sequence[Any]) -> None:
    """Puts parameters in the place of one; assignments alone."""
    params = old.group.fsdp_params
    place = next(index for index, one in enumerate(params) if one is old.parameter)
    params[place : place + 1] = made
    old.parameter._post_load_hook_handle.remove()  # a module that stays would hold the old weight by it


def move_(parameter: Any, module: nn.Module, name: str) -> None:
    """Tells FSDP2 in which module a parameter hangs now; assignments alone."""
    parameter._module_info.module, parameter._module_info.param_name = module, name
    parameter._post_load_hook_handle.remove()
    parameter._post_load_hook_handle = module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
        lambda *_: parameter.reset_sharded_param()
    )


def place_of(parameter: Any) -> tuple[nn.Module, str]:
    """The module in which FSDP2 sets a parameter, and its name there."""
    return parameter._module_info.module, parameter._module_info.param_name


def settle_(group: Any) -> None:
    """Makes a group of new content what its first forward pass has made of the old: types, hooks of state dicts."""
    for handles in (
        group._module_to_pre_save_state_dict_hook_handle,  # both keep the old layers alive
        group._module_to_pre_load_state_dict_hook_handle,
    ):
        for handle in handles.values():
            handle.remove()
        handles.clear()
    if group._reset_sharded_params:
        group.lazy_init()  # it may be called any number of times


def become_unit_(unit: nn.Module, kind: type[nn.Module]) -> None:
    """Gives a unit another class below that of FSDP2, as ``fully_shard`` would have done."""
    body = {"__deepcopy__": vars(type(unit)).get("__deepcopy__")}
    unit.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), body)


def _check_group(group: Any) -> None:
    _check_names(group, "group")
    _check_names(group.mesh_info, "mesh")
    for one in group.fsdp_params:
        _check_names(one, "parameter")
        _check_names(one._module_info, "place")
    if getattr(group.mesh_info, "dp_mesh_dims", None) is not None:
        raise UnsupportedError(
            "fully_shard was given a mesh of several kinds of parallelism (dp_mesh_dims), and such parameters have not "
            "been cut yet; give it the data-parallel mesh alone, or compress before the training."
        )


def _check_names(thing: Any, what: str) -> None:
    missing = [name for name in NAMES[what] if not hasattr(thing, name)]
    if not missing:
        return
    if missing == ["shard_mesh_size"]:
        raise UnsupportedError(
            "The model is replicated by torch's replicate(), which shards nothing; use strategy='ddp' or fully_shard."
        )
    raise UnsupportedError(
        f"FSDP2 of torch {torch.__version__} is built otherwise than this version of lightning-prehab knows (a {what} "
        f"has no {', '.join(missing)}), so layers cannot be replaced in it. Compress before the model is sharded, or "
        "use torch 2.10 to 2.14."
    )


def _check_fsdp1(model: nn.Module) -> None:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if kind is not None and any(isinstance(module, kind) for module in model.modules()):
        raise UnsupportedError(
            "FullyShardedDataParallel (FSDP1) keeps one flat parameter for many layers, which cannot be cut; use "
            "fully_shard (ModelParallelStrategy in Lightning), or compress before the training."
        )


def version() -> tuple[int, ...]:
    """Of torch: its first two numbers."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])
