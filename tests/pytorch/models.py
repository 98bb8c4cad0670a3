"""Small versions of real architectures, each with batches it can learn from and the loss its users write."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to train.

    Attributes:
        model: Makes the module, from torch's seed.
        batch: Makes a batch from a generator; floating tensors are float32.
        loss: `(model, batch)` to the scalar loss.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], torch.Tensor]

    def batches(self, count: int) -> list[Batch]:
        """The same batches at every call."""
        generator = torch.Generator().manual_seed(1)
        return [self.batch(generator) for _ in range(count)]


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def vectors(generator: torch.Generator) -> Batch:
    x = torch.randn(16, 12, generator=generator)
    return {"x": x, "y": x[:, :4].argmax(1)}


def images(generator: torch.Generator) -> Batch:
    """Images whose brightest channel is their class."""
    y = torch.randint(3, (4,), generator=generator)
    x = torch.randn(4, 3, 12, 12, generator=generator)
    return {"x": x + F.one_hot(y, 3)[:, :, None, None], "y": y}


def scenes(generator: torch.Generator) -> Batch:
    """Images with a class for each pixel."""
    x = torch.randn(2, 3, 8, 8, generator=generator)
    return {"x": x, "y": x.argmax(1)}


def sentences(generator: torch.Generator) -> Batch:
    """Token ids whose first token decides the class."""
    ids = torch.randint(20, (8, 7), generator=generator)
    return {"x": ids, "y": ids[:, 0] % 3}


# ---- plain torch ----------------------------------------------------------------------------------------------------


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(dropout),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.body(x)
        out += self.shortcut(x)
        return F.relu(out)


def resnet() -> nn.Module:
    """ResNet's stem with max pooling, three residual blocks and its head."""
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    blocks = _Residual(4, 4, 1), _Residual(4, 8, 2), _Residual(8, 8, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class UNet(nn.Module):
    """Two levels; one comes back up by a transposed convolution, the other by interpolation."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.high, self.middle = self._double(3, width), self._double(width, 2 * width)
        self.low = self._double(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, 2 * width, 2, 2)
        self.grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.merge_middle, self.merge_high = self._double(4 * width, width), self._double(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.LeakyReLU(0.1),
        )  # fmt: skip

    def forward(self, x):
        high = self.high(x)
        middle = self.middle(F.max_pool2d(high, 2))
        low = self.low(F.avg_pool2d(middle, 2))
        middle = self.merge_middle(torch.cat([self.up(low), middle], 1))
        return self.head(self.merge_high(torch.cat([self.grow(middle), high], 1)))


class Recurrent(nn.Module):
    """Classifies a sentence by the last states of a recurrent network."""

    def __init__(self, cell: type[nn.RNNBase], dropout: float = 0.0, **options: Any):
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.cell = cell(8, 8, num_layers=2, batch_first=True, dropout=dropout, **options)
        self.head = nn.Linear(16 if self.cell.bidirectional else 8, 3)

    def forward(self, ids):
        states, _ = self.cell(self.embed(ids))
        return self.head(states.mean(1))


class VAE(nn.Module):
    """A variational autoencoder; draws its noise unless it is given."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 12))

    def forward(self, x, noise=None):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn_like(mean) if noise is None else noise
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance, noise


def rate(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Nats per example that the code carries: its divergence from the prior."""
    return -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1).mean()


def negative_elbo(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits, mean, log_variance, _ = model(**batch)
    distortion = F.binary_cross_entropy_with_logits(logits, batch["x"], reduction="sum") / len(logits)
    return distortion + rate(mean, log_variance)


def pixels(generator: torch.Generator) -> Batch:
    """Binary pictures, each of one colour: a single bit tells them."""
    return {"x": torch.randint(2, (16, 1), generator=generator).float().expand(16, 12).contiguous()}


def pixels_and_noise(generator: torch.Generator) -> Batch:
    return pixels(generator) | {"noise": torch.randn(16, 3, generator=generator)}


class Recommender(nn.Module):
    """Embedding bags and dense features, multiplied pairwise: the shape of DLRM."""

    def __init__(self, rows: int = 30, width: int = 4):
        super().__init__()
        self.genres = nn.EmbeddingBag(rows, width, mode="sum")
        self.history = nn.EmbeddingBag(rows, width, mode="mean")
        self.bottom = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(3 + width, 8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("pairs", torch.triu_indices(3, 3, offset=1))

    def forward(self, dense, genres, history, offsets):
        bottom = self.bottom(dense)
        features = torch.stack([bottom, self.genres(genres), self.history(history, offsets)], 1)  # (B, 3, C)
        products = features @ features.transpose(1, 2)
        return self.top(torch.cat([products[:, self.pairs[0], self.pairs[1]], bottom], 1)).squeeze(1)


def visits(generator: torch.Generator) -> Batch:
    """Eight users with genres of equal number and histories of unequal length."""
    lengths = torch.tensor([3, 1, 5, 2, 4, 2, 6, 1])[torch.randperm(8, generator=generator)]
    dense = torch.randn(8, 5, generator=generator)
    return {
        "dense": dense,
        "genres": torch.randint(30, (8, 3), generator=generator),
        "history": torch.randint(30, (24,), generator=generator),
        "offsets": F.pad(lengths.cumsum(0), (1, 0))[:-1],
        "clicked": (dense[:, 0] > 0).float(),
    }


def clicks(model: nn.Module, batch: Batch) -> torch.Tensor:
    visit = {name: value for name, value in batch.items() if name != "clicked"}
    return F.binary_cross_entropy_with_logits(model(**visit), batch["clicked"])


# ---- transformers, with random weights ------------------------------------------------------------------------------

VOCABULARY = 40


def text(generator: torch.Generator) -> Batch:
    """Rising sequences: every token is the one before plus a constant."""
    start, stride = torch.randint(3, 20, (2, 4, 1), generator=generator)
    ids = 3 + (start + stride % 3 * torch.arange(10)) % (VOCABULARY - 3)  # 0, 1 and 2 are padding and the like
    return {"input_ids": ids, "labels": ids}


def padded_text(generator: torch.Generator) -> Batch:
    """The same, padded at the end."""
    batch = text(generator)
    lengths = torch.randint(5, 11, (4, 1), generator=generator)
    mask = (torch.arange(10) < lengths).long()
    return {
        "input_ids": batch["input_ids"] * mask,
        "attention_mask": mask,
        "labels": batch["labels"].masked_fill(mask == 0, -100),
    }


def pictures(generator: torch.Generator) -> Batch:
    batch = images(generator)
    return {"pixel_values": batch["x"], "labels": batch["y"]}


def gpt2(dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=10, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(dropout: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=VOCABULARY,
        max_position_embeddings=10, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForMaskedLM(config)


def t5(dropout: float = 0.0) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=2, d_model=16, num_heads=2, d_kv=8, d_ff=32, vocab_size=VOCABULARY, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=dropout,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def vit(dropout: float = 0.0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, image_size=12, patch_size=4,
        num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return ViTForImageClassification(config)


def llama() -> nn.Module:
    """Llama with grouped-query attention: two query heads for each key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=VOCABULARY, max_position_embeddings=10,
    )  # fmt: skip
    return LlamaForCausalLM(config)


JOBS = {
    "mlp": Job(model=mlp, batch=vectors, loss=classify),
    "resnet": Job(model=resnet, batch=images, loss=classify),
    "unet": Job(model=UNet, batch=scenes, loss=classify),
    "lstm": Job(model=lambda: Recurrent(nn.LSTM, bidirectional=True), batch=sentences, loss=classify),
    "gru": Job(model=lambda: Recurrent(nn.GRU), batch=sentences, loss=classify),
    "vae": Job(model=VAE, batch=pixels_and_noise, loss=negative_elbo),
    "recommender": Job(model=Recommender, batch=visits, loss=clicks),
    "gpt2": Job(model=gpt2, batch=text, loss=own_loss),
    "bert": Job(model=bert, batch=padded_text, loss=own_loss),
    "t5": Job(model=t5, batch=padded_text, loss=own_loss),
    "vit": Job(model=vit, batch=pictures, loss=own_loss),
    "llama": Job(model=llama, batch=padded_text, loss=own_loss),
}

NOISY_JOBS = {
    "mlp": Job(model=lambda: mlp(0.2), batch=vectors, loss=classify),
    "lstm": Job(model=lambda: Recurrent(nn.LSTM, 0.2), batch=sentences, loss=classify),
    "vae": Job(model=VAE, batch=pixels, loss=negative_elbo),
    "gpt2": Job(model=lambda: gpt2(0.1), batch=text, loss=own_loss),
    "bert": Job(model=lambda: bert(0.1), batch=padded_text, loss=own_loss),
    "t5": Job(model=lambda: t5(0.1), batch=padded_text, loss=own_loss),
    "vit": Job(model=lambda: vit(0.1), batch=pictures, loss=own_loss),
}
