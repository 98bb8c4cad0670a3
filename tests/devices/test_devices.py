"""One script on several devices of one process trains the model that one device trains; state is really divided."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS_OF_FSDP = 0.1  # a device holds at most so much more than its part: norms and biases are not divided


def run(arguments: list[str], folder: Path, devices: int = 4, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python where one processor stands for several devices."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRAININGCOMPILER")}
    environ |= {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(HERE.parent / "pytorch")}
    environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=500, check=False
    )


def launched(script: str, folder: Path, *options: str, devices: int = 4, **variables: str):
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    words = ["-m", "trainingcompiler.launch", "--quiet", "--engine=xla", *options, str(path)]
    return run(words, folder, devices, **variables)


@pytest.mark.parametrize("name", ["cnn", "gpt2", "bert"])
@pytest.mark.exhaustive(but=["gpt2"])
def test_several_devices_train_the_model_of_one(name, tmp_path):
    done = run([str(HERE / "same_model.py"), name], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {found["run"]: found for line in done.stdout.splitlines() for found in [json.loads(line)]}
    assert len(results) == (4 if name == "cnn" else 6)
    assert {key: found["verdict"] for key, found in results.items()} == dict.fromkeys(results, "same")
    for key, found in results.items():
        devices, strategy = key.split()
        part = 1 / int(devices) if "fsdp" in strategy else 1 / 2 if "tp" in strategy else 1
        assert found["held"] <= (part + ROWS_OF_FSDP * part) * found["whole"], found


STATE = """
import copy, io
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 4))
average = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
seen = []


def steps(count):
    for _ in range(count):
        x = torch.randn(8, 16)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :4])
        loss.backward()
        optimizer.step()
        seen.append(loss.item())


steps(4)
assert "Away" not in repr(model[0].weight) and isinstance(model[0].weight, nn.Parameter)
steps(2)
copied = copy.deepcopy(model)
assert type(copied[0].weight) is nn.Parameter and torch.equal(copied[0].weight, model[0].weight)
steps(2)
file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
with torch.no_grad():  # an edit, an average of the weights, values by NumPy
    model[0].weight.mul_(0.5)
    for mean, now in zip(average.parameters(), model.parameters()):
        mean.lerp_(now, 0.1)
steps(3)
model[2].bias.data.add_(0.01)
seen.append(float(model[0].weight.detach().numpy().sum()))
steps(2)
file.seek(0)
saved = torch.load(file)
assert type(saved["model"]["0.weight"]) is torch.Tensor
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
steps(3)
model.eval()
with torch.no_grad():
    seen.append(model(torch.ones(3, 16)).sum().item())
model.train()
for parameter in model[0].parameters():
    parameter.requires_grad_(False)
steps(3)
nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * 0.9, model.parameters())
steps(2)
seen += [p.double().norm().item() for p in (*model.parameters(), *average.parameters())]
print(seen)
"""


def test_everything_a_script_does_with_its_state_sees_and_changes_the_values(tmp_path):
    alone = launched(STATE, tmp_path)
    assert alone.returncode == 0, alone.stderr[-3000:]
    for options in (("--devices=2",), ("--devices=4", "--strategy=fsdp")):
        shared = launched(STATE, tmp_path, *options)
        assert shared.returncode == 0, shared.stderr[-3000:]
        assert "[fallback]" not in shared.stderr, shared.stderr
        assert json.loads(shared.stdout) == pytest.approx(json.loads(alone.stdout), rel=1e-9), options


RESUMED = """
import os, sys
import torch
from torch import nn

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
start = 0
if os.path.exists("kept.pt"):
    kept = torch.load("kept.pt")
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    start = kept["step"]
stop = int(sys.argv[1])
for step in range(start, stop):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    loss = nn.functional.mse_loss(model(x), x[:, :4])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": stop}, "kept.pt")
print(loss.item(), sum(p.norm().item() for p in model.parameters()))
"""


def test_a_checkpoint_is_the_ordinary_file_and_resumes_on_another_number_of_devices(tmp_path):
    def go(folder: str, *plan: tuple[int, tuple[str, ...]]) -> list[float]:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "script.py"
        path.write_text(RESUMED, encoding="utf-8")
        for stop, options in plan:
            words = ["-m", "trainingcompiler.launch", "--quiet", "--engine=xla", *options, str(path), str(stop)]
            done = run(words, tmp_path / folder)
            assert done.returncode == 0, done.stderr[-3000:]
        return [float(word) for word in done.stdout.split()]

    whole = go("whole", (12, ()))
    parts = go("parts", (4, ("--devices=4", "--strategy=fsdp")), (8, ("--devices=2", "--strategy=fsdp")), (12, ()))
    assert parts == pytest.approx(whole, rel=1e-9)


TRAINER = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=128, n_head=4, n_positions=16, vocab_size=128,
                                   bos_token_id=0, eos_token_id=0))
rows = torch.randint(0, 128, (160, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "labels": row} for row in rows]


def loss_of(outputs, labels, **_):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


arguments = TrainingArguments(
    sys.argv[1], per_device_train_batch_size=8, max_steps=20, logging_steps=1, report_to=[], save_steps=10,
    use_cpu=True, disable_tqdm=True, learning_rate=1e-3, optim="sgd", max_grad_norm=0.5, save_total_limit=1,
)
trainer = Trainer(model, arguments, train_dataset=data, compute_loss_func=loss_of)
trainer.train()
print([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
      + [p.double().norm().item() for p in model.parameters()])
"""


@pytest.mark.exhaustive
def test_the_trainer_on_several_devices(tmp_path):
    results = {}
    for options in ((), ("--devices=2",), ("--devices=4", "--strategy=fsdp"), ("--devices=2", "--strategy=tp=2")):
        path = tmp_path / "script.py"
        path.write_text(TRAINER, encoding="utf-8")
        words = ["-m", "trainingcompiler.launch", "--quiet", "--engine=xla", *options, str(path), str(tmp_path / "out")]
        done = run(words, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        results[options] = json.loads(done.stdout.splitlines()[-1])
    alone = results.pop(())
    assert len(alone) > 20
    for options, found in results.items():
        assert found == pytest.approx(alone, rel=1e-9), options


KERAS = """
import numpy as np, keras
import trainingcompiler as tc

tc.tensor_parallel({"up": "column", "down": "row"})
keras.utils.set_random_seed(0)
keras.config.set_floatx("float64")
draw = np.random.RandomState(0)
x, y = draw.randint(0, 64, (320, 12)), draw.randint(0, 10, 320)
tokens = keras.Input((12,))
h = keras.layers.Embedding(64, 256, name="wte")(tokens)
h = keras.layers.BatchNormalization()(h)
h = h + keras.layers.MultiHeadAttention(4, 64, dropout=0.1)(h, h)
h = h + keras.layers.Dense(256, name="down")(keras.layers.Dense(512, activation="gelu", name="up")(h))
model = keras.Model(tokens, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling1D()(h)))
model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0, epsilon=1e-4),
              keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
history = model.fit(x, y, batch_size=32, epochs=2, verbose=0, validation_data=(x[:64], y[:64])).history
model.save("model.keras")
loaded = keras.models.load_model("model.keras")
assert all(np.array_equal(a, b) for a, b in zip(loaded.get_weights(), model.get_weights()))
print([value for name in sorted(history) for value in history[name]]
      + [float(np.linalg.norm(w)) for w in model.get_weights()])
"""


def test_keras_fit_on_several_devices(tmp_path):
    results = {}
    for options in ((), ("--devices=2",), ("--devices=4", "--strategy=fsdp"), ("--devices=2", "--strategy=tp=2")):
        done = launched(KERAS, tmp_path, *options, KERAS_BACKEND="tensorflow")
        assert done.returncode == 0, done.stderr[-3000:]
        results[options] = json.loads(done.stdout.splitlines()[-1])
    alone = results.pop(())
    for options, found in results.items():
        assert found == pytest.approx(alone, rel=1e-9), options


SMALL = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for rows in (8, 8, 6, 8, 6):
    loss = model(torch.ones(rows, 4)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_batch_that_does_not_divide_is_computed_by_all_and_said_once(tmp_path):
    (tmp_path / "small.py").write_text(SMALL, encoding="utf-8")
    done = run(["-m", "trainingcompiler.launch", "--devices=4", "small.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    said = "a batch of 6 rows cannot be divided between 4 devices: each computes all of it"
    assert done.stderr.count("cannot be divided") == 1 and said in done.stderr


@pytest.mark.parametrize(
    ("options", "devices", "message"),
    [
        (("--devices=3",), 2, "--devices=3: this process has 2 (cpu); give --devices=all or fewer"),
        (("--devices=2", "--no-compile"), 2, "--devices=2 needs compiled steps, and --no-compile leaves them to the"),
        (("--devices=0",), 2, '--devices=0: must be a number of devices, 1 or more, or "all"'),
        (("--devices=two",), 2, '--devices=two: must be a number of devices, 1 or more, or "all"'),
        (("--devices=3", "--strategy=tp=2"), 4, "groups of 2 devices do not divide 3; take a multiple of 2"),
        (("--devices=2", "--strategy=zero"), 2, "--strategy=zero: must be dp, fsdp, tp=K or fsdp+tp=K"),
        (("--devices=2", "--strategy=tp=2"), 2, "no rule says how the layers of train_step are divided (0.weight, 0.b"),
    ],
)
def test_bad_input_ends_with_one_message_and_code_2(options, devices, message, tmp_path):
    done = launched(SMALL, tmp_path, *options, devices=devices)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_all_devices_are_as_many_as_there_are(tmp_path):
    done = run(["-m", "trainingcompiler.launch", "--devices=all", "-m", "small"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2  # there is no such module
    (tmp_path / "small.py").write_text(SMALL, encoding="utf-8")
    done = run(["-m", "trainingcompiler.launch", "--devices=all", "-m", "small"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "4 devices, dp  compiled: yes" in done.stderr


UNSEEN = """
import torch
from torch import nn
from trainingcompiler.frameworks.pytorch.state import offloaded

model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    loss = model(torch.randn(8, 64)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
state = [*model.parameters(), *(value for kept in optimizer.state.values() for value in kept.values())]
assert all(id(tensor) in offloaded._offloaded for tensor in state), len(offloaded._offloaded)
"""


def test_a_loop_in_which_nobody_looks_moves_nothing(tmp_path):
    done = launched(UNSEEN, tmp_path, "--devices=2", "--strategy=fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
