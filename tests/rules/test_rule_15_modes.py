"""torch's own switches are honoured, or named as the reason to run eagerly."""

import pytest
from rule import holds, run

LOOP = """
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for index, (x, y) in enumerate(DATA):
    optimizer.zero_grad()
    {}
    optimizer.step()
    print(loss.item())
report(model)
"""
STEP = "loss = F.cross_entropy(model(x), y); loss.backward()"


def test_anomaly_detection_is_named(tmp_path):
    holds(
        LOOP.format(f"with torch.autograd.detect_anomaly(check_nan=True):\n        {STEP}"),
        tmp_path,
        says="anomaly detection is on",
        line=STEP,
    )


def test_anomaly_detection_still_detects(tmp_path):
    holds(
        LOOP.format(
            """
    try:
        with torch.autograd.detect_anomaly():
            loss = (model(x).sum() * 0).sqrt() if index > 2 else F.cross_entropy(model(x), y)
            loss.backward()
    except RuntimeError as error:
        print("found", "nan values" in str(error))
"""
        ),
        tmp_path,
        says="anomaly detection is on",
        line="if index > 2 else F.cross_entropy(model(x), y)",
    )


def test_deterministic_algorithms(tmp_path):
    ran = holds("torch.use_deterministic_algorithms(True)\n" + LOOP.format(STEP), tmp_path)
    assert ran.compiles == 1


def test_what_torch_has_no_deterministic_kernel_for(tmp_path):
    """Eager raises an error; XLA adds and writes in one order, so a compiled step does it, and twice the same bits."""
    put = "out.put(torch.arange(8) % 4, out[:2].flatten()) if index else out"
    step = f"out = model(x); loss = F.cross_entropy({put}, y); loss.backward()"
    script = "torch.use_deterministic_algorithms(True)\n" + LOOP.format(step)
    once, again = (run(script, tmp_path, "--engine=xla") for _ in range(2))
    assert once.out == again.out and once.compiled_steps >= 20


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_matmul_precision_is_part_of_the_signature(precision, tmp_path):
    change = f"torch.set_float32_matmul_precision('{precision}' if index < 12 else 'high'); "
    ran = holds(LOOP.format(change + STEP), tmp_path)
    assert ran.compiles == 2
