"""The models of the benchmark: what trains, on which batch, with which loss.

Each one exists at two widths, some at a third. `full` is what is timed, on a GPU `gpu`. `narrow` has the same layers
and the same number of parameter tensors and operators, but next to no arithmetic: its milliseconds are what the host
spends.
Dropout is 0 everywhere, so that all engines must print the same loss (the VAE's noise excepted).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training job.

    Attributes:
        model: In training mode.
        batch: The tensors of one step.
        loss: `(model, *batch)` to the scalar loss; calls `model` itself, so that a compiled module can stand in.
        optimizer: AdamW over all parameters.
    """

    model: nn.Module
    batch: Batch
    loss: Callable[..., torch.Tensor]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How to build one workload, at its widths; `gpu` is for a GPU and bfloat16, None where it has no such width."""

    build: Callable[..., tuple[nn.Module, Batch, Callable[..., torch.Tensor]]]
    full: dict[str, Any]
    narrow: dict[str, Any]
    gpu: dict[str, Any] | None = None


def build(name: str, width: str = "full", device: str = "cpu", seed: int = 0) -> Workload:
    """Builds the workload `name`; the same seed gives the same weights and batch.

    Args:
        name: A key of `ENTRIES`.
        width: `"full"`, `"narrow"` or `"gpu"`, the last of which has its forward in bfloat16 autocast.
        device: Where its tensors are.
        seed: torch's.
    """
    torch.manual_seed(seed)
    entry = ENTRIES[name]
    model, batch, plain_loss = entry.build(**getattr(entry, width))
    model, batch = model.to(device), tuple(tensor.to(device) for tensor in batch)

    def in_bfloat16(*arguments):
        with torch.autocast(device, dtype=torch.bfloat16):
            return plain_loss(*arguments)

    loss = in_bfloat16 if width == "gpu" else plain_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return Workload(model=model.train(), batch=batch, loss=loss, optimizer=optimizer)


LEARNING_RATE = 1e-4


# ---- plain torch -----------------------------------------------------------------------------------------------------


def _classify(model, x, labels):
    return F.cross_entropy(model(x), labels)


def _images(batch: int, size: int, classes: int, channels: int = 3) -> Batch:
    return torch.randn(batch, channels, size, size), torch.randint(classes, (batch,))


def mlp(width: int, batch: int):
    """Four hidden layers."""
    sizes = [width] * 5
    layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    return model, (torch.randn(batch, width), torch.randint(10, (batch,))), _classify


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(width: int, batch: int, size: int):
    """Six residual blocks with BatchNorm."""
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    blocks, inputs = [], width
    for i, outputs in enumerate(widths):
        blocks.append(_Residual(inputs, outputs, stride=2 if i in (2, 4) else 1))
        inputs = outputs
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return model, _images(batch, size, 10), _classify


class _UNet(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down1, self.down2 = self._double(3, width), self._double(width, 2 * width)
        self.bottom = self._double(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = self._double(4 * width, 2 * width), self._double(2 * width, width)
        self.head = nn.Conv2d(width, 4, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        convolutions = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU())

    def forward(self, x):
        high = self.down1(x)
        middle = self.down2(F.max_pool2d(high, 2))
        low = self.bottom(F.max_pool2d(middle, 2))
        middle = self.merge2(torch.cat([self.up2(low), middle], 1))
        return self.head(self.merge1(torch.cat([self.up1(middle), high], 1)))


def unet(width: int, batch: int, size: int):
    """Two levels down and up, with transposed convolutions; a class per pixel."""
    return _UNet(width), (torch.randn(batch, 3, size, size), torch.randint(4, (batch, size, size))), _classify


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module], vocabulary: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cell = cell(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        return self.head(self.cell(self.embed(ids))[0]).transpose(1, 2)  # (B, vocabulary, T)


def recurrent(cell: type[nn.Module], width: int, batch: int, length: int, vocabulary: int):
    """A two-layer language model of LSTM or GRU cells."""
    ids = torch.randint(vocabulary, (batch, length + 1))
    return _Recurrent(cell, vocabulary, width), (ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), _classify


class _VAE(nn.Module):
    def __init__(self, inputs: int, width: int, latent: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, inputs))

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def _negative_elbo(model, x):
    logits, mean, log_variance = model(x)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(x)


def vae(inputs: int, width: int, latent: int, batch: int):
    """A variational autoencoder of two-layer MLPs."""
    return _VAE(inputs, width, latent), (torch.rand(batch, inputs),), _negative_elbo


class _Recommender(nn.Module):
    def __init__(self, tables: int, rows: int, width: int, dense: int):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(dense, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(pairs + width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 1))
        self.register_buffer("pairs", torch.triu_indices(tables + 1, tables + 1, offset=1))

    def forward(self, dense, sparse):
        bottom = self.bottom(dense)  # (B, C)
        vectors = torch.stack([bottom, *(bag(ids) for bag, ids in zip(self.bags, sparse, strict=True))], 1)
        products = vectors @ vectors.transpose(1, 2)  # (B, tables + 1, tables + 1)
        return self.top(torch.cat([products[:, self.pairs[0], self.pairs[1]], bottom], 1)).squeeze(1)


def _clicks(model, dense, sparse, clicked):
    return F.binary_cross_entropy_with_logits(model(dense, sparse), clicked)


def recommender(tables: int, rows: int, width: int, batch: int, bag: int = 4, dense: int = 13):
    """Embedding bags and dense features, multiplied pairwise: the shape of DLRM."""
    sparse = torch.randint(rows, (tables, batch, bag))
    batch_tensors = (torch.randn(batch, dense), sparse, torch.randint(2, (batch,)).float())
    return _Recommender(tables, rows, width, dense), batch_tensors, _clicks


# ---- transformers, with random weights -------------------------------------------------------------------------------


def _own_loss(model, inputs, labels):
    return model(inputs, labels=labels).loss


def _text(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length))  # 0..2 are padding and the like


def gpt2(layers: int, width: int, heads: int, batch: int, length: int, vocabulary: int):
    """GPT-2 as a language model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=length, vocab_size=vocabulary, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = _text(batch, length, vocabulary)
    return GPT2LMHeadModel(config), (ids, ids), _own_loss


def bert(layers: int, width: int, heads: int, batch: int, length: int, vocabulary: int):
    """BERT with its masked-language-model head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
        vocab_size=vocabulary, max_position_embeddings=length,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = _text(batch, length, vocabulary)
    return BertForMaskedLM(config), (ids, ids), _own_loss


def t5(layers: int, width: int, heads: int, batch: int, length: int, vocabulary: int):
    """T5, encoder and decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=layers, d_model=width, num_heads=heads, d_kv=width // heads, d_ff=4 * width,
        vocab_size=vocabulary, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    ids = _text(batch, length, vocabulary)
    return T5ForConditionalGeneration(config), (ids, ids), _own_loss


def vit(layers: int, width: int, heads: int, batch: int, size: int, patch: int):
    """A vision transformer as a classifier."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=size, patch_size=patch, num_labels=10,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config), _images(batch, size, 10), _own_loss


def llama(layers: int, width: int, heads: int, batch: int, length: int, vocabulary: int):
    """Llama with grouped-query attention (two query heads per key head)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads // 2,
        intermediate_size=3 * width, vocab_size=vocabulary, max_position_embeddings=length, use_cache=False,
    )  # fmt: skip
    ids = _text(batch, length, vocabulary)
    return LlamaForCausalLM(config), (ids, ids), _own_loss


def _language(
    build_model, layers: int, width: int, heads: int, batch: int, length: int, vocabulary: int, gpu: dict | None = None
) -> Entry:
    return Entry(
        build=build_model,
        gpu=gpu,
        full=dict(layers=layers, width=width, heads=heads, batch=batch, length=length, vocabulary=vocabulary),
        narrow=dict(layers=layers, width=4 * heads, heads=heads, batch=1, length=8, vocabulary=16),
    )


def _cells(cell: type[nn.Module]) -> Entry:
    return Entry(
        build=recurrent,
        full=dict(cell=cell, width=256, batch=16, length=32, vocabulary=2000),
        narrow=dict(cell=cell, width=4, batch=1, length=32, vocabulary=8),
    )


ENTRIES = {
    "mlp": Entry(
        build=mlp,
        full=dict(width=1024, batch=256),
        narrow=dict(width=8, batch=2),
        gpu=dict(width=4096, batch=2048),
    ),
    "resnet": Entry(
        build=resnet,
        full=dict(width=32, batch=32, size=32),
        narrow=dict(width=2, batch=2, size=8),
        gpu=dict(width=64, batch=256, size=64),
    ),
    "unet": Entry(build=unet, full=dict(width=16, batch=8, size=64), narrow=dict(width=2, batch=1, size=8)),
    "lstm": _cells(nn.LSTM),
    "gru": _cells(nn.GRU),
    "vae": Entry(
        build=vae,
        full=dict(inputs=784, width=512, latent=32, batch=128),
        narrow=dict(inputs=8, width=8, latent=2, batch=2),
    ),
    "recommender": Entry(
        build=recommender,
        full=dict(tables=8, rows=10_000, width=32, batch=512),
        narrow=dict(tables=8, rows=16, width=4, batch=2),
    ),
    "gpt2": _language(gpt2, layers=4, width=256, heads=4, batch=8, length=128, vocabulary=5000),
    "gpt2-small": _language(
        gpt2, layers=12, width=768, heads=12, batch=4, length=128, vocabulary=50257,
        gpu=dict(layers=12, width=768, heads=12, batch=16, length=512, vocabulary=50257),
    ),
    "bert": _language(
        bert, layers=4, width=256, heads=4, batch=8, length=128, vocabulary=8000,
        gpu=dict(layers=12, width=768, heads=12, batch=32, length=256, vocabulary=30522),
    ),
    "t5": _language(t5, layers=3, width=256, heads=4, batch=8, length=64, vocabulary=8000),
    "vit": Entry(
        build=vit,
        full=dict(layers=4, width=192, heads=3, batch=16, size=64, patch=8),
        narrow=dict(layers=4, width=12, heads=3, batch=1, size=16, patch=8),
        gpu=dict(layers=12, width=768, heads=12, batch=64, size=224, patch=16),
    ),
    "llama": _language(
        llama, layers=4, width=256, heads=4, batch=8, length=128, vocabulary=8000,
        gpu=dict(layers=12, width=1024, heads=16, batch=8, length=1024, vocabulary=32000),
    ),
}  # fmt: skip
