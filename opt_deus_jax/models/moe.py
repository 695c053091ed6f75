"""A mixture of experts as functions: which experts a token is sent to, and what they make of it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opt_deus_jax.distributed.sharding import constrain
from opt_deus_jax.models.expert_config import ExpertConfig
from opt_deus_jax.models.products import project


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        weights_ME: What each expert's output weighs, float32; 0 where a token is not sent.
        chosen_ME: 1 where it is sent.
        probabilities_ME: What the router gave each expert, float32.
    """

    weights_ME: Float[Array, "m e"]
    chosen_ME: Float[Array, "m e"]
    probabilities_ME: Float[Array, "m e"]


class RouterLoad(NamedTuple):
    """What experts were given, summed over tokens and layers.

    Attributes:
        chosen_E: Tokens sent to each.
        probability_E: The router's probabilities of each.
    """

    chosen_E: Float[Array, " e"]
    probability_E: Float[Array, " e"]


def route(
    x_MD: Float[Array, "m d"], router_ED: Float[Array, "e d"], experts: ExpertConfig
) -> Routing:
    """Sends each token to the experts of which the router thinks most.

    Equals transformers' `MixtralTopKRouter` and `Qwen3MoeTopKRouter`.

    Args:
        x_MD: Tokens, normed.
        router_ED: The router's rows.
        experts: How many are chosen, and whether their weights are normalised.

    Returns:
        The choice.
    """
    logits_ME = project(x_MD, router_ED).astype(jnp.float32)
    probabilities_ME = jax.nn.softmax(logits_ME, axis=-1)
    weights_MK, index_MK = jax.lax.top_k(probabilities_ME, experts.per_token)
    if experts.is_normalized:
        weights_MK = weights_MK / jnp.sum(weights_MK, axis=-1, keepdims=True)
    one_hot_MKE = jax.nn.one_hot(index_MK, experts.number, dtype=jnp.float32)
    weights_ME = jnp.sum(weights_MK[..., None] * one_hot_MKE, axis=1)
    return Routing(weights_ME, jnp.sum(one_hot_MKE, axis=1), probabilities_ME)


def apply_experts(
    x_MD: Float[Array, "m d"],
    weights_ME: Float[Array, "m e"],
    block: Mapping[str, Array],
    activation: Callable[[Array], Array],
) -> Float[Array, "m d"]:
    """Weighted sum of the experts' MLPs, every one of them applied to every token.

    No token is dropped, every product has a static shape, and experts on several devices are
    equally busy; for this, `number / per_token` times the products are made that are needed.

    Args:
        x_MD: Tokens, normed.
        weights_ME: Of each expert's output, as from `route`.
        block: `experts_gate_kernel` and `experts_up_kernel` [e, f, d], `experts_down_kernel`
            [e, d, f].
        activation: Of the gate.

    Returns:
        The dtype of `x_MD`.
    """
    number, inner, width = block["experts_gate_kernel"].shape

    def read(name: str) -> Array:
        # As one kernel with the neurons of all experts.
        kernel_FD = block[f"experts_{name}_kernel"].reshape(number * inner, width)
        return project(x_MD, kernel_FD).reshape(-1, number, inner)

    gated_MEF = activation(read("gate")) * read("up")
    # Weighted before the last product: that then also sums over experts.
    weighted_MEF = gated_MEF * weights_ME[..., None].astype(gated_MEF.dtype)
    weighted_MEF = constrain(weighted_MEF, "batch", "expert", "expert_mlp")
    down_DF = jnp.moveaxis(block["experts_down_kernel"], 0, 1).reshape(width, -1)
    return project(weighted_MEF.reshape(-1, number * inner), down_DF)


def sum_load(routing: Routing, is_real_M: Bool[Array, " m"] | None) -> RouterLoad:
    """Sums a layer's choices up.

    Args:
        routing: From `route`.
        is_real_M: Which tokens count; None for all.

    Returns:
        The load; loads of layers are added.
    """
    real_M1 = 1.0 if is_real_M is None else is_real_M[:, None].astype(jnp.float32)
    chosen_ME = jax.lax.stop_gradient(routing.chosen_ME)
    return RouterLoad(
        jnp.sum(chosen_ME * real_M1, axis=0), jnp.sum(routing.probabilities_ME * real_M1, axis=0)
    )


def no_load(experts: ExpertConfig) -> RouterLoad:
    """The load of no layer."""
    zeros_E = jnp.zeros((experts.number,), jnp.float32)
    return RouterLoad(zeros_E, zeros_E)


def balance_loss(load: RouterLoad, experts: ExpertConfig) -> Float[Array, ""]:
    """How unevenly experts are used: `per_token` where they are used evenly, more otherwise.

    Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, over all layers together; equals
    transformers' `load_balancing_loss_func`.

    Args:
        load: Summed over all layers with experts.
        experts: Their configuration.

    Returns:
        A float32 scalar.
    """
    # A token in a layer makes `per_token` choices.
    tokens = jnp.maximum(jnp.sum(load.chosen_E) / experts.per_token, 1)
    return experts.number * jnp.sum((load.chosen_E / tokens) * (load.probability_E / tokens))
