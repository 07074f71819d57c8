"""Which weights of a sharded model can be cut, and why the others are left alone."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lightning_prehab.kinds import MatrixView, view_of
from lightning_prehab.kinds.base import plain_type
from lightning_prehab.kinds.linear import LinearView
from lightning_prehab.layers.linear import LowRankLinear
from lightning_prehab.sharded.engine import Managed, managed_by, parallel_plan, why_not_now
from lightning_prehab.targets.find import Targets


def leave_unserved(model: nn.Module, targets: Targets) -> Targets:
    """The targets of a sharded model that can be cut; the others are among the skipped ones, with the reason.

    Args:
        model: With all parameters in shards.
        targets: Found in it.
    """
    index = managed_by(model)
    reasons = {name: why_not_served([view_of(target)], index) for name, target in targets.items()}
    served = {name: target for name, target in targets.items() if reasons[name] is None}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return Targets(served, targets.skipped | skipped, targets.model_parameters)


def tensor_parallel(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the targets whose weights a plan of tensor parallelism divides.

    Args:
        model: With all parameters in shards.
        targets: Found in it.
    """
    index = managed_by(model)
    parameters = {name: view_of(target).parameter for name, target in targets.items()}
    return [name for name, one in parameters.items() if parallel_plan(one, index.get(id(one))) is not None]


def why_not_served(views: Iterable[MatrixView], index: Mapping[int, Managed], two_factors: bool = True) -> str | None:
    """Why a layer of a sharded model cannot be cut, or None if it can.

    Args:
        views: Its matrices.
        index: What FSDP2 manages.
        two_factors: Whether each becomes two factors and nothing else.
    """
    for view in views:
        for parameter in view.parameters:
            managed = index.get(id(parameter))
            reason = None if managed is None else why_not_now(managed)
            plan = parallel_plan(parameter, managed)
            if reason is None and plan is not None:
                reason = _why_not_parallel(view, plan, two_factors)
            if reason is not None:
                return reason
    return None


def _why_not_parallel(
    view: MatrixView, plan: tuple[DeviceMesh, tuple[Placement, ...]], two_factors: bool
) -> str | None:
    """The same where a plan of tensor parallelism divides the weight, or a factor of a layer that it divides."""
    mesh, placements = plan
    if type(view) is not LinearView and plain_type(view.module) is not LowRankLinear:
        return "it is tensor parallel, and only whole nn.Linear layers are cut there; take it out of the plan to cut it"
    known = all(type(one) is Replicate or one in (Shard(0), Shard(1)) for one in placements)
    if mesh.ndim != 1 or not known:
        return f"its plan of tensor parallelism divides it as {placements}, which is neither by rows nor by columns"
    if not two_factors:
        return "it is tensor parallel, and becomes two factors there: use layout='factors', and no sparse part"
    bias = view.bias
    if bias is not None and not isinstance(bias, DTensor):
        return "its weight is tensor parallel and its bias is not"
    return None
