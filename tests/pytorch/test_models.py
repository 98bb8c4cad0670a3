"""Real architectures in one ordinary loop: compiled, each trains the model that eager trains, in one program."""

import math

import pytest
import torch
from models import JOBS, NOISY_JOBS, Job, pixels, rate
from parity import DTYPES, FLOAT64_TOLERANCE, assert_same_training, train

STEPS = 20
BOTH = (torch.float64, torch.float32)
# These compute norms, softmax or the loss in float32 whatever their parameters are: 6e-8 an operation, amplified over
# 20 steps. Measured: 1e-7 to 6e-7.
PARTLY_FLOAT32 = {"gpt2", "t5", "llama"}
PARTLY_FLOAT32_TOLERANCE = 1e-5
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=2e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.05),
}


def maker(job: Job, optimizer: str):
    """Makes the job's model and its optimizer."""

    def make():
        model = job.model()
        return {"model": model.train(), "optimizer": OPTIMIZERS[optimizer](model.parameters())}

    return make


def looper(job: Job, clip: float | None = None):
    """A loop as its user would write it."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for batch in data:
            optimizer.zero_grad()
            loss = job.loss(model, batch)
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop


@pytest.mark.parametrize(
    ("name", "optimizer", "clip", "dtypes"),
    [
        ("mlp", "adam", None, BOTH),
        ("resnet", "sgd", None, DTYPES),
        ("unet", "adamw", 1.0, DTYPES),
        ("lstm", "sgd", 0.25, DTYPES),
        ("gru", "adam", 0.25, DTYPES),
        ("vae", "adam", None, DTYPES),
        ("recommender", "sgd", None, DTYPES),
        ("gpt2", "adamw", 1.0, BOTH),
        ("bert", "adamw", None, DTYPES),
        ("t5", "adamw", 1.0, (torch.float64,)),
        ("vit", "sgd", 1.0, (torch.float64,)),
        ("llama", "adamw", 1.0, (torch.float64,)),
    ],
)
@pytest.mark.exhaustive(
    but=[
        "mlp-adam-None-dtypes0",
        "resnet-sgd-None-dtypes1",
        "lstm-sgd-0.25-dtypes3",
        "gpt2-adamw-1.0-dtypes7",
        "bert-adamw-None-dtypes8",
    ]
)
def test_trains_like_eager_in_one_program(name, optimizer, clip, dtypes):
    job = JOBS[name]
    run = assert_same_training(
        maker(job, optimizer),
        looper(job, clip),
        job.batches(STEPS),
        max_compiles=1,
        dtypes=dtypes,
        float64_tolerance=PARTLY_FLOAT32_TOLERANCE if name in PARTLY_FLOAT32 else FLOAT64_TOLERANCE,
    )
    assert run.statistics.eager_steps <= (name == "vit")  # whose first forward writes config.problem_type


@pytest.mark.parametrize("name", NOISY_JOBS)
@pytest.mark.exhaustive(but=["mlp", "vae", "gpt2"])
def test_learns_under_noise_of_its_own(name):
    job = NOISY_JOBS[name]
    data = [job.batches(1)[0]] * 30  # one batch again and again: a model that learns at all must get better at it
    run = train(maker(job, "adam"), looper(job), data, compiled=True)
    assert not run.fallbacks()
    assert run.statistics.compiles == 1
    assert all(map(math.isfinite, run.observed))
    # Ten steps average the noise out; an untrained model would be level within a few percent.
    assert sum(run.observed[-10:]) < 0.9 * sum(run.observed[:10])
    assert len(set(run.observed)) == len(run.observed)


def test_a_vae_draws_new_standard_noise_at_every_step():
    job = NOISY_JOBS["vae"]
    noises, rates = [], []

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        for batch in data:
            optimizer.zero_grad()
            logits, mean, log_variance, noise = model(batch["x"])
            spent = rate(mean, log_variance)
            distortion = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["x"], reduction="sum")
            (distortion / len(logits) + spent).backward()
            optimizer.step()
            noises.append(noise.clone())
            rates.append(spent.item())
        return []

    run = train(maker(job, "adam"), loop, job.batches(40), compiled=True)
    assert not run.fallbacks()
    drawn = torch.stack(noises)  # (steps, rows, latents)
    assert len({tuple(step.flatten().tolist()) for step in drawn}) == len(drawn)
    # 1,872 draws: the standard error of the mean is 0.023, that of the standard deviation 0.016; five of each.
    assert abs(drawn.mean().item()) < 0.12
    assert abs(drawn.std().item() - 1) < 0.08
    assert all(value >= 0 and math.isfinite(value) for value in rates)


def test_batches_are_what_they_say():
    for job in [*JOBS.values(), *NOISY_JOBS.values()]:
        (one,), (same,) = job.batches(1), job.batches(1)
        assert all(torch.equal(one[key], same[key]) for key in one)
    assert pixels(torch.Generator().manual_seed(0))["x"].unique().tolist() == [0.0, 1.0]
