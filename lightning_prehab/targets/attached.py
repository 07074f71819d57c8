"""What somebody has attached to a layer, or to its weight, that cannot follow it to the factors."""

from collections.abc import Iterable

from torch import Tensor, nn

from lightning_prehab.kinds import MatrixView

#: Where ``torch.distributed.optim._apply_optimizer_in_backward`` notes the optimizer of a parameter.
_STEPS_INSIDE = "_in_backward_optimizers"


def why_not_attached(module: nn.Module, views: Iterable[MatrixView]) -> str | None:
    """Why a layer cannot be cut for what is attached to it, or None.

    Args:
        module: The layer.
        views: Its matrices.
    """
    forward = vars(module).get("forward")
    if forward is not None and not hasattr(forward, "watchers"):  # those are our own, while calibration watches
        return "its forward pass was replaced on the instance; undo that first"
    more = sorted(_more_than_a_layer(module))
    if more:
        return f"it holds more than its weight and bias ({', '.join(more)}), which nothing would take over"
    if any(has_hooks(parameter) for view in views for parameter in view.parameters):
        return (
            "its weight has hooks of its own (Tensor.register_hook, an optimizer that steps inside backward), which "
            "cannot follow it; remove them first, and put such on the factors after the cut"
        )
    if any(parameter.is_inference() for parameter in module.parameters()):
        return "its parameters were made inside torch.inference_mode(), and cannot be trained; build the model outside"
    return None


def _more_than_a_layer(module: nn.Module) -> set[str]:
    """Parameters and children that somebody has put on a plain layer, and buffers that its hooks may use.

    Profilers leave buffers behind on every layer; those may go with it.
    """
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        return set()
    parameters = {name for name, parameter in module._parameters.items() if parameter is not None}
    buffers = module._buffers.keys() if module._forward_hooks or module._forward_pre_hooks else set()
    return (parameters - {"weight", "bias"}) | buffers | module._modules.keys()


def has_hooks(parameter: Tensor) -> bool:
    """Whether somebody has hooked a parameter itself, rather than a module that holds it.

    DistributedDataParallel does not: its hooks hang on nodes of the graph.
    """
    hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
    return any(hooks) or bool(getattr(parameter, _STEPS_INSIDE, None))
