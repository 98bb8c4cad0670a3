"""The whole GPT-2 small step for an H200 that is not there: attention, state, memory."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.aot.step_program import compile_step
from trainingcompiler.targets.target import Target

pytestmark = pytest.mark.gpu_plan

BATCH, LENGTH, LAYERS, VOCABULARY = 8, 512, 12, 50257
PARAMETERS = 124_439_808
CUSTOM_CALL = re.compile(r'custom_call_target="(__cudnn\$fmha\w+)"')


def gpt2(layers: int = LAYERS):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return GPT2LMHeadModel(config).train()


def loss_of(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**batch).loss


def compiled(model, **more):
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return compile_step(model, optimizer, loss_of, {"input_ids": ids, "labels": ids, **more}, Target.gpu("h200"))


@pytest.fixture(scope="module")
def step():
    return compiled(gpt2())


def test_attention_is_cudnn_forward_and_backward(step):
    calls = CUSTOM_CALL.findall(step.as_text())
    assert sorted(calls) == LAYERS * ["__cudnn$fmhaSoftmax"] + LAYERS * ["__cudnn$fmhaSoftmaxBackward"]


def test_all_state_is_updated_in_place(step):
    state = sum(spec.size_bytes for spec in step.program.state)
    assert state >= 3 * 4 * PARAMETERS  # parameters and two moments
    assert step.memory.alias_bytes >= state


def test_temporaries(step):
    # Two arrays of logits in bfloat16, 0.8 GB, 0.14 GB for each layer, bfloat16 copies of the weights. Unfused
    # attention would make it 4.0 GB, float32 logits 0.8 GB more for each copy.
    assert step.memory.temporary_bytes < 2_800_000_000


SPELLINGS = {
    "plain": lambda logits, ids: F.cross_entropy(logits.view(-1, VOCABULARY), ids.view(-1)),
    "in float32, shifted": lambda logits, ids: F.cross_entropy(
        logits.float()[:, :-1].contiguous().view(-1, VOCABULARY), ids[:, 1:].reshape(-1)
    ),
    "smoothed": lambda logits, ids: F.cross_entropy(
        logits.view(-1, VOCABULARY), ids.view(-1), label_smoothing=0.1, ignore_index=-100
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_logits_are_never_held_in_float32(spelling):
    model = nn.Sequential(nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY, bias=False))

    def loss(model, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return SPELLINGS[spelling](model(ids), ids)

    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    step = compile_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, ids, Target.gpu("h200"))
    logits = 2 * BATCH * LENGTH * VOCABULARY
    assert 2 * logits < step.memory.temporary_bytes < 2.2 * logits  # they and their gradient, in bfloat16


def test_padding_masks_go_to_cudnn_too():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    calls = CUSTOM_CALL.findall(compiled(gpt2(layers=2), attention_mask=mask).as_text())
    assert sorted(calls) == 2 * ["__cudnn$fmhaScaleBiasSoftmax"] + 2 * ["__cudnn$fmhaScaleBiasSoftmaxBackward"]


def test_checkpointing_computes_again_and_saves_memory(step):
    model = gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames it in version 6
        model.gradient_checkpointing_enable()
    checkpointed = compiled(model)
    # 2.67 and 0.85 GB: the logits and their gradient remain, in bfloat16, 0.8 GB.
    assert checkpointed.memory.temporary_bytes < 0.6 * step.memory.temporary_bytes
    assert CUSTOM_CALL.findall(checkpointed.as_text()).count("__cudnn$fmhaSoftmax") == 2 * LAYERS
