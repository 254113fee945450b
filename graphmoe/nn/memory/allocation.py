"""Which slots are in use, and which of the others is written next."""

import torch
from torch import Tensor

from graphmoe.ops.dnc_content import USAGE_EPS


def retention(free_gates: Tensor, read_weights: Tensor) -> Tensor:
    r"""What reading leaves in use, :math:`\psi = \prod_r (1 - f_r w_r)`, ``[B, S]``.

    Args:
        free_gates: ``f [B, R]``.
        read_weights: ``w [B, R, S]`` of the step before.
    """
    return (1 - free_gates.unsqueeze(-1) * read_weights).prod(dim=1)


def usage(usage: Tensor, write_weights: Tensor, retention: Tensor) -> Tensor:
    r"""Usage after a step, :math:`(u + w - u \circ w) \circ \psi`, ``[B, S]`` in [0, 1].

    Args:
        usage: ``u [B, S]``.
        write_weights: ``w [B, S]`` of the step before.
        retention: ``psi [B, S]``.
    """
    return (usage + write_weights - usage * write_weights) * retention


def allocation_weights(usage: Tensor) -> Tensor:
    r"""Write weights of the freest slots.

    .. math::
        a_{\phi_j} = (1 - u_{\phi_j}) \prod_{i < j} u_{\phi_i}

    with :math:`\phi` the slots by ascending usage, of equal ones the first first. The product is the
    exponential of a sum of logarithms of :math:`\epsilon + (1 - \epsilon) u`, :math:`\epsilon = 10^{-6}`.

    Args:
        usage: ``[B, S]``.

    Returns:
        ``[B, S]``, of which each row sums to at most 1.
    """
    ordered, order = torch.sort(usage, dim=-1, stable=True)
    logs = torch.log(USAGE_EPS + (1 - USAGE_EPS) * ordered)
    product = torch.exp(logs.cumsum(dim=-1) - logs)
    return torch.zeros_like(usage).scatter(-1, order, (1 - ordered) * product)
