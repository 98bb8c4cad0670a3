"""Trains one of the models that the original's table lists, on random tokens: what `tested_models.py` plans.

    python benchmarks/tested_models_train.py --model gpt2 --length 128 --batch-size 8 --steps 3

An ordinary loop, with nothing of ours in it: automatic mixed precision in float16, a scaled loss, clipped gradients,
AdamW. The configurations are the published ones, dropout included, and the weights are random.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers

# The model's class, its configuration's, and where the published configuration is not the class's default.
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_BART = {"attention_dropout": 0.1, "activation_dropout": 0.1}
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert-base-v2": (
        "AlbertForMaskedLM",
        "AlbertConfig",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},  # and no dropout
    ),
    "bert-base-uncased": ("BertForMaskedLM", "BertConfig", {}),
    "camembert-base": ("CamembertForMaskedLM", "CamembertConfig", {**_ROBERTA, "vocab_size": 32005}),
    "distilbert-base-uncased": ("DistilBertForMaskedLM", "DistilBertConfig", {}),
    "distilgpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 6}),
    "distilroberta-base": ("RobertaForMaskedLM", "RobertaConfig", {**_ROBERTA, "num_hidden_layers": 6}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "microsoft/deberta-base": (
        "DebertaForMaskedLM",
        "DebertaConfig",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "roberta-base": ("RobertaForMaskedLM", "RobertaConfig", _ROBERTA),
    "facebook/bart-base": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_BART, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
            "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
        },
    ),
    "facebook/bart-large": ("BartForConditionalGeneration", "BartConfig", _BART),
    "xlm-roberta-base": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", {**_ROBERTA, "vocab_size": 250002}),
    "xlnet-base-cased": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072},
    ),
}  # fmt: skip


def built(name: str) -> torch.nn.Module:
    """A model with the published configuration and random weights."""
    model_class, config_class, changes = _MODELS[name]
    build: Callable[..., torch.nn.Module] = getattr(transformers, model_class)
    return build(getattr(transformers, config_class)(**changes))


def main() -> None:
    """Trains, and prints the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=_MODELS, default="gpt2")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument(
        "--target-length", type=int, help="tokens of a row's labels; as many as of the row if not given"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = built(args.model).train()
    vocabulary = model.config.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(args.steps):
        tokens = torch.randint(vocabulary, (args.batch_size, args.length))
        labels = torch.randint(vocabulary, (args.batch_size, args.target_length or args.length))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
