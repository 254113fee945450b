from torch import Tensor, nn
from torch.nn import functional as F

from graphmoe.nn.lazy import lazy_channels


@lazy_channels
class FeedForward(nn.Module):
    r"""The one-expert case, without routing:
    :math:`W^{down}(\mathrm{SiLU}(W^{gate}x) \odot W^{up}x)` or :math:`W^{down}\,\mathrm{GELU}(W^{up}x)`.

    Args:
        in_channels: Channels ``D`` in and out; ``-1``: those of the first input.
        hidden_channels: Channels ``F`` inside.
        activation: ``swiglu`` or ``gelu``.

    Shapes:
        - **input / output:** ``[*, D]``.
    """

    def __init__(self, in_channels: int, hidden_channels: int, *, activation: str = "swiglu"):
        super().__init__()
        self.activation = activation
        width = 2 * hidden_channels if activation == "swiglu" else hidden_channels
        self.gate_up_proj = nn.Linear(in_channels, width, bias=False)
        self.down_proj = nn.Linear(hidden_channels, in_channels, bias=False)

    def reset_parameters(self) -> None:
        self.gate_up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate_up_proj(x)
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.gelu(hidden))
