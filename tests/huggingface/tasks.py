"""Small random models, one for each task, and batches that they can learn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

VOCABULARY, LENGTH, EXAMPLES = 64, 12, 64


@dataclass(frozen=True)
class Task:
    """A model and what it is trained on.

    Attributes:
        model: Makes the model, from torch's seed.
        example: Makes one example of the data, as the collator gets it.
    """

    model: Callable[[], torch.nn.Module]
    example: Callable[[torch.Generator], dict[str, torch.Tensor]]

    def data(self, count: int = EXAMPLES) -> list[dict[str, torch.Tensor]]:
        """The same examples every time."""
        generator = torch.Generator().manual_seed(1)
        return [self.example(generator) for _ in range(count)]


def words(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    """Tokens of which each is the one before it plus a small number."""
    steps = torch.randint(1, 4, (length,), generator=generator)
    return 3 + (torch.randint(0, VOCABULARY, (), generator=generator) + steps.cumsum(0)) % (VOCABULARY - 3)


def _text(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = words(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _labelled(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = words(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def _tagged(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = words(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}


def _asked(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = words(generator)
    start = torch.randint(0, LENGTH - 2, (), generator=generator)
    return {"input_ids": ids, "start_positions": start, "end_positions": start + 1}


def _translated(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = words(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)[:8]}


def _seen(generator: torch.Generator) -> dict[str, torch.Tensor]:
    label = torch.randint(0, 3, (), generator=generator)
    return {"pixel_values": torch.randn(3, 16, 16, generator=generator) + label, "labels": label}


def _heard(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(8, 32, generator=generator), "labels": words(generator, 6)}


_BERT = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def gpt2(**changes: Any) -> torch.nn.Module:
    """GPT-2, without dropout unless it is asked for."""
    plain = dict(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**plain, **changes}))


def bert(kind: type = hf.BertForSequenceClassification, **changes: Any) -> torch.nn.Module:
    """BERT with some head, without dropout unless it is asked for."""
    return kind(hf.BertConfig(**{**_BERT, **changes}))


def _t5() -> torch.nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def _vit() -> torch.nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _whisper() -> torch.nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, dropout=0.0,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            decoder_start_token_id=2,
        )
    )  # fmt: skip


def llama(**changes: Any) -> torch.nn.Module:
    """Llama with grouped keys."""
    plain = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**plain, **changes}))


def llama_with_lora() -> torch.nn.Module:
    """Llama, frozen, with adapters."""
    import peft

    adapters = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(), adapters)


TASKS = {
    "gpt2": Task(gpt2, _text),
    "bert": Task(bert, _labelled),
    "bert tokens": Task(lambda: bert(hf.BertForTokenClassification), _tagged),
    "bert answers": Task(lambda: bert(hf.BertForQuestionAnswering, num_labels=2), _asked),
    "t5": Task(_t5, _translated),
    "vit": Task(_vit, _seen),
    "whisper": Task(_whisper, _heard),
    "llama with lora": Task(llama_with_lora, _text),
}
