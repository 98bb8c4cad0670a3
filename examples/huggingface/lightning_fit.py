"""Train a small classifier of scikit-learn's digits with Lightning.

    python lightning_fit.py                  # 10 epochs

Expected: test accuracy above 95%, in a few seconds on two CPU cores.
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    """Two layers, cross entropy, AdamW."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))

    def training_step(self, batch, batch_idx):
        """The loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        """Notes the accuracy on a batch."""
        images, labels = batch
        self.log("test_accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main():
    """Train and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    lightning.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    test, train = torch.utils.data.random_split(data, [357, 1440])  # 1440 is 45 batches of 32
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), DataLoader(train, 32, shuffle=True), DataLoader(test, 357))
    print(f"final: test_accuracy={trainer.callback_metrics['test_accuracy'].item():.4f}")


if __name__ == "__main__":
    main()
