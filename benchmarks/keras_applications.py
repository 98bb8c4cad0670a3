"""One training step of every architecture in `keras.applications`, compared with plain Keras, into docs/models.md.

    python benchmarks/keras_applications.py --write docs/models.md     # about an hour on two cores
    python benchmarks/keras_applications.py --models ResNet50,VGG16    # a few of them, printed

Each model is made twice from one seed, without pretrained weights and with the smallest input it takes, and makes one
step of SGD on the same two images in float64 (the largest in float32, for memory): once through a compiled step, once
as Keras does it. The rates of dropout and of stochastic depth are set to 0, because TensorFlow's graph and its XLA
draw different masks.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Two orders of summation differ by 1e-13 in float64 and by 1e-5 in float32, and deep networks amplify it.
HEADING = "## Keras applications"
TOLERANCES = {"float64": 1e-7, "float32": 1e-3}
# In float64 two of them need more than 8 GB. EfficientNetB6 needs 27 GB for its program, and is not among them: in
# float32 Keras differs from itself by a hundred times the largest gradient.
LARGE = ("ConvNeXtLarge", "ConvNeXtXLarge", "EfficientNetV2L")
SIDES = {"Inception": 75, "Xception": 71}  # smallest side that the architecture takes; 32 for all others
LIMIT_S = 1200
MOST_NOISE = 0.1  # beyond it, agreeing within Keras's own noise says nothing
HERE = Path(__file__).resolve()


def names() -> list[str]:
    """Every architecture of the installed Keras."""
    import keras

    found = {name for name, item in vars(keras.applications).items() if callable(item) and name[0].isupper()}
    return sorted(found)


def check(name: str) -> dict:
    """Trains one architecture one step, twice.

    Returns:
        `parameters`, `programs`, `compile_s`, and `difference`: the largest relative difference of the loss, of a
        weight or of a momentum, which after one step is the gradient times the rate. Where it is above the tolerance,
        `noise` is the same between plain Keras and plain Keras on the same images as `_alike` gives them, the largest
        of up to six.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import numpy as np

    import trainingcompiler as tc
    from trainingcompiler.reporting.statistics import current as statistics

    tc.enable(tc.TrainingCompilerConfig(engine="xla", fallback="error", quiet=True, cache_size_gb=0))
    dtype = "float32" if name in LARGE else "float64"
    keras.config.set_floatx(dtype)
    side = next((side for start, side in SIDES.items() if name.startswith(start)), 32)
    images = (np.random.default_rng(0).random((2, side, side, 3)) * 255).astype(dtype)
    labels = np.array([1, 7])

    def trained(option: bool, images: np.ndarray, labels: np.ndarray) -> tuple[list, list, list]:
        keras.utils.set_random_seed(0)
        model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=10)
        for layer in model._flatten_layers():
            for rate in ("rate", "drop_path_rate"):
                if isinstance(getattr(layer, rate, None), float):
                    setattr(layer, rate, 0.0)
        model.compile(
            keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy", training_compiler=option
        )
        loss = model.train_on_batch(images, labels)
        momenta = [variable.numpy() for variable in model.optimizer.variables[2:]]  # the gradients, times the rate
        result = [np.array(loss)], model.get_weights(), momenta
        keras.backend.clear_session(free_memory=True)
        return result

    ours, plain = trained(True, images, labels), trained(False, images, labels)
    parameters = sum(weight.size for weight in plain[1])
    difference, noise = relative_difference(ours, plain), 0.0
    # One twin is too small a sample of a noise with a long tail: for EfficientNetV2B2 six of them gave 0.002 to 0.02.
    for batch in _alike(images, labels) if difference > TOLERANCES[dtype] else ():
        noise = max(noise, relative_difference(trained(False, *batch), plain))
        if difference <= 3 * noise:
            break
    return {
        "parameters": parameters, "side": side, "dtype": dtype, "programs": statistics().compiles,
        "compile_s": round(statistics().compile_time_s, 1), "difference": difference,
        "noise": noise,
    }  # fmt: skip


def _alike(images: Any, labels: Any) -> Iterator[tuple[Any, Any]]:
    """The same two images again, in ways that only rounding can tell: swapped, or pixels moved by a bit either way."""
    import numpy as np

    yield images[::-1], labels[::-1]
    up, down = (np.nextafter(images, images.dtype.type(end)) for end in (np.inf, -np.inf))
    for seed in range(5):
        steps = np.random.default_rng(seed).integers(-1, 2, images.shape)
        yield np.select([steps > 0, steps < 0], [up, down], images), labels


def relative_difference(one: tuple, other: tuple) -> float:
    """The largest, each array judged by its own largest value, or by a thousandth of the largest of its kind."""
    import numpy as np

    found = 0.0
    for mine, theirs in zip(one, other, strict=True):
        largest = max(float(np.abs(value).max(initial=0)) for value in theirs)
        for a, b in zip(mine, theirs, strict=True):
            scale = max(float(np.abs(b).max(initial=0)), 1e-3 * largest, 1e-30)
            found = max(found, float(np.abs(a - b).max(initial=0)) / scale)
    return found


def is_equal(row: dict) -> bool:
    """Whether an architecture was compared, and its step is that of plain Keras."""
    return "difference" in row and row["difference"] <= max(TOLERANCES[row["dtype"]], 3 * row.get("noise", 0.0))


def check_apart(name: str) -> dict:
    """Runs `check` in a process of its own; what failed has a `reason`."""
    start_s = time.monotonic()
    try:
        run = subprocess.run(
            [sys.executable, str(HERE), "--one", name], capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"not finished after {LIMIT_S} s"}
    lines = run.stdout.strip().splitlines()
    if run.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = [line for line in run.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
    last = (said or run.stderr.strip().splitlines() or ["no output"])[-1]
    last = last.removeprefix("trainingcompiler.errors.").partition("; nothing")[0]
    return {"reason": last[:200] if run.returncode >= 0 else f"ended by signal {-run.returncode} after "
            f"{time.monotonic() - start_s:.0f} s"}  # fmt: skip


def page(results: dict[str, dict]) -> str:
    """The part of docs/models.md under `HEADING`."""
    import keras
    import tensorflow as tf

    noisy = [name for name, row in results.items() if row.get("noise", 0.0) > MOST_NOISE]
    equal = [name for name, row in results.items() if is_equal(row) and name not in noisy]
    compared = [name for name, row in results.items() if "difference" in row]
    lines = [
        HEADING,
        "",
        "Generated by `benchmarks/keras_applications.py`, which says what is compared: one step in float64,",
        f"compiled, against plain Keras (Keras {keras.__version__}, TensorFlow {tf.__version__}). Equal means a",
        f"relative difference of at most {TOLERANCES['float64']:g} in the loss, the weights and the gradients",
        f"(in float32, for the largest, {TOLERANCES['float32']:g}), or of three times what plain Keras differs from",
        "itself when the two images are swapped, or pixels moved by one bit (the largest of up to six), where that is",
        "larger: batch normalization over two images amplifies.",
        f"Of {len(results)} architectures {len(compared)} were compared, and {len(equal)} of those are equal; of",
        f"{len(noisy)} it cannot be told: on images this small Keras differs from itself by more than a tenth.",
        "",
        "| architecture | parameters | input | dtype | one step | largest relative difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        if "reason" in row:
            lines.append(f"| {name} | | | | not compared: {row['reason']} | |")
            continue
        verdict = "equal" if is_equal(row) else "**differs**"
        verdict = "cannot be told" if name in noisy and is_equal(row) else verdict
        size = f"{row['side']} x {row['side']}"
        noise = f" (Keras itself: {row['noise']:.1e})" if row.get("noise") else ""
        cells = [name, f"{row['parameters']:,}", size, row["dtype"], verdict, f"{row['difference']:.1e}{noise}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(whole: str, part: str) -> str:
    """A page with the part under `HEADING` replaced, or put at its end; other generators write the other parts."""
    before, _, old = whole.partition(HEADING)
    after = re.search(r"^## ", old, re.MULTILINE)
    return f"{before.rstrip()}\n\n{part}" + (f"\n{old[after.start() :]}" if after else "")


def main() -> None:
    """Checks, prints, writes; results are kept in build/ so that a run that was interrupted goes on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="comma-separated; all of them if not given")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(check(args.one)))
        return
    kept = HERE.parent.parent / "build" / "keras_applications.json"
    results = json.loads(kept.read_text()) if kept.exists() and args.write else {}
    for name in args.models.split(",") if args.models else names():
        if not is_equal(results.get(name, {})):
            results[name] = check_apart(name)
        print(name, results[name], flush=True)
        if args.write:
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(results, indent=1))
            rows = {known: results.get(known, {"reason": "not run yet (`make models`)"}) for known in names()}
            args.write.write_text(replaced(args.write.read_text() if args.write.exists() else "# Models\n", page(rows)))
    sys.exit(not all(map(is_equal, results.values())))


if __name__ == "__main__":
    main()
