"""AdamW with the usual decay groups, and updates scaled for slices of stacked parameters."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: weights of two or more dimensions outside embeddings and
    expert adjacencies."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
        (decay if is_matrix and not name.endswith("adjacency") else keep).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def scale_updates(optimizer: Optimizer, scales: Mapping[nn.Parameter, Callable[[], Tensor]]) -> None:
    """Scale what each optimiser step does to slices of stacked parameters.

    After a step a slice becomes ``old + scale * (new - old)``: 0 freezes it whatever weight decay
    and momentum say, 1 leaves the step as it is. Parameter groups cannot split a stacked tensor,
    Adam ignores scaled gradients, and weight decay moves slices whose gradient is 0.

    Args:
        optimizer: Any optimiser; hooks are registered on it.
        scales: For each parameter ``[E, ...]`` a function that returns the scale of each of its
            slices, ``[E]``. It is called once before each step.
    """
    saved: dict[nn.Parameter, tuple[Tensor, Tensor, Tensor]] = {}

    def before(*_) -> None:
        for parameter, scale_fn in scales.items():
            scale = scale_fn().to(parameter.device)
            slices = (scale != 1).nonzero().flatten()
            if slices.numel():
                kept = parameter.detach().index_select(0, slices)
                saved[parameter] = (slices, scale.index_select(0, slices), kept)

    def after(*_) -> None:
        with torch.no_grad():
            for parameter, (slices, scale, old) in saved.items():
                new = parameter.index_select(0, slices)
                shape = (-1, *[1] * (parameter.dim() - 1))
                # where, not lerp alone: old + 0 * (new - old) would carry a NaN through.
                moved = torch.where(
                    (scale == 0).view(shape), old, old.lerp(new, scale.to(old.dtype).view(shape))
                )
                parameter.index_copy_(0, slices, moved)
        saved.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


@torch.no_grad()
def clear_moments(optimizer: Optimizer, parameter: nn.Parameter, slices: Tensor) -> None:
    """Zero the optimiser's moments of some slices ``[n]`` of a stacked parameter."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.index_fill_(0, slices, 0)
