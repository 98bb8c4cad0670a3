"""Compare `model.fit` with and without the hook, side by side in one run.

    python benchmarks/keras_fit.py --quick                  # a look: three models, few rounds
    python benchmarks/keras_fit.py --json out.json          # all models (half an hour on two cores)
    python benchmarks/keras_fit.py --plan h200              # the memory plans of all models on a GPU that is not there

Every model is made once per contender, and the contenders take turns, one epoch each, in an order that rotates from
round to round, so that a machine that slows down slows all. A step is what `fit` takes per batch, Keras's own loop
and callbacks included; its figure is the fastest epoch: other work on the machine only ever adds time. The first
epoch of each contender is its time to the first epoch: tracing and compiling with empty caches included, and, for
ours, the measuring of engines.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

from report import ask_for_huge_pages, circumstances

if __name__ == "__main__":
    ask_for_huge_pages()  # before TensorFlow is loaded, which takes seconds

import keras
import numpy as np

import trainingcompiler as tc
from trainingcompiler.reporting.events import EngineChosen, subscribe

L = keras.layers
CONTENDERS = {
    "keras": {"training_compiler": False},  # jit_compile="auto", which on a CPU is Keras's plain graph
    "keras, jit_compile=True": {"training_compiler": False, "jit_compile": True},
    "hook": {"training_compiler": True},
}
QUICK = ("mlp-tiny", "dropout", "transformer-small")
OVERHEAD_BOUND = ("mlp-tiny", "dropout", "wide-deep", "mlp-large", "transformer-tiny", "transformer-small")
EPOCH_SECONDS, LEAST_STEPS, MOST_STEPS = 1.5, 8, 400


def dense(width: int, depth: int, classes: int = 10, features: int = 64) -> keras.Model:
    """A perceptron."""
    return keras.Sequential(
        [keras.Input((features,)), *(L.Dense(width, "relu") for _ in range(depth)), L.Dense(classes)]
    )


def regularized() -> keras.Model:
    """A perceptron with batch normalization and dropout."""
    parts = [part for _ in range(3) for part in (L.Dense(128, "relu"), L.BatchNormalization(), L.Dropout(0.3))]
    return keras.Sequential([keras.Input((64,)), *parts, L.Dense(10)])


def wide_deep() -> keras.Model:
    """A recommender: embeddings of eight columns, and a perceptron over them."""
    ids = keras.Input((8,), dtype="int32")
    x = L.Flatten()(L.Embedding(2000, 16)(ids))
    deep = L.Dense(64, "relu")(L.Dense(128, "relu")(x))
    return keras.Model(ids, L.Dense(10)(L.Concatenate()([x, deep])))


def transformer(depth: int, width: int, vocabulary: int, length: int) -> keras.Model:
    """A decoder that classifies its sequence."""
    tokens = keras.Input((length,), dtype="int32")
    x = L.Embedding(vocabulary, width)(tokens)
    for _ in range(depth):
        y = L.LayerNormalization()(x)
        x = x + L.MultiHeadAttention(4, width // 4)(y, y, use_causal_mask=True)
        y = L.LayerNormalization()(x)
        x = x + L.Dense(width)(L.Dense(4 * width, "gelu")(y))
    return keras.Model(tokens, L.Dense(10)(L.GlobalAveragePooling1D()(L.LayerNormalization()(x))))


def recurrent(cell: type) -> keras.Model:
    """One recurrent layer over embedded tokens."""
    return keras.Sequential([keras.Input((20,), dtype="int32"), L.Embedding(1000, 64), cell(64), L.Dense(10)])


def convolutional(residual: bool) -> keras.Model:
    """Three stages of convolutions with batch normalization."""
    image = keras.Input((32, 32, 3))
    x = image
    for filters in (32, 64, 128):
        y = L.ReLU()(L.BatchNormalization()(L.Conv2D(filters, 3, padding="same", use_bias=False)(x)))
        if residual:
            z = L.BatchNormalization()(L.Conv2D(filters, 3, padding="same", use_bias=False)(y))
            y = L.ReLU()(z + L.Conv2D(filters, 1)(x))
        x = L.MaxPooling2D()(y)
    return keras.Model(image, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def floats(*shape: int) -> Callable:
    """Makes normal numbers, given a generator and how many rows."""
    return lambda random, rows: random.standard_normal((rows, *shape)).astype(np.float32)


def tokens(vocabulary: int, length: int) -> Callable:
    """Makes token numbers, given a generator and how many rows."""
    return lambda random, rows: random.integers(0, vocabulary, (rows, length)).astype(np.int32)


MODELS: dict[str, tuple[Callable, Callable, int]] = {
    "mlp-tiny": (lambda: dense(64, 2), floats(64), 64),
    "dropout": (regularized, floats(64), 64),
    "wide-deep": (wide_deep, tokens(2000, 8), 128),
    "mlp-large": (lambda: dense(1024, 3), floats(64), 128),
    "transformer-tiny": (lambda: transformer(1, 32, 500, 16), tokens(500, 16), 16),
    "transformer-small": (lambda: transformer(2, 64, 1000, 32), tokens(1000, 32), 32),
    "transformer": (lambda: transformer(4, 256, 5000, 64), tokens(5000, 64), 16),
    "lstm": (lambda: recurrent(L.LSTM), tokens(1000, 20), 64),
    "gru": (lambda: recurrent(L.GRU), tokens(1000, 20), 64),
    "cnn": (lambda: convolutional(False), floats(32, 32, 3), 32),
    "resnet": (lambda: convolutional(True), floats(32, 32, 3), 32),
}
"""Name -> how to make the model, how to make its inputs, rows in a batch."""


def measure(name: str, rounds: int) -> dict:
    """Measures one model under all contenders.

    Returns:
        `model`, `engine` (whom the hook has chosen), `chosen_ms` (what it measured), and per contender `ms` a step,
        `first_epoch_s` and the last `loss`.
    """
    make, inputs, batch = MODELS[name]
    random = np.random.default_rng(0)
    fits, rows = {}, {}
    steps = 40
    chosen: list[EngineChosen] = []
    unsubscribe = subscribe(lambda event: chosen.append(event) if isinstance(event, EngineChosen) else None)
    x, y = inputs(random, batch * MOST_STEPS), random.integers(0, 10, batch * MOST_STEPS)
    for contender, options in CONTENDERS.items():
        keras.utils.set_random_seed(0)
        model = make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"], **options)

        def fit(steps: int, model: keras.Model = model) -> tuple[float, float, float]:
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            history = model.fit(
                x[: steps * batch], y[: steps * batch], batch_size=batch, epochs=1, verbose=0, shuffle=False
            )
            seconds, cpu_seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            return seconds, cpu_seconds, history.history["loss"][-1]

        fits[contender] = fit
        rows[contender] = {"first_epoch_s": round(fit(steps)[0], 2), "ms_all": [], "cpu_ms_all": []}
    slowest_s = max(fit(LEAST_STEPS)[0] / LEAST_STEPS for fit in fits.values())
    steps = int(min(MOST_STEPS, max(LEAST_STEPS, EPOCH_SECONDS / slowest_s)))
    for turn in range(rounds):
        order = list(fits)
        for contender in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds, cpu_seconds, loss = fits[contender](steps)
            rows[contender]["ms_all"].append(1e3 * seconds / steps)
            rows[contender]["cpu_ms_all"].append(1e3 * cpu_seconds / steps)
            rows[contender]["loss"] = loss
    unsubscribe()
    for row in rows.values():
        row["ms"], row["cpu_ms"] = min(row["ms_all"]), min(row["cpu_ms_all"])
        row["cpu_ms_all"] = [round(ms, 3) for ms in row["cpu_ms_all"]]
        row["ms_all"] = [round(ms, 3) for ms in row["ms_all"]]
    event = chosen[-1] if chosen else None
    return {
        "model": name,
        "engine": event.engine if event else "not decided",
        "chosen_ms": {engine: round(ms, 3) for engine, ms in event.times_ms.items()} if event else {},
        "contenders": rows,
    }


def plans(names: list[str], gpu: str) -> str:
    """The memory plan of every model's step on a described GPU, as a Markdown table."""
    from trainingcompiler.compiling import compiler
    from trainingcompiler.frameworks.keras.described import step_program
    from trainingcompiler.targets.target import Target

    lines = ["| model | state (MB) | temporaries (MB) | peak (MB) | compile (s) |", "|---|---|---|---|---|"]
    for name in names:
        make, inputs, batch = MODELS[name]
        random = np.random.default_rng(0)
        model = make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(1e-3), loss, metrics=["accuracy"], training_compiler=False)
        program = step_program(model, (inputs(random, batch), random.integers(0, 10, batch)))
        executable = compiler.compile(program, Target.gpu(gpu))
        memory, state = executable.memory, sum(spec.size_bytes for spec in program.state)
        megabytes = " | ".join(f"{size / 1e6:.2f}" for size in (state, memory.temporary_bytes, memory.peak_bytes))
        lines.append(f"| {name} | {megabytes} | {executable.compile_time_s:.1f} |")
    return "\n".join(lines)


def table(results: list[dict]) -> str:
    """The results as a Markdown table, ratios against Keras's default."""
    lines = [
        "| model | Keras, default (ms/step) | jit_compile=True | hook | CPU time: default (ms/step) | hook "
        "| engine chosen | first epoch (s): default / jit / hook |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = list(result["contenders"].values())
        ratios = [rows[0]["ms"] / row["ms"] for row in rows[1:]]
        firsts = " / ".join(f"{row['first_epoch_s']:.1f}" for row in rows)
        lines.append(
            f"| {result['model']} | {rows[0]['ms']:.2f} | {ratios[0]:.2f}x | **{ratios[1]:.2f}x** "
            f"| {rows[0]['cpu_ms']:.2f} | {ratio(result, 'cpu_ms'):.2f}x | {result['engine']} | {firsts} |"
        )
    for title, names in (("dispatch-bound, dense and small transformers", OVERHEAD_BOUND), ("all", MODELS)):
        chosen = [result for result in results if result["model"] in names]
        if chosen:
            wall, cpu = (statistics.geometric_mean(ratio(r, figure) for r in chosen) for figure in ("ms", "cpu_ms"))
            lines.append(f"| geometric mean, {title} | | | **{wall:.2f}x** | | {cpu:.2f}x | | |")
    return "\n".join(lines)


def ratio(result: dict, figure: str) -> float:
    """How many times as fast as Keras's default the hook is, by `"ms"` or by `"cpu_ms"`."""
    return result["contenders"]["keras"][figure] / result["contenders"]["hook"][figure]


def main() -> None:
    """Measures, prints the table, writes the file after every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", help=f"comma-separated, of {','.join(MODELS)}")
    parser.add_argument("--rounds", type=int, help="epochs per contender (7; 3 with --quick)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--plan", metavar="GPU", help="compile for this GPU instead of running; needs make gpu-plan")
    args = parser.parse_args()
    names = args.models.split(",") if args.models else list(QUICK if args.quick else MODELS)
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"{', '.join(unknown)} unknown; choose from {', '.join(MODELS)}")
    tc.enable(tc.TrainingCompilerConfig(quiet=True, fallback="error", cache_size_gb=0))
    if args.plan:
        print(plans(names, args.plan))
        return
    warm = dense(4, 1)
    warm.compile("sgd", "mse", training_compiler=False)
    warm.fit(np.zeros((8, 64)), np.zeros((8, 10)), verbose=0)  # TensorFlow's own start belongs to nobody
    results = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(measure(name, args.rounds or (3 if args.quick else 7)))
        keras.backend.clear_session()
        if args.json:
            args.json.write_text(json.dumps({"circumstances": circumstances(), "results": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
