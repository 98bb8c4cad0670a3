"""What a step would need in plain PyTorch, counted on stand-ins."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.aot import eager_memory
from trainingcompiler.frameworks.pytorch.aot import step_program as described
from trainingcompiler.frameworks.pytorch.aot.step_program import step_program


class Attention(nn.Module):
    """A small transformer layer, dropout in its attention."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.project, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.grow, self.shrink = nn.Linear(64, 256), nn.Linear(256, 64)
        self.dropout = dropout

    def forward(self, x):
        heads = self.project(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.shrink(F.gelu(self.grow(x)))


def loss_of(model, batch):
    return model(batch).square().mean()


def counted(monkeypatch, model: nn.Module, batch: torch.Tensor) -> int:
    """The estimate for a step of AdamW."""
    found = []
    real = described.capture
    monkeypatch.setattr(
        described, "capture", lambda entries: (found.append(eager_memory.peak_bytes(entries)), real(entries))[1]
    )
    step_program(model, torch.optim.AdamW(model.parameters()), loss_of, batch)
    monkeypatch.undo()
    return found[0]


def tracked(make, shape: tuple[int, ...]) -> int:
    """What torch's own tracker sees in the second of two steps, under fake tensors."""
    with FakeTensorMode():
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                loss_of(model, torch.zeros(shape)).backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()  # or it refuses to see a module twice; the peak stays
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)), (256, 64)),
    "attention": (lambda: nn.Sequential(*[Attention() for _ in range(4)]), (16, 128, 64)),
    "cnn": (cnn, (16, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_with_torchs_own_tracker(monkeypatch, name):
    make, shape = MODELS[name]
    ours, torchs = counted(monkeypatch, make(), torch.zeros(shape)), tracked(make, shape)
    assert ours == pytest.approx(torchs, rel=0.03)  # two ways to see when a tensor dies, and fused or not


def test_it_grows_in_a_straight_line(monkeypatch):
    model = nn.Sequential(*[Attention() for _ in range(2)])
    one, two, three = (counted(monkeypatch, model, torch.zeros(rows, 128, 64)) for rows in (8, 16, 24))
    assert three - two == pytest.approx(two - one, rel=1e-3)


def test_dropout_in_attention_keeps_no_matrix_of_scores(monkeypatch):
    """A GPU's kernel draws the same numbers again on the way back."""
    plain, dropping = (counted(monkeypatch, Attention(dropout), torch.zeros(8, 512, 64)) for dropout in (0.0, 0.5))
    scores_bytes = 4 * 8 * 4 * 512 * 512
    assert dropping == plain < scores_bytes


def test_frozen_weights_are_counted_and_have_no_state(monkeypatch):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8))
    whole = counted(monkeypatch, model, torch.zeros(4, 1024))
    model[0].requires_grad_(False)
    frozen = counted(monkeypatch, model, torch.zeros(4, 1024))
    weight_bytes = 4 * 1024 * 1024
    assert weight_bytes < frozen < 2 * weight_bytes and whole > 4 * weight_bytes
