"""The stock Trainer: plain, with `torch_compile=True`, and under `trainingcompiler.enable()`.

    .venv/bin/python benchmarks/huggingface_trainer.py                       # BERT-base, GPT-2 small, MiniLM, 8 x 128
    .venv/bin/python benchmarks/huggingface_trainer.py --models minilm --rounds 3 --json build/huggingface_trainer.json

Every engine trains in a process of its own, with empty caches; the processes take turns, a few steps each, so that
drift of the machine hits all alike; all ask for huge pages, as the launcher has a script do. Only ratios of one run
mean anything. "100 steps" is what the first two steps took, compiling included, and 98 times the median of the others.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainingcompiler.targets import huge_pages

ENGINES = ("plain", "torch_compile", "trainingcompiler")
MODELS = ("bert", "gpt2", "minilm")
ROWS, LENGTH = 8, 128


def build(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A randomly initialized model of full size, and random data for it."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    ids = torch.randint(5, 30_000, (256, LENGTH))
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config())
        return model, [{"input_ids": one, "labels": one} for one in ids]
    size = {} if name == "bert" else dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    model = hf.BertForSequenceClassification(hf.BertConfig(**size, num_labels=5))
    return model, [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one[0] % 5} for one in ids]


def work(name: str, engine: str, cache: str) -> None:
    """Trains in this process: each line on standard input is a number of steps, answered with their seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    import transformers as hf

    hf.logging.set_verbosity_error()
    if engine == "trainingcompiler":
        import trainingcompiler as tc

        tc.enable(tc.TrainingCompilerConfig(engine="xla", fallback="error", cache_dir=cache, quiet=True))

    class TakesTurns(hf.TrainerCallback):
        """Trains as many steps as it is told to, then waits."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.wanted = 0
            self.since = time.perf_counter()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.since)
            self.wanted -= 1
            if self.wanted == 0:
                answers.write(json.dumps(self.seconds) + "\n")
                answers.flush()
                control.should_training_stop = not self.wait()
            self.since = time.perf_counter()

        def wait(self) -> bool:
            self.seconds, line = [], sys.stdin.readline()
            self.wanted, self.since = int(line or 0), time.perf_counter()
            return bool(line)

    model, data = build(name)
    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.TrainingArguments(
            folder, per_device_train_batch_size=ROWS, max_steps=100_000, logging_steps=100, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, torch_compile=engine == "torch_compile",
        )  # fmt: skip
        hf.Trainer(model, arguments, train_dataset=data, callbacks=[TakesTurns()]).train()


class Worker:
    """One engine in a process of its own."""

    def __init__(self, name: str, engine: str, folder: str):
        cache = os.path.join(folder, f"{name}-{engine}")
        environment = os.environ | huge_pages.variables(os.environ) | {"TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--work", name, engine, cache]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, text=True, env=environment)

    def steps(self, count: int) -> list[float]:
        """Trains; returns the seconds of each step."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with code {self.process.wait()}: {' '.join(self.process.args)}")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(name: str, rounds: int, count: int) -> dict[str, dict[str, float]]:
    """Times every engine on a model.

    Args:
        name: Of the model.
        rounds: How often the engines take turns.
        count: Steps in a turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = {engine: Worker(name, engine, folder) for engine in ENGINES}
        first = {engine: sum(worker.steps(2)) for engine, worker in workers.items()}  # one at a time
        seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
        for _ in range(rounds):
            for engine, worker in workers.items():
                seconds[engine] += worker.steps(1 + count)[1:]  # the first one fetches memory that was lent meanwhile
        for worker in workers.values():
            worker.end()
    medians = {engine: statistics.median(seconds[engine]) for engine in ENGINES}
    return {
        engine: {
            "first_two_steps_s": first[engine],
            "step_s": medians[engine],
            "samples_per_s": ROWS / medians[engine],
            "hundred_steps_s": first[engine] + 98 * medians[engine],
        }
        for engine in ENGINES
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as Markdown: times of the plain Trainer, and how many times as fast the others are."""
    lines = [
        "| model | engine | samples/s | speed | first two steps (s) | 100 steps (s) | speed over 100 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, engines in results.items():
        plain = engines["plain"]
        for engine, got in engines.items():
            speed = plain["step_s"] / got["step_s"]
            whole = plain["hundred_steps_s"] / got["hundred_steps_s"]
            lines.append(
                f"| {name} | {engine} | {got['samples_per_s']:.1f} | {speed:.2f} | {got['first_two_steps_s']:.1f} | "
                f"{got['hundred_steps_s']:.0f} | {whole:.2f} |"
            )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What was measured, on what."""
    from importlib.metadata import version

    names = ("torch", "jax", "jaxlib", "transformers", "accelerate")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end"
    return {**{name: version(name) for name in names}, "python": platform.python_version(), "machine": machine}


def main() -> None:
    """Measure, print the table, and write the numbers."""
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.models:
        results[name] = measure(name, args.rounds, args.steps)
        print(table({name: results[name]}), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"versions": versions(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
