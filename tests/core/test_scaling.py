"""Batch size and learning rate: every number here was worked out by hand."""

import pytest

from trainingcompiler.errors import ConfigError, UsageError
from trainingcompiler.planning.batch_scaling import Recipe, keep_global, rescale


def adamw(**values) -> Recipe:
    return Recipe(**{"batch_size": 8, "lr": 3e-4, "optimizer": "AdamW", **values})


def sgd(**values) -> Recipe:
    return Recipe(**{"batch_size": 32, "lr": 0.1, "optimizer": "SGD", **values})


def test_every_device_and_every_accumulated_batch_counts_once():
    assert adamw(accumulation_steps=4, world_size=2).global_batch_size == 64


def test_a_larger_batch_on_each_device_means_less_accumulation():
    scaled = keep_global(adamw(accumulation_steps=8, total_steps=100), batch_size=32)
    assert scaled.changes() == {"batch_size": (8, 32), "accumulation_steps": (8, 2)}
    assert scaled.describe() == (
        "keep-global (the global batch stays, so the training is the same); global batch 64 -> 64\n"
        "  batch_size: 8 -> 32\n"
        "  accumulation_steps: 8 -> 2"
    )


def test_more_devices_mean_less_accumulation():
    assert keep_global(adamw(accumulation_steps=8), batch_size=8, world_size=4).recipe.accumulation_steps == 2


def test_a_global_batch_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(UsageError) as refused:
        keep_global(adamw(accumulation_steps=8), batch_size=24)
    assert str(refused.value) == (
        "a global batch of 64 cannot be made of batches of 24 on 1 device: take 16 or 32, or let the global batch "
        "change"
    )
    with pytest.raises(UsageError, match="take fewer devices"):
        keep_global(adamw(), batch_size=8, world_size=16)


def test_linear():
    scaled = rescale(sgd(warmup_steps=80, total_steps=1000, weight_decay=1e-4), batch_size=256)
    assert (scaled.policy, scaled.factor) == ("linear", 8)
    assert scaled.recipe == sgd(batch_size=256, lr=0.8, warmup_steps=10, total_steps=125, weight_decay=1e-4)
    assert "arXiv:1706.02677" in scaled.because and not scaled.remarks


def test_linear_wants_a_warm_up():
    assert rescale(sgd(total_steps=1000), batch_size=64).recipe.warmup_steps == 25  # 5% of 500
    assert rescale(sgd(), batch_size=64).remarks == (
        "give the run a warm-up: the linear rule needs one (5 epochs in its paper)",
    )
    assert rescale(sgd(total_steps=1000), batch_size=16).recipe.warmup_steps == 0


def test_square_root_carries_a_decoupled_weight_decay_along():
    recipe = rescale(adamw(weight_decay=0.1, total_steps=1600), batch_size=32).recipe
    assert (recipe.lr, recipe.total_steps) == (6e-4, 400)
    assert recipe.weight_decay == pytest.approx(0.2)  # 6e-4 x 0.2 x 400 = 3e-4 x 0.1 x 1600
    coupled = rescale(adamw(optimizer="Adam", weight_decay=0.1), batch_size=32).recipe
    assert coupled.weight_decay == 0.1  # part of the gradient


def test_adams_whole_rule():
    recipe = rescale(adamw(betas=(0.9, 0.999), epsilon=1e-8), batch_size=32, policy="adam").recipe
    assert recipe.lr == 6e-4 and recipe.epsilon == 5e-9
    assert recipe.betas == pytest.approx((0.6, 0.996))


def test_adams_whole_rule_has_an_end():
    with pytest.raises(UsageError) as refused:
        rescale(adamw(betas=(0.9, 0.999), epsilon=1e-8), batch_size=128, policy="adam")
    assert str(refused.value) == (
        "a batch 16 times as large would need betas of -0.6, 0.984: with betas=(0.9, 0.999) the policy adam goes up to "
        "10 times; take sqrt, or a smaller batch"
    )
    with pytest.raises(UsageError, match="give them, or take the policy sqrt"):
        rescale(adamw(), batch_size=16, policy="adam")


def test_none_leaves_the_learning_rate_and_still_counts_samples():
    recipe = rescale(adamw(weight_decay=0.1, total_steps=1000, ema_decay=0.99), batch_size=16, policy="none").recipe
    assert recipe == adamw(batch_size=16, weight_decay=0.1, total_steps=500, ema_decay=0.99**2)


def test_a_smaller_batch_is_scaled_down():
    recipe = rescale(sgd(warmup_steps=10, total_steps=100), batch_size=8).recipe
    assert (recipe.lr, recipe.warmup_steps, recipe.total_steps) == (0.025, 40, 400)


def test_devices_are_counted_once_and_only_once():
    """The original counted GPUs twice in one notebook, and not at all in another."""
    start = sgd(batch_size=48, lr=5e-5, optimizer="SGD")
    assert rescale(start, world_size=4, policy="linear").recipe.lr == pytest.approx(4 * 5e-5)
    grown = sgd(batch_size=48, lr=2e-4, world_size=4)
    assert rescale(grown, batch_size=24, policy="linear").recipe.lr == pytest.approx(1e-4)  # 4 devices before and after
    assert rescale(grown, batch_size=96, world_size=16, policy="linear").recipe.lr == pytest.approx(8 * 2e-4)


def test_an_optimizer_without_a_rule():
    with pytest.raises(UsageError, match="no rule is known for the optimizer Muon: choose the policy yourself"):
        rescale(adamw(optimizer="Muon"), batch_size=16)
    assert rescale(adamw(optimizer="Muon"), batch_size=32, policy="sqrt").recipe.lr == 6e-4


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as refused:
        Recipe(batch_size=0, lr=-1, betas=(0.9, 1.0), total_steps=5, warmup_steps=9, optimizer="Adam")
    assert refused.value.mistakes == (
        "batch_size=0: must be a whole number, 1 or more",
        "lr=-1: must be a number above 0",
        "betas=(0.9, 1.0): must be from 0 up to, and without, 1",
        "total_steps=5: must be 1 or more, and no less than the warm-up",
    )
    with pytest.raises(ConfigError, match="policy='linaer': must be one of .*did you mean linear"):
        rescale(sgd(), batch_size=64, policy="linaer")
