"""PEFT, Accelerate and Lightning: the same deferred tape serves their loops."""

import subprocess
import sys
import warnings

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from parity import assert_same_training, train
from small import batches, mlp
from tasks import TASKS, llama_with_lora
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from training import losses, trainer

ACCUMULATED = 2


def made() -> dict:
    """A model and its optimizer."""
    model = mlp()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}


@pytest.mark.parametrize("accumulated", [1, ACCUMULATED])
def test_an_accelerate_loop(accumulated):
    def loop(objects, data):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        scheduler = torch.optim.lr_scheduler.StepLR(objects["optimizer"], 5, 0.7)
        model, optimizer, loader, scheduler = accelerator.prepare(
            objects["model"], objects["optimizer"], DataLoader(data, batch_size=None), scheduler
        )
        seen, total = [], torch.zeros(())
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    seen.append(accelerator.clip_grad_norm_(model.parameters(), 0.5))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach()
        return [norm.item() for norm in seen] + [total.item()]

    run = assert_same_training(made, loop, batches(), max_compiles=accumulated, float64_tolerance=1e-6)  # a float32 sum
    counts = run.statistics
    assert counts.eager_steps == 1 and counts.launches == accumulated * counts.compiled_steps


def test_a_script_without_transformers_stays_without_it(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys, accelerate; print('transformers' in sys.modules)")
    command = [sys.executable, "-m", "trainingcompiler.launch", str(script)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


class Lit(lightning.LightningModule):
    """The module of Lightning's own tutorial."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        self.seen.append(loss.detach())
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.model(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def test_a_lightning_fit(tmp_path):
    def make():
        return {"model": mlp()}

    def loop(objects, data):
        module = Lit(objects["model"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning advises more DataLoader workers, and srun where there is one
            fit = lightning.Trainer(
                max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                gradient_clip_val=0.5, default_root_dir=tmp_path, enable_checkpointing=False,
            )  # fmt: skip
            fit.fit(module, DataLoader(data, batch_size=None), DataLoader(data[:4], batch_size=None))
        return [loss.item() for loss in module.seen] + [fit.callback_metrics["val_loss"].item()]

    run = assert_same_training(make, loop, batches(), dtypes=(torch.float32,))
    counts = run.statistics
    assert counts.eager_steps == 0 and counts.compiled_steps == 2 * len(batches())
    validations = 2 + 2 * 4  # two before training, to see that it works
    assert counts.compiles <= 3 and counts.launches == counts.compiled_steps + validations


def test_a_fabric_loop():
    """Its optimizer is an object whose class is made of the optimizer's own."""

    def loop(objects, data):
        fabric = Fabric(accelerator="cpu", devices=1)
        model, optimizer = fabric.setup(objects["model"], objects["optimizer"])
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            seen.append(loss.item())
        return seen

    run = assert_same_training(made, loop, batches())
    assert run.statistics.compiled_steps >= len(batches()) - 1


class ByHand(Lit):
    """Steps itself, as Lightning's GAN does."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


def test_lightnings_optimization_by_hand(tmp_path):
    def loop(objects, data):
        module = ByHand(objects["model"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            fit = lightning.Trainer(
                max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=tmp_path, enable_checkpointing=False,
            )  # fmt: skip
            fit.fit(module, DataLoader(data, batch_size=None))
        return [loss.item() for loss in module.seen]

    run = assert_same_training(lambda: {"model": mlp()}, loop, batches(), dtypes=(torch.float32,))
    assert run.statistics.compiled_steps >= len(batches()) - 1


def test_lora_adapters_train_and_frozen_weights_have_no_state(tmp_path):
    def loop(objects, data):
        done = trainer(objects, data, tmp_path, max_steps=6)
        done.train()
        objects["trainer"] = done
        return losses(done)

    run = train(lambda: {"model": llama_with_lora()}, loop, TASKS["llama with lora"].data(), compiled=True)
    model, optimizer = run.objects["model"], run.objects["trainer"].optimizer
    adapters = {id(p) for name, p in model.named_parameters() if "lora" in name}
    assert adapters == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} == adapters
    frozen = [p for p in model.parameters() if id(p) not in adapters]
    assert frozen and all(p.grad is None for p in frozen)
    assert run.statistics.launches == run.statistics.compiled_steps == 6 and not run.fallbacks()
