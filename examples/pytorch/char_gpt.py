"""Train a small character-level GPT on the source text of Python's own standard library.

    python char_gpt.py                                          # 300 steps
    python char_gpt.py --steps 100                              # a short run
    python char_gpt.py --checkpoint gpt.pt                      # save every 100 steps
    python char_gpt.py --checkpoint gpt.pt --resume             # go on where the file stops

Expected: validation loss 2.23 after 300 steps (log 128 = 4.85 is guessing), 2.44 with --steps 100; a minute on two
CPU cores. Seen with torch 2.13.0 and Python 3.11, whose library is the text: another version's differs a little.
"""

import argparse
import math
import os
import statistics
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 128  # ASCII


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.residual_dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(B, T, C) to (B, T, C)."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.residual_dropout(self.proj(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.residual_dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A decoder-only transformer whose output layer shares the embedding's weights."""

    def __init__(self, block_size: int, layers: int, heads: int, width: int, dropout: float):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(block_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._initialize)
        for block in self.blocks:  # each block adds two branches to the residual stream; keep its variance level
            nn.init.normal_(block.proj.weight, std=0.02 / math.sqrt(2 * layers))
            nn.init.normal_(block.mlp[2].weight, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.tokens.weight

    @staticmethod
    def _initialize(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids, targets):
        """The mean cross-entropy of predicting `targets` (B, T) from `ids` (B, T)."""
        x = self.dropout(self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, VOCABULARY)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_text() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's top-level modules as two uint8 tensors: 95% to train on, 5% to validate."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    data = torch.frombuffer(bytearray(text.encode("ascii", errors="ignore")), dtype=torch.uint8)
    split = int(0.95 * len(data))
    return data[:split], data[split:]


def sample(data, args, generator):
    """Random windows of the text: inputs and the characters that follow them, both (B, T) int64."""
    starts = torch.randint(len(data) - args.block_size, (args.batch_size,), generator=generator)
    windows = torch.stack([data[s : s + args.block_size + 1] for s in starts.tolist()]).long().to(args.device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model: nn.Module, data, args) -> float:
    """The mean loss over `--eval-batches` batches, the same ones at every call."""
    generator = torch.Generator().manual_seed(1234)
    model.eval()
    batches = [sample(data, args, generator) for _ in range(args.eval_batches)]
    losses = [model(*batch).item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)


def parameter_groups(model: nn.Module, weight_decay: float):
    """Decay matrices, leave biases and norms alone."""
    parameters = list(model.parameters())  # a shared weight is listed once
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """The learning rate's factor: linear up to 1, then a cosine down to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def save(path: Path, **state):
    """Write a checkpoint that is never seen half written."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def parse_args():
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128, help="characters of context")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-batches", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, help="file to save to")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--resume", action="store_true", help="start from --checkpoint's file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint FILE")
    return args


def main():
    """Train, evaluate now and then, and print the final validation loss."""
    args = parse_args()
    torch.manual_seed(args.seed)
    train_data, val_data = load_text()
    batches = torch.Generator().manual_seed(args.seed)
    model = GPT(args.block_size, args.layers, args.heads, args.width, args.dropout).to(args.device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, args.warmup, args.steps))
    first = 1
    if args.resume:
        state = torch.load(args.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        batches.set_state(state["batches"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        first = state["step"] + 1
        print(f"resumed after step {state['step']}")
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(train_data) / 1e6:.2f}M characters"
    )

    seconds = []
    for step in range(first, args.steps + 1):
        started = time.perf_counter()
        loss = model(*sample(train_data, args, batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step == 1:
            print(f"step {step:4d}: train loss {loss.item():.4f}")
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        if step % args.eval_every == 0 and step < args.steps:
            print(f"step {step:4d}: val loss {evaluate(model, val_data, args):.4f}")
        if args.checkpoint and step % args.checkpoint_every == 0:
            save(
                args.checkpoint,
                step=step,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scheduler=scheduler.state_dict(),
                batches=batches.get_state(),
                rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state_all(),
            )
    val_loss = evaluate(model, val_data, args)
    print(f"final: val_loss={val_loss:.4f} ms/step={1e3 * statistics.median(seconds):.1f}")


if __name__ == "__main__":
    main()
