"""An ordinary script for several processes: DDP, its own sampler, accumulation, clipping, metrics. Knows nothing of us.

torchrun --standalone --nproc-per-node 2 ddp_script.py MODEL OUT [uneven] [wide]
"""

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WIDTH = 128 if "wide" in sys.argv[3:] else 32  # at the larger, weights have enough elements to be divided


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.down = nn.Linear(8 * 64, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.down(F.relu(self.up(F.relu(self.norm(self.first(x))).flatten(1))))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_embd=WIDTH, n_head=2, n_positions=16, vocab_size=64, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=2 * WIDTH, vocab_size=64,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def loss_of(model, x, y):
    result = model(x) if x.is_floating_point() else model(input_ids=x).logits.flatten(0, 1)
    return F.cross_entropy(result, y.flatten(), reduction="sum") / y.numel()  # of the local batch


def main(kind: str, out: str, uneven: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(5)
    if kind == "cnn":
        x, y = torch.randn(320, 1, 8, 8, generator=generator), torch.randint(0, 10, (320,), generator=generator)
    else:
        x = torch.randint(1, 64, (320, 16), generator=generator)
        y = x.roll(-1, 1)
    data = TensorDataset(x, y)
    torch.manual_seed(rank)  # DDP gives all rank 0's weights
    model = DistributedDataParallel({"cnn": Convolutions, "gpt2": gpt2, "bert": bert}[kind]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    sampler = DistributedSampler(data)
    seen = []
    steps = 0
    for epoch in range(8):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(DataLoader(data, batch_size=8, sampler=sampler)):
            if uneven and steps == 5 and rank == 1:
                x, y = x[:3], y[:3]
            if index % 2 == 0:
                with model.no_sync():
                    loss = loss_of(model, x, y) / 2
                    loss.backward()
                seen.append(loss.item())
                continue
            loss = loss_of(model, x, y) / 2
            loss.backward()
            if rank == 0 and index % 3 == 0:
                print(f"rank 0 alone looks: {loss.item():.3f}", flush=True)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            steps += 1
            total = loss.detach().clone()
            dist.all_reduce(total)
            gathered = [torch.zeros(()) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, loss.detach())
            assert abs(sum(gathered).item() - total.item()) < 1e-12
            seen += [loss.item(), total.item(), norm.item()]
            if steps >= 24:
                break
        model.eval()
        with torch.no_grad():
            seen.append(loss_of(model, x, y).item())
            if rank == 0:  # torch's wrapper would wait for the others here, so a script asks the module inside
                seen.append(loss_of(model.module, x[:2], y[:2]).item())
        model.train()
        if steps >= 24:
            break
    seen += [tensor.norm().item() for tensor in model.state_dict().values() if tensor.is_floating_point()]
    with open(f"{out}.{rank}.json", "w") as file:
        json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "uneven" in sys.argv[3:])
