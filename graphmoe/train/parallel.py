"""A model in several processes: whole in each (DDP), in slices (FSDP2), compiled."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graphmoe.checkpoint.shards import is_shard, whole
from graphmoe.errors import ConfigError
from graphmoe.train.ranks import any_rank

if TYPE_CHECKING:
    from accelerate import Accelerator


def parallelize(
    accelerator: "Accelerator",
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trial: Callable[[nn.Module], None],
) -> nn.Module:
    """Wrap a model so that its gradients are those of all ranks; a collective in several processes.

    Sharded, ``model`` itself changes: its parameters, in the optimiser too, become slices, which are made
    whole block by block in each pass.

    Args:
        accelerator: Of the run.
        model: On the device of the run.
        optimizer: Of its parameters; has no state yet.
        trial: Runs a model forward and backward once.

    Returns:
        What to call in place of ``model``.
    """
    if accelerator.is_fsdp2:
        # Blocks return records, which hold views; nobody changes those in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        wrapped, _ = accelerator.prepare(model, optimizer)
        return wrapped
    if accelerator.num_processes > 1:
        # DDP waits for the gradient of every parameter, and some options leave one without: a router
        # whose weights nothing uses. Looking for such in every step costs time, so it is done if need be.
        trial(model)
        idle = any(p.grad is None for p in model.parameters() if p.requires_grad)
        model.zero_grad(set_to_none=True)
        accelerator.ddp_handler.find_unused_parameters = bool(any_rank(accelerator, int(idle)))
    with warnings.catch_warnings():
        # The new name of broadcast_buffers is one that accelerate does not know yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(model)


def compiled(
    accelerator: "Accelerator",
    wrapped: nn.Module,
    trial: Callable[[nn.Module], None],
    *,
    tolerance: float = 0.1,
) -> nn.Module:
    """``torch.compile`` of a wrapped model; that model and a warning if any rank cannot use what comes out.

    Both run once, forward and backward, and their gradients are compared, so that a compiler that gets one
    wrong is found before it trains.

    Args:
        accelerator: Of the run.
        wrapped: What :func:`parallelize` returned.
        trial: Runs a model forward and backward once, with equal results.
        tolerance: Largest difference of the gradients of a parameter, relative to their norm. Rounding
            moves them less, also where it sends a token to another expert.
    """
    # Dropout and noise as without a compiler: a function of seed, step and rank.
    program, reason = torch.compile(wrapped, options={"fallback_random": True}), ""
    expected = _trial_gradients(accelerator, wrapped, wrapped, trial)
    try:
        found = _trial_gradients(accelerator, wrapped, program, trial)
        reason = _difference(found, expected, tolerance)
    except Exception as error:  # compilers and the tools they call fail in many ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        wrapped.zero_grad(set_to_none=True)
    if not any_rank(accelerator, int(bool(reason))):
        return program
    why = reason or "another process cannot use it"
    warnings.warn(f"model cannot be compiled and runs as it is: {why}", stacklevel=3)
    return wrapped


def _trial_gradients(
    accelerator: "Accelerator", wrapped: nn.Module, net: nn.Module, trial: Callable[[nn.Module], None]
) -> dict[str, Tensor]:
    """Gradients of this rank, or its slices of those of all ranks, of one pass of ``net``."""
    # Without synchronisation slices would keep what belongs to no step.
    with nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(wrapped):
        trial(net)
    grads = {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad(set_to_none=True)
    return {name: grad.to_local() if is_shard(grad) else grad for name, grad in grads.items()}


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str:
    """What is wrong with gradients, or nothing."""
    whole_norm = sum(float(grad.norm()) ** 2 for grad in expected.values()) ** 0.5
    for name, grad in expected.items():
        if name not in found:
            return f"{name} gets no gradient"
        away, norm = float((found[name] - grad).norm()), float(grad.norm())
        # Of a gradient that is small among the others, the rounding of those may be a large part.
        if not away <= tolerance * norm + 1e-4 * whole_norm:
            return f"the gradient of {name} is off by {away / max(norm, 1e-30):.2g} of its norm"
    return ""


def gradient_norm(model: nn.Module) -> Tensor:
    """2-norm of all gradients together, slices of all ranks included; a collective if there are any."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return whole(nn.utils.get_total_norm(grads))


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a sharded model are whole, for reading; a collective then."""
    units = [module for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def refuse_shards(parallel: str, *, ghosts: bool, weight_orthogonality: bool) -> None:
    """Refuse what slices of parameters cannot do.

    Args:
        parallel: ``ddp`` or ``fsdp``.
        ghosts: Whether some slices of stacked parameters have a learning rate of their own.
        weight_orthogonality: Whether a loss compares the weights of experts.

    Raises:
        ConfigError: ``fsdp`` with either.
    """
    if parallel != "fsdp":
        return
    if ghosts:
        # An expert's slice may lie in another process, or in two: its update cannot be scaled there.
        what = "the learning rates of ghosts need the stacked weights of experts whole"
        raise ConfigError(what, "--parallel", "ddp with --num_ghosts", parallel)
    if weight_orthogonality:
        what = "the orthogonality of weights compares experts outside of the blocks that hold them"
        raise ConfigError(what, "--parallel", "ddp with --orthogonality_weight_coef", parallel)
