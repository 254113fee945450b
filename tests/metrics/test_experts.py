import pytest
import torch

from graphmoe import metrics
from graphmoe.errors import ConfigError


def orthogonal(experts, channels=64):
    return torch.eye(channels)[:experts]


def by_hand(rows):
    """The two factors of specialisation in two loops."""
    mean = sum(rows) / len(rows)
    centred = [row - mean for row in rows]
    cosines = []
    for i, a in enumerate(centred):
        for j, b in enumerate(centred):
            if i != j:
                cosines.append(abs(float(a @ b / (a.norm() * b.norm()))))
    share = len(rows) * float(mean @ mean) / sum(float(row @ row) for row in rows)
    return (1 - sum(cosines) / len(cosines)) * (1 - share)


@pytest.mark.parametrize("experts, channels", [(3, 5), (4, 4), (7, 64)])
def test_specialisation_by_hand(double, experts, channels):
    rows = torch.randn(experts, channels) + 0.5
    assert metrics.specialisation(rows).item() == pytest.approx(by_hand(list(rows)), rel=1e-12)


def test_specialisation_of_orthogonal_experts_by_hand(double):
    for experts in (3, 4, 8):
        want = (1 - 1 / (experts - 1)) * (1 - 1 / experts)
        assert metrics.specialisation(orthogonal(experts)).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("experts", [2, 3, 7])
def test_identical_experts_are_not_specialised(experts):
    rows = torch.randn(1, 256).expand(experts, 256)
    assert metrics.specialisation(rows).item() == pytest.approx(0, abs=1e-9)
    assert metrics.specialisation(torch.zeros(experts, 256)).item() == 0


def test_identical_experts_with_a_little_noise_are_hardly_specialised():
    rows = torch.randn(1, 256) + 0.01 * torch.randn(6, 256)
    # Their centred parts are as random as can be: only the common share tells.
    centred = rows - rows.mean(dim=0)
    assert metrics.specialisation(centred).item() > 0.5
    assert metrics.specialisation(rows).item() < 1e-3


def test_two_experts_are_told_apart_by_what_they_share(double):
    assert metrics.specialisation(orthogonal(2)).item() == pytest.approx(0.5)
    opposed = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert metrics.specialisation(opposed).item() == pytest.approx(1)
    assert metrics.specialisation(torch.tensor([[3.0, 4.0], [3.0, 4.0]])).item() == 0


def test_specialisation_counts_live_experts_only(double):
    rows = torch.randn(5, 16)
    live = torch.tensor([True, False, True, True, False])
    want = metrics.specialisation(rows[live])
    rows[~live] = float("nan")
    torch.testing.assert_close(metrics.specialisation(rows, live), want)
    for few in ([True, False, False, False, False], [False] * 5):
        assert metrics.specialisation(rows, torch.tensor(few)).item() == 0


def test_specialisation_does_not_depend_on_scale_rotation_or_order(double):
    rows = torch.randn(6, 12)
    want = metrics.specialisation(rows)
    turn = torch.linalg.qr(torch.randn(12, 12)).Q
    for same in (rows * 1e-4, rows * 1e4, rows @ turn, rows.flip(0)):
        torch.testing.assert_close(metrics.specialisation(same), want, rtol=1e-9, atol=0)


def test_random_vectors_look_specialised_to_the_raw_cosine_but_not_to_this_measure():
    raw, ours = {}, {}
    for channels in (32, 256):
        unit = torch.nn.functional.normalize(torch.randn(8, channels), dim=1)
        cosine = (unit @ unit.t()).abs()
        raw[channels] = 1 - (cosine.sum() - 8).item() / 56
        ours[channels] = metrics.random_specialisation(8, channels)
    assert raw[32] < 0.9 < 0.93 < raw[256]  # more channels, more "specialised"
    assert ours[32] == pytest.approx(0.75, abs=0.05) and ours[256] == pytest.approx(0.75, abs=0.01)


def test_random_specialisation_repeats_itself_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first = metrics.random_specialisation(5, 32)
    metrics.random_specialisation.cache_clear()
    assert metrics.random_specialisation(5, 32) == first
    assert metrics.random_specialisation(5, 32, seed=1) != first
    assert torch.equal(torch.get_rng_state(), before)
    assert metrics.random_specialisation(1, 32) == 0


def cka_by_hand(a, b):
    """The same number from Gram matrices over tokens, as the paper's other form has it."""
    centre = torch.eye(len(a)) - 1 / len(a)
    a, b = centre @ a @ a.t() @ centre, centre @ b @ b.t() @ centre
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


@pytest.mark.parametrize("shape", [(3, 20, 6), (2, 4, 9), (1, 5, 3)])
def test_linear_cka_by_hand(double, shape):
    outputs = torch.randn(shape) + 1
    similarity = metrics.linear_cka(outputs)
    for i in range(shape[0]):
        for j in range(shape[0]):
            torch.testing.assert_close(similarity[i, j], cka_by_hand(outputs[i], outputs[j]))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(shape[0]))
    assert torch.equal(similarity, similarity.t())


def test_linear_cka_sees_through_rotation_scale_and_offset(double):
    first = torch.randn(50, 8)
    second = 3 * first @ torch.linalg.qr(torch.randn(8, 8)).Q + 7
    assert metrics.linear_cka(torch.stack([first, second]))[0, 1].item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_cka_of_constant_outputs_is_zero(dtype):
    outputs = torch.randn(3, 30, 8, dtype=dtype)
    outputs[1] = outputs[1, :1]
    outputs[2] = 0
    similarity = metrics.linear_cka(outputs)
    assert similarity[0, 0].item() == pytest.approx(1)
    similarity[0, 0] = 0
    assert (similarity == 0).all()


def test_random_cka_grows_with_channels():
    # ||X'Y||^2 is about N D^2 and ||X'X|| about N sqrt(D (1 + D / N)): D / (N + D).
    assert metrics.random_cka(2048, 128) == pytest.approx(128 / 2176, rel=0.05)
    assert metrics.random_cka(30, 256) > 0.8
    assert metrics.random_cka(64, 16, seed=1) != metrics.random_cka(64, 16)


def test_wrong_input():
    with pytest.raises(ConfigError, match="channels"):
        metrics.random_specialisation(3, 0)
    with pytest.raises(ConfigError, match="num_tokens"):
        metrics.random_cka(0, 3)
