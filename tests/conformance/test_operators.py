"""A part of the conformance run that is quick: one sample in float32 of operators of every family."""

import pytest
import torch
from conformance import ENTRIES, MISMATCH, PASSES, UNSUPPORTED, check, dtypes_of
from exclusions import GAUGED

FAMILIES = {
    "arithmetic": "add sub mul div:floor_rounding remainder fmod pow float_power addcmul addcdiv lerp hypot atan2 "
    "xlogy logaddexp clamp maximum max:binary copysign __rpow__",
    "unary": "exp log1p sqrt rsqrt sin tanh sigmoid erf erfinv lgamma digamma polygamma:polygamma_n_2 sinc "
    "round:decimals_3 nan_to_num logit special.ndtr i0",
    "comparison": "eq isclose logical_and isnan where masked_fill heaviside",
    "reductions": "sum mean prod var std_mean amax logsumexp norm:inf cumsum cumprod logcumsumexp cummax "
    "max:reduction_with_dim median nansum masked.softmax masked.var quantile",
    "views": "view transpose permute expand squeeze:multiple unfold diagonal select slice split movedim",
    "joins": "cat stack hstack roll flip tile repeat block_diag meshgrid:list_of_tensors constant_pad_nd "
    "nn.functional.pad:reflect",
    "indices": "gather scatter scatter_reduce:amax index_add index_put index_copy take_along_dim __getitem__ "
    "searchsorted sort topk kthvalue mode",
    "products": "matmul addmm baddbmm einsum tensordot kron nn.functional.linear nn.functional.bilinear cdist",
    "algebra": "linalg.cholesky linalg.qr linalg.svd linalg.eigh linalg.det linalg.slogdet linalg.solve linalg.lu "
    "linalg.lu_solve linalg.inv linalg.pinv matrix_exp linalg.solve_triangular",
    "fourier": "fft.fft fft.irfftn fft.rfft2 complex polar view_as_complex stft",
    "convolutions": "nn.functional.conv1d nn.functional.conv2d nn.functional.conv_transpose2d nn.functional.unfold",
    "pooling": "nn.functional.max_pool2d nn.functional.avg_pool2d nn.functional.adaptive_avg_pool2d "
    "nn.functional.interpolate:bicubic nn.functional.grid_sample nn.functional.pixel_shuffle",
    "activations": "nn.functional.gelu nn.functional.silu nn.functional.elu nn.functional.softplus nn.functional.glu "
    "nn.functional.prelu nn.functional.logsigmoid softmax log_softmax",
    "normalization": "nn.functional.batch_norm nn.functional.layer_norm nn.functional.group_norm "
    "nn.functional.rms_norm nn.functional.instance_norm nn.functional.normalize",
    "attention": "nn.functional.scaled_dot_product_attention nn.functional.embedding nn.functional.embedding_bag",
    "losses": "nn.functional.cross_entropy nn.functional.nll_loss nn.functional.mse_loss nn.functional.huber_loss "
    "nn.functional.ctc_loss nn.functional.kl_div nn.functional.triplet_margin_loss nn.functional.pdist",
    "random": "nn.functional.dropout nn.functional.rrelu bernoulli normal rand_like multinomial randint",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_first_sample_in_float32(family):
    verdicts = [check(name, torch.float32, most=1) for name in FAMILIES[family].split()]
    assert not [verdict for verdict in verdicts if verdict.status != PASSES]


def test_an_operator_without_a_lowering_is_named():
    verdict = check("linalg.ldl_factor", torch.float32, most=3)
    assert verdict.status == UNSUPPORTED
    assert "aten.linalg_ldl_factor_ex.default" in verdict.note


def test_a_wrong_lowering_is_a_mismatch(monkeypatch):
    from trainingcompiler.frameworks.pytorch.operators import LOWERINGS

    monkeypatch.setitem(LOWERINGS, "aten.sin.default", LOWERINGS["aten.cos.default"])
    assert check("sin", torch.float32, most=2).status == MISMATCH
    monkeypatch.setitem(LOWERINGS, "aten.eq.Tensor", LOWERINGS["aten.ne.Tensor"])
    assert check("eq", torch.float32, most=2).status == MISMATCH


def test_a_wrong_distribution_is_a_mismatch(monkeypatch):
    from trainingcompiler.frameworks.pytorch.operators import RANDOM_LOWERINGS

    right = RANDOM_LOWERINGS["aten.bernoulli.default"]
    monkeypatch.setitem(RANDOM_LOWERINGS, "aten.bernoulli.default", lambda self, **rest: right(self / 2, **rest))
    assert check("bernoulli", torch.float32, most=1).status == MISMATCH


def test_gauged_entries_exist():
    assert ENTRIES.keys() >= GAUGED
    assert all(torch.float32 in dtypes_of(ENTRIES[name]) for name in GAUGED)
