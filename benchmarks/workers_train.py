"""An ordinary DDP script that times its own steps: what `workers.py` runs under torchrun and under our launcher."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WARM_UP, STEPS = 12, 40


def gpt() -> tuple[nn.Module, int]:
    """A GPT-2 of 4 layers, 256 wide, and the rows of a worker's batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=4, n_embd=256, n_head=4, n_positions=128, vocab_size=2048, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config), 4


def mlp() -> tuple[nn.Module, int]:
    """A multilayer perceptron of 3 million parameters, and the rows of a worker's batch."""
    layers = [nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(1024, 512)), 64


def main() -> None:
    """Trains, and writes the median step of this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("gpt", "mlp"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    inner, rows = {"gpt": gpt, "mlp": mlp}[args.model]()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    times_s = []
    for step in range(WARM_UP + STEPS):
        start_s = time.perf_counter()
        if args.model == "gpt":
            ids = torch.randint(0, 2048, (rows, 128))
            loss = model(input_ids=ids, labels=ids).loss
        else:
            x = torch.randn(rows, 512)
            loss = F.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step >= WARM_UP:
            times_s.append(time.perf_counter() - start_s)
    loss.item()
    out = {"rows": rows, "median_step_s": statistics.median(times_s)}
    (args.out / f"{dist.get_rank()}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
