import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch

from graphmoe import metrics
from graphmoe.errors import ConfigError, GraphError
from graphmoe.nn.route import sort_routes
from graphmoe.typing import NEVER


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


def routing(logits, k=2):
    expert = logits.topk(k, dim=1).indices
    return sort_routes(expert, torch.ones_like(expert, dtype=logits.dtype) / k, logits)


def test_routing_entropy_by_hand(double):
    logits = torch.randn(5, 4)
    p = logits.softmax(dim=-1)
    want = -(p * p.log2()).sum(dim=-1)
    torch.testing.assert_close(metrics.routing_entropy(routing(logits)), want.mean())
    mask = torch.tensor([[True, False, True, False, False]])
    torch.testing.assert_close(metrics.routing_entropy(routing(logits), mask), want[[0, 2]].mean())
    assert metrics.routing_entropy(routing(logits), torch.zeros(5, dtype=torch.bool)).item() == 0


def test_routing_entropy_of_undecided_and_decided_routers():
    undecided = torch.tensor([[0.0, 0.0, 0.0, 0.0, NEVER]]).expand(3, 5)
    assert metrics.routing_entropy(routing(undecided)).item() == pytest.approx(2)
    decided = torch.tensor([[500.0, 0.0, NEVER]]).requires_grad_()
    entropy = metrics.routing_entropy(routing(decided, k=1))
    assert entropy.item() == 0
    entropy.backward()
    assert torch.isfinite(decided.grad).all()


def test_routing_entropy_has_the_right_gradient(double):
    logits = torch.randn(3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: metrics.routing_entropy(routing(z)), logits)


def test_load_entropy_and_violation_by_hand(double):
    load = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert metrics.load_entropy(load).item() == pytest.approx(1.5 / 2)
    assert metrics.max_violation(load).item() == pytest.approx(1)
    live = torch.tensor([True, True, True, False])
    assert metrics.load_entropy(load, live).item() == pytest.approx(1.5 / math.log2(3))
    assert metrics.max_violation(load, live).item() == pytest.approx(0.5)
    counts = torch.tensor([20, 10, 10, 0])
    assert metrics.load_entropy(counts).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    "load, entropy, violation",
    [([1, 1, 1], 1, 0), ([1, 0, 0], 0, 2), ([0, 0, 0], 0, 0), ([5], 1, 0), ([0], 0, 0)],
)
def test_extreme_loads(load, entropy, violation):
    load = torch.tensor(load, dtype=torch.float32)
    assert metrics.load_entropy(load).item() == pytest.approx(entropy, abs=1e-6)
    assert metrics.max_violation(load).item() == pytest.approx(violation, abs=1e-6)


def information_by_hand(expert, token_class):
    total, bits = len(expert), 0.0
    for e in set(expert):
        for c in set(token_class):
            joint = sum(x == e and y == c for x, y in zip(expert, token_class, strict=True)) / total
            if joint:
                bits += joint * math.log2(joint / (expert.count(e) / total * token_class.count(c) / total))
    return bits


def test_mutual_information_by_hand():
    expert = torch.randint(4, (200,))
    token_class = (expert * torch.randint(2, (200,))).clamp(max=2)
    want = information_by_hand(expert.tolist(), token_class.tolist())
    assert want > 0.1
    assert metrics.mutual_information(expert, token_class, 4, 3).item() == pytest.approx(want, rel=1e-9)
    # Absent edges (expert 4 of 4) do not count.
    more = torch.cat([expert, torch.full((50,), 4)]), torch.cat([token_class, torch.zeros(50).long()])
    assert metrics.mutual_information(*more, 4, 3).item() == pytest.approx(want, rel=1e-9)


def test_mutual_information_of_fixed_and_constant_routing():
    token_class = torch.arange(8).repeat(50)
    assert metrics.mutual_information(token_class % 4, token_class, 4, 8).item() == pytest.approx(2)
    assert metrics.mutual_information(torch.zeros(400).long(), token_class, 4, 8).item() == 0
    empty = torch.zeros(0, dtype=torch.long)
    assert metrics.mutual_information(empty, empty, 4, 8).item() == 0
    assert metrics.shuffled_mutual_information(empty, empty, 4, 8).item() == 0


def test_shuffling_gives_the_bias_of_routing_that_ignores_the_class():
    expert, token_class = torch.randint(4, (300,)), torch.randint(40, (300,))
    plain = metrics.mutual_information(expert, token_class, 4, 40).item()
    shuffled = metrics.shuffled_mutual_information(expert, token_class, 4, 40).item()
    assert plain > 0.15  # a plug-in estimate finds information where there is none ...
    assert shuffled == pytest.approx(plain, rel=0.2)  # ... and shuffling says how much
    fixed = token_class % 4
    assert metrics.mutual_information(fixed, token_class, 4, 40).item() > 4 * shuffled


def test_shuffling_repeats_itself_and_leaves_absent_edges_out():
    expert, token_class = torch.randint(4, (100,)), torch.randint(9, (100,))
    before = torch.get_rng_state()
    first = metrics.shuffled_mutual_information(expert, token_class, 4, 9)
    assert metrics.shuffled_mutual_information(expert, token_class, 4, 9) == first
    assert metrics.shuffled_mutual_information(expert, token_class, 4, 9, seed=3) != first
    more = torch.cat([expert, torch.full((30,), 4)]), torch.cat([token_class, torch.zeros(30).long()])
    assert metrics.shuffled_mutual_information(*more, 4, 9) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_coactivation_counts_the_tokens_of_each_pair():
    # Four tokens of two experts each; the last one is masked, the third has lost one.
    expert = torch.tensor([[0, 1], [1, 2], [4, 1], [4, 4]])
    routing = sort_routes(expert, torch.ones(4, 2), torch.randn(4, 4))
    serves = [{0, 1}, {1, 2}, {1}]
    want = [[sum({a, b} <= token for token in serves) / 3 for b in range(4)] for a in range(4)]
    torch.testing.assert_close(metrics.coactivation(routing), torch.tensor(want, dtype=torch.float64))
    assert metrics.serving(routing).tolist() == [[e in token for e in range(4)] for token in [*serves, set()]]


def pairs_of_sets(weight, k):
    """Loads and pairs if a set of k has a probability in proportion to the product of its weights."""
    count = len(weight)
    pairs, total = torch.zeros(count, count), 0.0
    for chosen in combinations(range(count), k):
        product = math.prod(weight[e].item() for e in chosen)
        total += product
        for a in chosen:
            for b in chosen:
                pairs[a, b] += product
    return pairs / total


@pytest.mark.parametrize("experts, k", [(4, 1), (4, 2), (5, 3), (6, 2), (6, 5), (7, 4)])
def test_random_coactivation_equals_a_sum_over_all_sets(double, experts, k):
    want = pairs_of_sets((1.5 * torch.randn(experts)).exp(), k)
    got = metrics.random_coactivation(want.diagonal())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    torch.testing.assert_close(got.diagonal(), want.diagonal())
    # Whoever serves a token meets k - 1 others there.
    torch.testing.assert_close(got.sum(dim=1), k * want.diagonal(), rtol=0, atol=1e-7)


def test_random_coactivation_is_that_of_coins_with_k_heads():
    heads = torch.rand(400_000, 5) < torch.tensor([0.2, 0.6, 0.3, 0.5, 0.1])
    heads = heads[heads.sum(dim=1) == 2].double()
    want = heads.t() @ heads / len(heads)
    got = metrics.random_coactivation(want.diagonal())
    torch.testing.assert_close(got, want, rtol=0, atol=0.005)
    product = want.diagonal().outer(want.diagonal())
    assert (product - want).abs().max() > 0.05  # plain products would be far off


def test_random_coactivation_of_equal_loads_and_of_those_who_serve_all_or_none(double):
    got = metrics.random_coactivation(torch.full((8,), 2 / 8))
    torch.testing.assert_close(got[0, 1], torch.tensor(2 / 56))
    assert metrics.random_coactivation(torch.ones(3)).tolist() == [[1.0] * 3] * 3
    load = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.25])
    got = metrics.random_coactivation(load)
    torch.testing.assert_close(got[0], load)
    assert not got[1].any() and got[2, 3] == got[3, 4] == 0  # one place is left, nobody to share it with
    assert metrics.random_coactivation(torch.zeros(3)).tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("tokens, experts, k", [(1, 2, 1), (10, 4, 2), (33, 8, 3), (12, 5, 5)])
def test_random_drop_rate_equals_a_sum_over_loads(tokens, experts, k, factor):
    capacity = math.ceil(Fraction(str(factor)) * tokens * k / experts)
    share = Fraction(k, experts)
    over = sum(
        (load - capacity) * math.comb(tokens, load) * share**load * (1 - share) ** (tokens - load)
        for load in range(capacity + 1, tokens + 1)
    )
    want = float(over / (tokens * share))
    assert metrics.random_drop_rate(tokens, experts, k, factor) == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert want > 0 or factor > 1 or k == experts or tokens == 1


def test_wrong_input():
    ids = torch.arange(3)
    with pytest.raises(GraphError, match="token_class: one class an edge"):
        metrics.mutual_information(ids, ids[:2], 3, 3)
    with pytest.raises(GraphError, match="token_class: id out of range"):
        metrics.shuffled_mutual_information(ids, ids, 3, 2)
    with pytest.raises(GraphError, match="expert: id out of range"):
        metrics.mutual_information(ids, ids, 1, 3)
    with pytest.raises(ConfigError, match="samples"):
        metrics.shuffled_mutual_information(ids, ids, 3, 3, samples=0)
    with pytest.raises(ConfigError, match="channels"):
        metrics.random_specialisation(3, 0)
    with pytest.raises(ConfigError, match="num_tokens"):
        metrics.random_cka(0, 3)
    with pytest.raises(ConfigError, match=r"load: no load of k experts a token; expected shares that sum"):
        metrics.random_coactivation(torch.tensor([0.5, 0.7]))
    with pytest.raises(ConfigError, match="load"):
        metrics.random_coactivation(torch.tensor([1.5, 0.5]))
    with pytest.raises(ConfigError, match="k: more than there are; expected at most 4; got 5"):
        metrics.random_drop_rate(10, 4, 5, 1.0)
    with pytest.raises(ConfigError, match="num_tokens"):
        metrics.random_drop_rate(0, 4, 2, 1.0)
