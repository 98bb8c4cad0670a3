"""Loss functions against torch, forward and backward."""

import pytest
import torch

from tests.pytorch.operators.harness import assert_program_matches, check_operator

LOSSES = (
    "nll_loss",
    "cross_entropy",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "soft_margin_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "margin_ranking_loss",
    "hinge_embedding_loss",
    "cosine_embedding_loss",
    "triplet_margin_loss",
    "poisson_nll_loss",
    "gaussian_nll_loss",
)
cross_entropy = torch.nn.functional.cross_entropy


@pytest.mark.parametrize("name", LOSSES)
def test_operator(name):
    check_operator(f"nn.functional.{name}", samples=4)


def test_distances():
    check_operator("cdist", samples=6)


@pytest.mark.parametrize("name", ["nll_loss", "mse_loss", "smooth_l1_loss", "huber_loss"])
def test_sixteen_bits(name):
    check_operator(f"nn.functional.{name}", torch.bfloat16, samples=4)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_ignored_targets_and_class_weights(reduction, shape):
    scores = torch.randn(5, 3, *shape, requires_grad=True)
    target = torch.randint(0, 3, (5, *shape), generator=torch.Generator().manual_seed(0))
    target.view(-1)[1] = -100
    weight = torch.tensor([0.5, 0.0, 2.0])
    assert_program_matches(
        lambda scores: cross_entropy(scores, target, weight, reduction=reduction).sum().backward(), scores
    )


def test_label_smoothing():
    scores = torch.randn(5, 3, requires_grad=True)
    target = torch.tensor([0, 2, -100, 1, 1])
    assert_program_matches(lambda x: cross_entropy(x, target, label_smoothing=0.1).backward(), scores)


def test_mean_of_nothing_is_not_a_number():
    scores = torch.randn(2, 3, requires_grad=True)
    assert_program_matches(lambda x: cross_entropy(x, torch.tensor([-100, -100])).backward(), scores)
