import math
from itertools import combinations

import pytest
import torch

from graphmoe import metrics
from graphmoe.errors import ConfigError
from graphmoe.nn.route import sort_routes


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


def test_random_coactivation_of_coins_without_a_fixed_number(double):
    coin = torch.tensor([0.5, 0.3, 0.1, 0.0])
    tosses = torch.rand(200_000, 4) < coin
    tosses = tosses[tosses.any(dim=1)].double()
    seen = tosses.t() @ tosses / len(tosses)
    some = 1 - (1 - coin).prod()
    exact = coin.unsqueeze(0) * coin.unsqueeze(1) / some
    found = metrics.random_coactivation(coin / some, fixed=False)
    torch.testing.assert_close(found, exact.fill_diagonal_(0) + (coin / some).diag(), rtol=0, atol=1e-9)
    torch.testing.assert_close(found, seen, rtol=0, atol=0.01)


def test_wrong_input():
    with pytest.raises(ConfigError, match=r"load: no load of k experts a token; expected shares that sum"):
        metrics.random_coactivation(torch.tensor([0.5, 0.7]))
    with pytest.raises(ConfigError, match="load"):
        metrics.random_coactivation(torch.tensor([1.5, 0.5]))
