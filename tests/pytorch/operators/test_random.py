"""Random draws: distributions, ranges and independence, at fixed seeds. The values are not torch's."""

import math

import jax
import numpy as np
import pytest
import torch

from tests.pytorch.operators.harness import assert_lowering_matches, to_numpy
from trainingcompiler.frameworks.pytorch.operators import RANDOM_LOWERINGS
from trainingcompiler.frameworks.pytorch.operators.random import node_key

COUNT = 100_000
# A Kolmogorov-Smirnov statistic that one fair draw in 10,000 exceeds; at fixed seeds the outcome never changes.
LARGEST_DISTANCE = 2.23 / math.sqrt(COUNT)


def draw(name, *args, seed=0, index=0, **kwargs):
    """The lowering's result for the key of one node, as a NumPy array or a tuple of them."""
    args = [to_numpy(x) if isinstance(x, torch.Tensor) else x for x in args]
    with jax.enable_x64(True):

        @jax.jit
        def program(seed):
            return RANDOM_LOWERINGS[f"aten.{name}"](*args, key=node_key(seed, index), **kwargs)

        return jax.tree.map(np.asarray, program(np.int64(seed)))


def distance(values, cumulative):
    """The largest difference between the empirical distribution of `values` and `cumulative`."""
    points = np.sort(np.asarray(values, np.float64))
    expected = np.vectorize(cumulative)(points)
    steps = np.arange(len(points) + 1) / len(points)
    return max(np.abs(expected - steps[:-1]).max(), np.abs(expected - steps[1:]).max())


def normal(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


zeros = torch.zeros(COUNT)
CONTINUOUS = {
    "rand.default": (([COUNT],), lambda x: x),
    "rand_like.default": ((zeros.double(),), lambda x: x),
    "randn.default": (([COUNT],), normal),
    "randn_like.default": ((zeros.double(),), normal),
    "normal.float_float": ((2.0, 0.5, [COUNT]), lambda x: normal((x - 2) / 0.5)),
    "normal.Tensor_float": ((zeros + 1, 3.0), lambda x: normal((x - 1) / 3)),
    "normal.float_Tensor": ((1.0, zeros + 3), lambda x: normal((x - 1) / 3)),
    "normal.Tensor_Tensor": ((zeros + 1, torch.tensor([3.0])), lambda x: normal((x - 1) / 3)),
    "normal_functional.default": ((zeros, -1.0, 2.0), lambda x: normal((x + 1) / 2)),
    "log_normal.default": ((zeros, 1.0, 0.5), lambda x: normal((math.log(x) - 1) / 0.5)),
    "uniform.default": ((zeros, -2.0, 3.0), lambda x: (x + 2) / 5),
    "exponential.default": ((zeros, 2.0), lambda x: 1 - math.exp(-2 * x)),
    "cauchy.default": ((zeros, 1.0, 2.0), lambda x: 0.5 + math.atan((x - 1) / 2) / math.pi),
    "random.default": ((zeros,), lambda x: min(x / 2**24, 1)),
    "random.from": ((zeros, 10, 10 + 2**20), lambda x: (x - 9.5) / 2**20),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous(name):
    args, cumulative = CONTINUOUS[name]
    values = draw(name, *args)
    assert values.dtype == (np.float64 if "like" in name else np.float32)
    assert distance(values, cumulative) < LARGEST_DISTANCE


def test_sixteen_bit_uniform_never_reaches_one():
    for dtype in (torch.bfloat16, torch.float16):
        values = draw("rand.default", [COUNT], dtype=dtype).astype(np.float64)
        assert values.min() == 0
        assert values.max() < 1


def test_exponential_is_never_zero():
    assert draw("exponential.default", zeros.bfloat16()).astype(np.float64).min() > 0


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_bernoulli_of_a_number(p):
    values = draw("bernoulli.p", zeros, p)
    assert set(np.unique(values)) <= {0.0, 1.0}
    # Four standard deviations of the mean of so many draws.
    assert abs(values.mean(dtype=np.float64) - p) <= 4 * math.sqrt(p * (1 - p) / COUNT)


def test_bernoulli_of_a_tensor():
    p = torch.linspace(0, 1, 5)[:, None].expand(5, COUNT // 5)
    for values in (draw("bernoulli.default", p), draw("bernoulli.Tensor", zeros.view(5, -1).int(), p.double())):
        np.testing.assert_allclose(values.mean(1, dtype=np.float64), [0, 0.25, 0.5, 0.75, 1], atol=0.015)
        assert values[0].max() == 0
        assert values[4].min() == 1


def test_small_rates_are_kept():
    # 40 of 10**7 draws are expected, six standard deviations from either bound; 16 bits would give 0 or 150.
    values = draw("bernoulli.p", torch.zeros(10**7, dtype=torch.uint8), 4e-6)
    assert 5 < values.sum() < 80


@pytest.mark.parametrize(
    ("name", "args", "low", "high"),
    [
        ("randint.default", (7, [COUNT]), 0, 7),
        ("randint.low", (-3, 4, [COUNT]), -3, 4),
        ("randint_like.default", (zeros, 7), 0, 7),
        ("randint_like.low_dtype", (zeros, -3, 4), -3, 4),
        ("randint_like.Tensor", (zeros.int(), torch.tensor(7)), 0, 7),
        ("random.to", (zeros.to(torch.int8), 7), 0, 7),
        ("random.from", (zeros, -3, 4), -3, 4),
    ],
)
def test_integers(name, args, low, high):
    values, counts = np.unique(draw(name, *args), return_counts=True)
    assert list(values) == list(range(low, high))
    np.testing.assert_allclose(counts / COUNT, 1 / 7, atol=0.006)  # five standard deviations of 0.0011


def test_every_integer_of_the_dtype():
    assert set(draw("random.default", zeros.to(torch.int8))) == set(range(128))
    assert set(draw("random.default", zeros.bool())) == {False, True}
    wide = draw("random.from", zeros.long(), -(2**63), None)
    assert wide.min() < -(2**62) and wide.max() > 2**62


def test_geometric():
    for dtype in (torch.float32, torch.int64):
        values = draw("geometric.default", zeros.to(dtype), 0.3).astype(np.float64)
        assert values.min() == 1
        assert abs((values == 1).mean() - 0.3) < 0.006  # four standard deviations of 0.0015
        assert abs(values.mean() - 1 / 0.3) < 0.04  # four standard deviations of 0.009


def test_randperm():
    order = draw("randperm.default", 1000, dtype=torch.int32)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.13  # four standard deviations of 1 / sqrt(1000)


def test_multinomial():
    weights = torch.tensor([[1.0, 0.0, 3.0, 6.0], [0.0, 1.0, 1.0, 0.0]])
    values = draw("multinomial.default", weights, COUNT, True)
    assert values.dtype == np.int64
    shares = np.stack([np.bincount(row, minlength=4) / COUNT for row in values])
    np.testing.assert_allclose(shares, weights / weights.sum(1, keepdim=True), atol=0.007)
    assert shares[0, 1] == shares[1, 0] == shares[1, 3] == 0
    once = draw("multinomial.default", weights[:1].expand(COUNT // 10, 4), 3)
    assert (np.sort(once, axis=1) == [0, 2, 3]).all()
    np.testing.assert_allclose(np.bincount(once[:, 0], minlength=4) * 10 / COUNT, [0.1, 0, 0.3, 0.6], atol=0.02)


def test_dropout():
    output, mask = draw("native_dropout.default", zeros + 2, 0.25, True)
    assert mask.dtype == bool
    assert abs(mask.mean() - 0.75) < 0.006  # four standard deviations of 0.0014
    np.testing.assert_array_equal(output, np.where(mask, np.float32(2) * np.float32(1 / 0.75), np.float32(0)))
    kept, everywhere = draw("native_dropout.default", zeros + 2, 0.25, False)
    assert everywhere.all() and (kept == 2).all()
    assert not draw("native_dropout.default", zeros + 2, 1.0, True)[0].any()


def test_randomized_leaky_relu():
    x = torch.linspace(-1, 1, COUNT)
    output, noise = draw("rrelu_with_noise_functional.default", x, zeros, 0.1, 0.4, True)
    negative = x.numpy() <= 0
    assert distance(noise[negative], lambda s: (s - 0.1) / 0.3) < LARGEST_DISTANCE * math.sqrt(2)
    assert (noise[~negative] == 1).all()
    np.testing.assert_array_equal(output, x.numpy() * noise)
    for training in (False, True):
        args = (torch.ones(COUNT), x, torch.tensor(noise), 0.1, 0.4, training, False)
        assert_lowering_matches("aten.rrelu_with_noise_backward.default", *args)


def test_nodes_and_seeds_draw_independently():
    draws = [draw("randn.default", [COUNT], seed=seed, index=index) for seed in (0, 1, -1) for index in (0, 1)]
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / math.sqrt(COUNT)
    np.testing.assert_array_equal(draws[0], draw("randn.default", [COUNT], seed=0, index=0))


def test_elements_are_drawn_independently():
    values = draw("randn.default", [64, COUNT // 64])
    for step in (1, 2, 3, 64, COUNT // 64, 4096):
        flat = values.ravel()
        assert abs(np.corrcoef(flat[step:], flat[:-step])[0, 1]) < 4 / math.sqrt(COUNT)
    # Every bit of the float is fair: four standard deviations of 0.5 / sqrt(COUNT).
    whole = (draw("rand.default", [COUNT]).astype(np.float64) * 2**24).astype(np.int64)
    for bit in range(24):
        assert abs((whole >> bit & 1).mean() - 0.5) < 2 / math.sqrt(COUNT)


def test_keys_do_not_collide():
    with jax.enable_x64(True):
        keys = jax.jit(lambda seed: [node_key(seed, index) for index in range(50)])
        seen = {int(key) for seed in range(-10, 10) for key in keys(np.int64(seed))}
    assert len(seen) == 1000
