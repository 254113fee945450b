"""Scoring a language model on windows of token ids."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


@torch.no_grad()
def mean_loss(model: nn.Module, windows: np.ndarray, *, batch_size: int = 32) -> float:
    """Mean cross-entropy of the next token in nats, without auxiliary losses.

    Args:
        model: Takes ``input_ids`` and returns ``logits``; put in eval mode while it is scored.
        windows: Token ids ``[n, T + 1]``; every token but the first of a window is predicted.
        batch_size: Windows scored at once.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(windows), batch_size):
        ids = torch.from_numpy(windows[start : start + batch_size]).to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        # Summed in float64: thousands of batches of fp32 sums would lose digits.
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total += nats.double().sum().item()
    model.train(training)
    return total / windows[:, 1:].size
