"""GPT-2's training step written by hand in JAX: what a person would write who starts in JAX.

Same weights, loss and AdamW as `models.gpt2`, so that the losses agree and only the way to XLA differs.
Shapes: B batch, T length, C width, N heads, H = C / N, V vocabulary.
"""

import jax
import jax.numpy as jnp
import torch

LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-4, 0.9, 0.999, 1e-8, 0.01  # torch.optim.AdamW's defaults


def parameters(model: torch.nn.Module) -> dict:
    """The weights of a `GPT2LMHeadModel` as a tree of arrays; the head is the embedding."""

    def take(name: str):
        return jnp.array(model.get_parameter(f"transformer.{name}").detach().numpy())

    def pair(name: str):
        return take(f"{name}.weight"), take(f"{name}.bias")

    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    blocks = [{name: pair(f"h.{i}.{name}") for name in layers} for i in range(model.config.n_layer)]
    return {"tokens": take("wte.weight"), "positions": take("wpe.weight"), "blocks": blocks, "norm": pair("ln_f")}


def _norm(x, weights):
    scale, bias = weights
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def _linear(x, weights):
    kernel, bias = weights
    return x @ kernel + bias


def _attention(x, block, heads: int):
    batch, length, width = x.shape
    qkv = _linear(x, block["attn.c_attn"]).reshape(batch, length, 3, heads, width // heads)
    y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)  # (B, T, N, H)
    return _linear(y.reshape(batch, length, width), block["attn.c_proj"])


def loss(weights: dict, ids, heads: int):
    """The mean cross-entropy of predicting each token of `ids` (B, T) from those before it."""
    x = weights["tokens"][ids] + weights["positions"][: ids.shape[1]]  # (B, T, C)
    for block in weights["blocks"]:
        x = x + _attention(_norm(x, block["ln_1"]), block, heads)
        hidden = jax.nn.gelu(_linear(_norm(x, block["ln_2"]), block["mlp.c_fc"]), approximate=True)
        x = x + _linear(hidden, block["mlp.c_proj"])
    logits = _norm(x, weights["norm"])[:, :-1] @ weights["tokens"].T  # (B, T - 1, V)
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, ids[:, 1:, None], axis=-1).mean()


def make_step(heads: int):
    """Returns the jitted `(state, ids) -> (state, loss)`; the state is donated."""

    def step(state, ids):
        weights, first, second, count = state
        value, gradients = jax.value_and_grad(loss)(weights, ids, heads)
        count = count + 1
        scale1, scale2 = 1 - BETA1**count, 1 - BETA2**count
        first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, gradients)
        second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, gradients)

        def update(p, m, v):
            p = p * (1 - LEARNING_RATE * WEIGHT_DECAY)
            return p - LEARNING_RATE / scale1 * m / (jnp.sqrt(v / scale2) + EPSILON)

        return (jax.tree.map(update, weights, first, second), first, second, count), value

    return jax.jit(step, donate_argnums=0)


def initial_state(model: torch.nn.Module):
    """The state of step 0: weights, AdamW's two moments, and the count of steps."""
    weights = parameters(model)
    return weights, jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights), jnp.zeros(())
