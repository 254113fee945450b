import torch
from torch import Tensor

from graphmoe.errors import ConfigError
from graphmoe.nn.expert.expert_conv import ExpertConv
from graphmoe.nn.lazy import lazy_channels
from graphmoe.ops import grouped_mlp


@lazy_channels
class IterativeExpert(ExpertConv):
    r"""An expert that applies its map several times to its own intermediate result (iterative reasoning
    loop).

    For row :math:`r` with token :math:`n` and expert :math:`e`, with :math:`h^0 = x_n`,

    .. math::
        h^s = h^{s-1} + S^{-1/2}\, f_e(h^{s-1} + x_n), \qquad o_r = h^S - x_n

    where :math:`f_e` is the map of :class:`ExpertConv`. All steps share its weights, so that depth costs time
    and no parameters. What is returned is what the loop has added to the token: around the layer there is a
    residual already, which would otherwise add the token twice.

    Edges: token -> row.

    Args:
        in_channels, hidden_channels, num_experts, activation: See :class:`ExpertConv`.
        steps: Passes ``S`` through the map, at least 1.
        **kwargs: Arguments of :class:`torch_geometric.nn.MessagePassing`.

    Shapes:
        - **input:** as :class:`ExpertConv`; ``steps``: passes in this call. The factor :math:`S^{-1/2}` stays
          that of the constructor: fewer passes are the same loop, left early.
        - **output:** ``[R, D]``; 0 for an absent row.

    Raises:
        ConfigError: Fewer than one step, an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_experts: int,
        *,
        steps: int = 2,
        activation: str = "swiglu",
        **kwargs,
    ):
        _check_steps(steps)
        self.steps = steps
        super().__init__(in_channels, hidden_channels, num_experts, activation=activation, **kwargs)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        expert: Tensor,
        ptr: Tensor | None = None,
        perm: Tensor | None = None,
        *,
        steps: int | None = None,
    ) -> Tensor:
        steps = self.steps if steps is None else steps
        _check_steps(steps)
        if ptr is None or not self.fuse:
            x, expert, edges, size = self.ends(x, edge_index, expert)
            return self.propagate(
                edges, x=(x, None), expert=(None, expert.unsqueeze(-1)), steps=steps, size=size
            )
        weights, token = (self.gate_up_proj, self.down_proj, ptr), edge_index[0]
        # h + x is twice the token and what was added so far; the first pass gathers inside the kernel.
        added = grouped_mlp(2 * x, *weights, token=token, perm=perm, activation=self.activation) * self.scale
        twice = (2 * x).index_select(0, token) if steps > 1 else None
        for _ in range(steps - 1):
            added = added + self.scale * grouped_mlp(twice + added, *weights, activation=self.activation)
        return added

    @property
    def scale(self) -> float:
        """Size of a step, ``S ** -0.5``."""
        return self.steps**-0.5

    def reduce(self, x: Tensor, token: Tensor, weight: Tensor, ptr: Tensor, perm: Tensor) -> Tensor:
        row = torch.arange(token.numel(), device=x.device)
        rows = self(x, torch.stack([token, row]), token, ptr, perm) * weight.to(x.dtype).unsqueeze(1)
        return torch.zeros_like(rows).index_copy(0, perm, rows).view(x.size(0), -1, x.size(1)).sum(dim=1)

    def message(self, x_j: Tensor, expert_i: Tensor, steps: int) -> Tensor:
        added = torch.zeros_like(x_j)
        for _ in range(steps):
            added = added + self.scale * super().message(2 * x_j + added, expert_i)
        return added

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, steps={self.steps})"


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError("no step of reasoning", "reasoning_steps", "at least 1", steps)
