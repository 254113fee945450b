import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from graphmoe.models import head
from graphmoe.models.head import next_token_loss


def case() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    lm_head = nn.Linear(6, 11, bias=False)
    x = torch.randn(2, 5, 6, requires_grad=True)
    labels = torch.randint(11, (2, 5))
    labels[0, 3] = -100
    return lm_head, x, labels


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 4},
        {"shift_labels": torch.tensor([[1, 2, 3, -100, 5], [6, -100, 8, 9, 10]])},
        {"num_logits_to_keep": 3},  # an option of somebody else
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_equals_transformers_loss(options, double):
    lm_head, x, labels = case()
    labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
    leaves = (x, lm_head.weight)
    loss, logits = next_token_loss(lm_head, x, labels, ForCausalLMLoss, **options)
    # transformers' loss goes through fp32.
    expected = ForCausalLMLoss(lm_head(x), labels, 11, **options).double()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, lm_head(x), rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(value, leaves) for value in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_label_counts():
    lm_head, x, labels = case()
    loss, _ = next_token_loss(lm_head, x, torch.full_like(labels, -100), ForCausalLMLoss)
    assert loss == 0
    assert not torch.autograd.grad(loss, lm_head.weight)[0].any()


def hooked(lm_head: nn.Linear) -> nn.Module:
    lm_head.register_forward_hook(lambda module, inputs, out: 2 * out)
    return lm_head


def biased(lm_head: nn.Linear) -> nn.Module:
    return nn.Linear(6, 11)


def parametrised(lm_head: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(lm_head)


def adapted(lm_head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), lm_head)


@pytest.mark.parametrize("change", [hooked, biased, parametrised, adapted])
def test_layers_with_something_of_their_own_are_called(change, monkeypatch):
    monkeypatch.setattr(head, "linear_cross_entropy", None)
    lm_head, x, labels = case()
    lm_head = change(lm_head)
    loss, logits = next_token_loss(lm_head, x, labels, ForCausalLMLoss)
    torch.testing.assert_close(logits, lm_head(x))
    torch.testing.assert_close(loss, ForCausalLMLoss(logits, labels, 11))


def test_other_losses_are_called(monkeypatch):
    monkeypatch.setattr(head, "linear_cross_entropy", None)
    lm_head, x, labels = case()
    loss, logits = next_token_loss(lm_head, x, labels, ForMaskedLMLoss)
    torch.testing.assert_close(loss, ForMaskedLMLoss(logits, labels, 11))
