"""Trains Llama of 7 or 70 billion parameters on random tokens: what `scale_plan.py` plans.

An ordinary loop with nothing of ours in it: bfloat16 autocast, blocks computed again on the way back, clipped
gradients, AdamW. The configurations are the published ones of Llama 2, the weights are random.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGURATIONS = {
    "7b": LlamaConfig(use_cache=False),
    "70b": LlamaConfig(
        use_cache=False, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    ),
}  # fmt: skip


def main() -> None:
    """Trains a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=CONFIGURATIONS, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--length", type=int, default=4096)
    args = parser.parse_args()
    model = LlamaForCausalLM(CONFIGURATIONS[args.model])
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(2):
        ids = torch.randint(0, 32000, (args.batch_size, args.length))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    main()
