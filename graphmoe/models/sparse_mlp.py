"""A classifier whose weights are edges: neurons that feed neurons."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from graphmoe.errors import ConfigError
from graphmoe.models.sparse_mlp_configuration import SparseMLPConfig
from graphmoe.nn.bare import is_bare
from graphmoe.nn.sparse import ByteDropout, SparseLinear, feeds
from graphmoe.ops.sparse_layers import Map, sparse_layers


class SparseMLP(PreTrainedModel):
    r"""A multi-layer perceptron of :class:`~graphmoe.nn.SparseLinear` layers
    (`SET <https://arxiv.org/abs/1707.04780>`_).

    .. math::
        h_0 = x, \qquad h_{l+1} = \mathrm{dropout}(\phi(W_l h_l + b_l)), \qquad z = W_L h_L + b_L

    Samples are the columns of :math:`h` all the way, so that no layer transposes. A layer whose density is 1
    is a plain ``nn.Linear``; with a density of 1 the whole network is the dense one.

    Args:
        config: A :class:`SparseMLPConfig`.

    Shapes:
        - **input:** ``pixel_values [B, ...]`` of ``input_size`` values each, ``labels [B]``.
        - **output:** an ``ImageClassifierOutput``: ``loss`` (mean cross-entropy, nats) if there are labels,
          ``logits [B, num_labels]``, and with ``output_hidden_states`` the layers ``[B, neurons]``.

    Raises:
        ConfigError: Inputs of another size.
    """

    config: SparseMLPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SparseMLPConfig):
        super().__init__(config)
        layers = zip(config.shapes(), config.densities(), strict=True)
        self.layers = nn.ModuleList(
            nn.Linear(*shape) if density == 1 else SparseLinear(*shape, density) for shape, density in layers
        )
        self.dropout = ByteDropout(config.dropout)
        self.act = getattr(F, config.hidden_act)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        x = pixel_values.flatten(1)
        if x.size(1) != self.config.input_size:
            expected = f"{self.config.input_size} values each"
            raise ConfigError("inputs of another size", "pixel_values", expected, tuple(pixel_values.shape))
        x, hidden = x.t().contiguous(), []  # [neurons, B]
        if self._as_one(x) and not output_hidden_states:
            logits = sparse_layers(x, [_map_of(layer) for layer in self.layers], self._draw_masks(x)).t()
        else:
            for layer in self.layers[:-1]:
                x = self.dropout(self.act(_feature_major(layer, x)))
                hidden.append(x)
            logits = _feature_major(self.layers[-1], x).t()
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = None if labels is None else F.cross_entropy(precise, labels)
        states = tuple(h.t() for h in hidden) if output_hidden_states else None
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)

    def _as_one(self, x: Tensor) -> bool:
        """Whether all layers may be one operation: nobody listens to one of them, or gives it other messages,
        and no precision is chosen for each."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        plain = self.config.hidden_act == "relu" and is_bare(self.dropout, ByteDropout)
        return plain and all(
            is_bare(layer) or (is_bare(layer, SparseLinear) and layer.conv.fuse) for layer in self.layers
        )

    def _draw_masks(self, x: Tensor) -> list[Tensor]:
        """Masks of dropout for each hidden layer, none if all are 1."""
        if not self.dropout.is_active:
            return []
        return [self.dropout.draw_mask((size, x.size(1)), x) for size in self.config.hidden_sizes]

    def sparse_layers(self) -> list[SparseLinear]:
        """The layers that are not dense."""
        return [layer for layer in self.layers if isinstance(layer, SparseLinear)]

    def num_edges(self) -> int:
        """Weights in all, those of dense layers included."""
        return sum(layer.weight.numel() for layer in self.layers)

    def to_hetero(self) -> HeteroData:
        """The sparse layers as a typed graph, see :func:`~graphmoe.nn.sparse.network.feeds`.

        Raises:
            GraphError: All layers are dense.
        """
        return feeds(self.sparse_layers())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, SparseLinear | nn.Linear):
            std = module.weight_std if isinstance(module, SparseLinear) else (2 / module.in_features) ** 0.5
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)


def _map_of(layer: nn.Module) -> Map:
    graph = layer.topology() if isinstance(layer, SparseLinear) else None
    return Map(graph, layer.weight, layer.bias)


def _feature_major(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of either kind on ``x [in, B]``."""
    if isinstance(layer, SparseLinear):
        return layer(x, feature_major=True)
    if not is_bare(layer):
        return layer(x.t()).t()
    return torch.addmm(layer.bias.unsqueeze(1), layer.weight, x)
