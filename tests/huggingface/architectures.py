"""Architectures of transformers, each as small as its configuration allows, with a batch for one training step."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf

VOCABULARY, LENGTH, ROWS, IMAGE = 64, 8, 2, 32

_SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, d_model=32, n_embd=32, embed_dim=32, dim=32, emb_dim=32, embedding_size=32,
    intermediate_size=48, ffn_dim=48, d_ff=48, n_inner=48, hidden_dim=48, encoder_ffn_dim=48, decoder_ffn_dim=48,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_hidden_layers=2, n_layer=2, n_layers=2,
    num_layers=2, num_decoder_layers=1, encoder_layers=1, decoder_layers=1, num_attention_heads=4, n_head=4, n_heads=4,
    num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4, num_key_value_heads=2, head_dim=8, d_kv=8,
    max_position_embeddings=64, n_positions=64, n_ctx=64, seq_length=64, max_seq_len=64, num_experts=4,
    num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    decoder_start_token_id=0, image_size=IMAGE, patch_size=8, num_channels=3, num_labels=3, use_cache=False,
    sliding_window=4, pooler_hidden_size=32, decoder_vocab_size=VOCABULARY, projection_dim=16, rotary_dim=4,
    return_dict=True,
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One architecture and what it is trained on for a step.

    Attributes:
        name: The `model_type` of transformers.
        family: Decoder, encoder, encoder-decoder, vision, audio, multimodal or series.
        auto: The class that makes the model from its configuration.
        batch: Makes the keyword arguments of one call, from torch's generator.
        changes: To the configuration, besides making it small.
        parts: The same for the configurations inside of it.
        variant: What sets it apart from another one of the same name.
    """

    name: str
    family: str
    auto: Any
    batch: Callable[[torch.Generator], dict[str, Any]]
    changes: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.name} {self.variant}".strip()

    def model(self) -> torch.nn.Module:
        """The model, random, without dropout."""
        config = hf.AutoConfig.for_model(self.name)
        parts = {name: part for name, part in vars(config).items() if isinstance(part, hf.PreTrainedConfig)}
        for name, part in [("", config), *parts.items()]:
            _shrink(part, self.parts.get(name, {}) if name else self.changes)
        return self.auto.from_config(config) if hasattr(self.auto, "from_config") else self.auto(config)


def _shrink(config: Any, changes: dict[str, Any]) -> None:
    known = {name: value for name, value in _SMALL.items() if hasattr(config, name) and name not in changes}
    for name, value in known.items():
        with contextlib.suppress(Exception):  # some names are computed from others, some have other types
            setattr(config, name, value)
    for name, value in changes.items():
        setattr(config, name, value)
    random = ("dropout", "drop_rate", "drop_path", "layerdrop", "jitter", "mask_time_prob", "mask_feature_prob", "drop")
    for name, value in vars(config).items():
        if isinstance(value, float) and any(word in name for word in random):
            setattr(config, name, 0.0)


def _ids(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, length), generator=generator)


def _text(generator: torch.Generator) -> dict[str, Any]:
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _classes(generator: torch.Generator) -> dict[str, Any]:
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}


def _pairs(generator: torch.Generator) -> dict[str, Any]:
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _ids(generator, 6)}


def _pixels(generator: torch.Generator, size: int = IMAGE) -> torch.Tensor:
    return torch.randn(ROWS, 3, size, size, generator=generator)


def _images(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": _pixels(generator), "labels": torch.tensor([0, 2])}


def _large_images(generator: torch.Generator) -> dict[str, Any]:
    return {"pixel_values": _pixels(generator, 64), "labels": torch.tensor([0, 2])}


def _captions(generator: torch.Generator) -> dict[str, Any]:
    ids = _ids(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels(generator)}


def _contrasts(generator: torch.Generator) -> dict[str, Any]:
    return {**_captions(generator), "return_loss": True}


def _sounds(generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(ROWS, 400, generator=generator), "labels": torch.tensor([0, 2])}


def _spectra(generator: torch.Generator) -> dict[str, Any]:
    return {"input_values": torch.randn(ROWS, 32, 16, generator=generator), "labels": torch.tensor([0, 2])}


def _speech(generator: torch.Generator) -> dict[str, Any]:
    return {"input_features": torch.randn(ROWS, 8, 32, generator=generator), "labels": _ids(generator, 6)}


def _speech_frames(generator: torch.Generator) -> dict[str, Any]:
    return {"input_features": torch.randn(ROWS, 32, 8, generator=generator), "labels": _ids(generator, 6)}


def _questions(generator: torch.Generator) -> dict[str, Any]:
    return {**_captions(generator), "labels": torch.rand(ROWS, 3, generator=generator)}


def _described(generator: torch.Generator) -> dict[str, Any]:
    captions = _captions(generator)
    return {**captions, "labels": captions["input_ids"]}


def _future(generator: torch.Generator) -> dict[str, Any]:
    return {
        "past_values": torch.randn(ROWS, 16, 2, generator=generator),
        "future_values": torch.randn(ROWS, 4, 2, generator=generator),
    }


def _many(family: str, auto: Any, batch: Callable, names: str, **changes: Any) -> list[Architecture]:
    return [Architecture(name, family, auto, batch, changes) for name in names.split()]


_DECODERS = (
    "gpt2 gpt_neox gptj gpt_bigcode opt bloom llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 "
    "gemma3_text phi phi3 falcon stablelm starcoder2 olmo olmo2 olmoe cohere granite helium persimmon codegen biogpt "
    "xglm mamba glm glm4 nemotron smollm3 exaone4 openai-gpt ctrl xlnet gpt_oss ernie4_5 arcee seed_oss apertus doge"
)
_ENCODERS = (
    "bert roberta distilbert albert electra deberta deberta-v2 mpnet xlm-roberta camembert convbert funnel layoutlm "
    "mobilebert modernbert nystromformer rembert roformer squeezebert fnet ernie esm xlm flaubert megatron-bert "
    "data2vec-text roberta-prelayernorm eurobert"
)
_ENCODER_DECODERS = "t5 mt5 umt5 bart mbart pegasus marian blenderbot blenderbot-small m2m_100 longt5 mvp plbart"
_VISION = "vit beit dinov2 dinov2_with_registers vit_msn data2vec-vision ijepa"
_CONTRASTS = "clip chinese_clip altclip"
_CONVOLUTIONS = dict(depths=[1, 1], hidden_sizes=[8, 16], num_stages=2)
_WAVES = dict(
    conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8], num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, classifier_proj_size=16,
)  # fmt: skip
_TOWERS = {"text_config": {}, "vision_config": {}}

ARCHITECTURES = [
    *_many("decoder", hf.AutoModelForCausalLM, _text, _DECODERS),
    Architecture("gpt_neo", "decoder", hf.AutoModelForCausalLM, _text, dict(
        attention_types=[[["global", "local"], 1]], attention_layers=["global", "local"], window_size=4)),
    Architecture("deepseek_v3", "decoder", hf.AutoModelForCausalLM, _text, dict(
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_group=2, topk_group=1, first_k_dense_replace=1)),
    Architecture("mamba2", "decoder", hf.AutoModelForCausalLM, _text, dict(
        num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=4)),
    Architecture("rwkv", "decoder", hf.AutoModelForCausalLM, _text, dict(attention_hidden_size=32, context_length=64)),
    *_many("encoder", hf.AutoModelForSequenceClassification, _classes, _ENCODERS),
    *[Architecture(name, "encoder", hf.AutoModelForMaskedLM, _text, variant="(masked LM)")
      for name in ("deberta", "deberta-v2")],
    *[Architecture(name, "decoder", hf.AutoModelForCausalLM, _text, dict(_experts_implementation="batched_mm"),
                   variant="(batched_mm experts)") for name in "mixtral qwen2_moe qwen3_moe olmoe".split()],
    Architecture("big_bird", "encoder", hf.AutoModelForSequenceClassification, _classes,
                 dict(attention_type="original_full")),
    Architecture("longformer", "encoder", hf.AutoModelForSequenceClassification, _classes,
                 dict(attention_window=[4, 4])),
    Architecture("ibert", "encoder", hf.AutoModelForSequenceClassification, _classes),
    *_many("encoder-decoder", hf.AutoModelForSeq2SeqLM, _pairs, _ENCODER_DECODERS, decoder_start_token_id=0),
    Architecture("fsmt", "encoder-decoder", hf.AutoModelForSeq2SeqLM, _text, dict(
        src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY)),
    Architecture("led", "encoder-decoder", hf.AutoModelForSeq2SeqLM, _pairs, dict(attention_window=[4])),
    Architecture("prophetnet", "encoder-decoder", hf.AutoModelForSeq2SeqLM, _pairs, dict(
        num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4, num_decoder_attention_heads=4)),
    Architecture("switch_transformers", "encoder-decoder", hf.AutoModelForSeq2SeqLM, _pairs, dict(
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0)),
    *_many("vision", hf.AutoModelForImageClassification, _images, _VISION),
    *_many("vision", hf.AutoModelForImageClassification, _images, "swin swinv2",
           embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, patch_size=4),
    *_many("vision", hf.AutoModelForImageClassification, _large_images, "resnet regnet", embedding_size=8,
           layer_type="basic", groups_width=4, **_CONVOLUTIONS),
    *_many("vision", hf.AutoModelForImageClassification, _large_images, "convnext convnextv2", **_CONVOLUTIONS),
    *_many("vision", hf.AutoModelForImageClassification, _large_images, "mobilenet_v1 mobilenet_v2",
           depth_multiplier=0.25, min_depth=4, image_size=64),
    Architecture("deit", "vision", hf.DeiTForImageClassification, _images),
    Architecture("hiera", "vision", hf.AutoModelForImageClassification, _images, dict(
        image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2], num_query_pool=1,
        masked_unit_size=[4, 4], masked_unit_attention=[True, False])),
    Architecture("segformer", "vision", hf.AutoModelForImageClassification, _large_images, dict(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2])),
    Architecture("poolformer", "vision", hf.AutoModelForImageClassification, _large_images, dict(
        depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1])),
    Architecture("focalnet", "vision", hf.AutoModelForImageClassification, _images, dict(
        embed_dim=8, depths=[1, 1], hidden_sizes=[8, 16], patch_size=4, focal_levels=[1, 1], focal_windows=[3, 3])),
    Architecture("bit", "vision", hf.AutoModelForImageClassification, _large_images,
                 dict(embedding_size=32, num_groups=4, depths=[1, 1], hidden_sizes=[32, 64])),
    Architecture("efficientnet", "vision", hf.AutoModelForImageClassification, _images, dict(
        width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320)),
    *_many("audio", hf.AutoModelForAudioClassification, _sounds, "wav2vec2 hubert wavlm unispeech unispeech-sat",
           **_WAVES),
    Architecture("audio-spectrogram-transformer", "audio", hf.AutoModelForAudioClassification, _spectra, dict(
        max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)),
    Architecture("whisper", "audio", hf.AutoModelForSpeechSeq2Seq, _speech, dict(
        num_mel_bins=8, max_source_positions=16, max_target_positions=16)),
    Architecture("speech_to_text", "audio", hf.AutoModelForSpeechSeq2Seq, _speech_frames, dict(
        input_feat_per_channel=8, input_channels=1, conv_channels=16, max_source_positions=32,
        max_target_positions=16)),
    *[Architecture(name, "multimodal", hf.AutoModel, _contrasts, {}, _TOWERS) for name in _CONTRASTS.split()],
    Architecture("siglip", "multimodal", hf.AutoModel, _contrasts, {}, {
        "text_config": {"projection_size": 32}, "vision_config": {}}),
    Architecture("vilt", "multimodal", hf.AutoModelForVisualQuestionAnswering, _questions),
    Architecture("git", "multimodal", hf.AutoModelForCausalLM, _described),
    Architecture("patchtst", "series", hf.PatchTSTForPrediction, _future, dict(
        num_input_channels=2, context_length=16, prediction_length=4, patch_length=4, patch_stride=4)),
    Architecture("patchtsmixer", "series", hf.PatchTSMixerForPrediction, _future, dict(
        num_input_channels=2, context_length=16, prediction_length=4, patch_length=4, patch_stride=4)),
]  # fmt: skip
