"""The output layer of a language model and its loss, in one pass where nothing stands between them."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from graphmoe.nn.bare import is_bare
from graphmoe.ops.cross_entropy import linear_cross_entropy

IGNORE = -100
"""Label of a token without a loss."""


def next_token_loss(
    lm_head: nn.Module, x: Tensor, labels: Tensor, loss_function: Callable[..., Tensor], **kwargs
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the token that follows each token, in nats, and the logits ``[B, T, V]``; 0 if no
    token counts.

    Else the numbers are those of ``loss_function(lm_head(x), labels, V, **kwargs)``, which is also what is
    called where the loss is not transformers' own for causal models, or the output layer not a plain
    ``nn.Linear``: quantised, adapted, sharded over devices, or with hooks.

    Args:
        lm_head: The output layer.
        x: Last hidden state ``[B, T, D]``.
        labels: Token ids ``[B, T]``, not shifted; ``ignore_index`` for tokens that do not count.
        loss_function: A loss of transformers.
        **kwargs: Its options: ``num_items_in_batch`` to divide the sum of losses by, instead of the number of
            tokens that count here, ``shift_labels`` instead of shifting ``labels``, ``ignore_index``
            (default: -100).
    """
    if loss_function is not ForCausalLMLoss or not _is_plain(lm_head):
        logits = lm_head(x)
        return loss_function(logits, labels, logits.size(-1), **kwargs), logits
    ignore = kwargs.get("ignore_index", IGNORE)
    label = kwargs.get("shift_labels")
    if label is None:
        label = F.pad(labels, (0, 1), value=ignore)[:, 1:]
    label = label.reshape(-1).to(x.device)
    loss, logits = linear_cross_entropy(x.flatten(0, 1), lm_head.weight, label, ignore_index=ignore)
    count = kwargs.get("num_items_in_batch")
    if count is None:
        # A batch of nothing but padding has nothing to teach: 0, where torch's cross entropy is NaN.
        count = (label != ignore).sum().clamp(min=1)
    return loss.sum() / count, logits.view(*x.shape[:-1], -1)


def _is_plain(lm_head: nn.Module) -> bool:
    return is_bare(lm_head) and type(lm_head.weight) is nn.Parameter and lm_head.bias is None
