"""torch's own switches are honoured, or named as the reason to run eagerly."""

import pytest
from rule import holds

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
    """What eager refuses then, the compiled step refuses: capture runs torch's own checks."""
    ran = holds("torch.use_deterministic_algorithms(True)\n" + LOOP.format(STEP), tmp_path)
    assert ran.compiles == 1


def test_what_has_no_deterministic_kernel_is_torchs_own_error(tmp_path):
    refused = """
    try:
        out = model(x)
        loss = F.cross_entropy(out.put(torch.arange(4), out[0]) if index % 8 == 7 else out, y)
        loss.backward()
    except RuntimeError as error:
        print("refused", "put_" in str(error))
        continue
"""
    holds(
        "torch.use_deterministic_algorithms(True)\n" + LOOP.format(refused),
        tmp_path,
        says="put_ does not have a deterministic implementation",
        line="out.put(torch.arange(4)",
    )


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_matmul_precision_is_part_of_the_signature(precision, tmp_path):
    change = f"torch.set_float32_matmul_precision('{precision}' if index < 12 else 'high'); "
    ran = holds(LOOP.format(change + STEP), tmp_path)
    assert ran.compiles == 2
