"""A mixture of experts as functions: which experts a token is sent to, and what they make of it."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opt_deus_jax.distributed.sharding import RULES, constrain, partition_spec
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.expert_config import ExpertConfig
from opt_deus_jax.models.products import project, project_groups


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        weights_MK: What the output of each expert that it is sent to weighs, float32.
        expert_MK: The numbers of those experts, all different.
        probabilities_ME: What the router gave each expert, float32.
    """

    weights_MK: Float[Array, "m k"]
    expert_MK: Int[Array, "m k"]
    probabilities_ME: Float[Array, "m e"]

    @property
    def weights_ME(self) -> Float[Array, "m e"]:
        """The weight of every expert; 0 where a token is not sent."""
        return jnp.sum(self.weights_MK[..., None] * self._one_hot_MKE, axis=1)

    @property
    def chosen_ME(self) -> Float[Array, "m e"]:
        """1 where a token is sent, float32."""
        return jnp.sum(self._one_hot_MKE, axis=1)

    @property
    def _one_hot_MKE(self) -> Array:
        return jax.nn.one_hot(self.expert_MK, self.probabilities_ME.shape[-1], dtype=jnp.float32)


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
    weights_MK, expert_MK = jax.lax.top_k(probabilities_ME, experts.per_token)
    if experts.is_normalized:
        weights_MK = weights_MK / jnp.sum(weights_MK, axis=-1, keepdims=True)
    return Routing(weights_MK, expert_MK, probabilities_ME)


def check_experts(implementation: str, experts: ExpertConfig | None) -> None:
    """Refuses a way of applying experts for a network that has none.

    Args:
        implementation: `dense` or `grouped`.
        experts: Those of the network.

    Raises:
        UserError: It is not the default, and would change nothing.
    """
    if experts is None and implementation != "dense":
        raise UserError(
            f"config field training.experts={implementation!r}: the model has no experts; use "
            "training.experts=dense"
        )


def apply_experts(
    x_MD: Float[Array, "m d"],
    routing: Routing,
    block: Mapping[str, Array],
    activation: Callable[[Array], Array],
    implementation: str,
) -> Float[Array, "m d"]:
    """Weighted sum of what the experts' MLPs make of each token; no token is dropped.

    Equals transformers' `MixtralExperts` and `Qwen3MoeExperts`. All shapes are static.

    `dense` applies every expert to every token: `number / per_token` times the products that are
    needed, all of them large, and experts on several devices are equally busy. `grouped` sorts the
    tokens by expert and multiplies each expert's run with its kernels, by `jax.lax.ragged_dot`.
    Only where XLA has grouped products, which it has for TPUs, are these fewer: for a CPU it writes
    every row once for each expert, which takes `per_token` times the products of `dense`.

    Args:
        x_MD: Tokens, normed.
        routing: Where each goes.
        block: `experts_gate_kernel` and `experts_up_kernel` [e, f, d], `experts_down_kernel`
            [e, d, f].
        activation: Of the gate.
        implementation: `dense` or `grouped`; never replaced by the other.

    Returns:
        The dtype of `x_MD`.

    Raises:
        ValueError: The implementation is unknown.
    """
    if implementation == "dense":
        return _apply_all(x_MD, routing.weights_ME, block, activation)
    if implementation == "grouped":
        return _apply_chosen(x_MD, routing, block, activation)
    raise ValueError(f"unknown way to apply experts {implementation!r}")


def _apply_all(
    x_MD: Array,
    weights_ME: Array,
    block: Mapping[str, Array],
    activation: Callable[[Array], Array],
) -> Array:
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


def _apply_chosen(
    x_MD: Array,
    routing: Routing,
    block: Mapping[str, Array],
    activation: Callable[[Array], Array],
) -> Array:
    kernels = tuple(block[f"experts_{name}_kernel"] for name in ("gate", "up", "down"))
    arrays = (x_MD, routing.weights_MK, routing.expert_MK, *kernels)
    apply = functools.partial(_apply_held, activation=activation)
    if jax.sharding.get_abstract_mesh().empty:
        return apply(*arrays, first=0)
    axis = RULES["expert"]
    assert isinstance(axis, str)

    def apply_on_device(*arrays: Array) -> Array:
        held = len(arrays[-1])
        return jax.lax.psum(apply(*arrays, first=jax.lax.axis_index(axis) * held), axis)

    # The compiler cannot cut a sort: each device takes its own tokens, and of them those that are
    # sent to the experts that it has.
    tokens = partition_spec(("batch", "gathered_width"))
    experts = partition_spec(("expert", "expert_mlp", "gathered_width"))
    return jax.shard_map(
        apply_on_device,
        in_specs=(tokens, tokens, tokens, experts, experts, experts),
        out_specs=tokens,
        check_vma=False,  # The kernel for TPUs does not say over which axes its outputs vary.
    )(*arrays)


def _apply_held(
    x_MD: Array,
    weights_MK: Array,
    expert_MK: Array,
    gate_EFD: Array,
    up_EFD: Array,
    down_EDF: Array,
    *,
    first: int | Array,
    activation: Callable[[Array], Array],
) -> Array:
    """What the experts from `first` on make of the tokens, a row for each choice of a token."""
    held, per_token = len(gate_EFD), expert_MK.shape[1]
    place_R = expert_MK.reshape(-1) - first
    # Choices of experts elsewhere come last.
    group_R = jnp.where((place_R >= 0) & (place_R < held), place_R, held)
    order_R = jnp.argsort(group_R, stable=True)
    back_R = jnp.argsort(order_R)
    size_E = jnp.sum(group_R[:, None] == jnp.arange(held)[None], axis=0, dtype=jnp.int32)
    is_held_R1 = (jnp.arange(len(order_R)) < jnp.sum(size_E))[:, None]

    # Whatever stands in the rows of the others, and in their gradients, stays there.
    x_RD = jnp.where(is_held_R1, _spread(per_token, x_MD, order_R, back_R), 0)
    weights_R1 = _permute(weights_MK.reshape(-1, 1), order_R, back_R)
    weights_R1 = jnp.where(is_held_R1, weights_R1, 0).astype(x_MD.dtype)
    gated_RF = activation(project_groups(x_RD, gate_EFD, size_E))
    gated_RF = gated_RF * project_groups(x_RD, up_EFD, size_E)
    # Weighted before the last product: no gradient needs what that makes.
    made_RD = project_groups(gated_RF * weights_R1, down_EDF, size_E)
    made_RD = jnp.where(is_held_R1, made_RD, 0)
    return _sum_choices(per_token, _permute(made_RD, back_R, order_R))


# Transposed, a gather is a scatter, which is slow everywhere; by the inverse it is a gather again.
@jax.custom_vjp
def _permute(x_RD: Array, order_R: Array, back_R: Array) -> Array:
    return x_RD[order_R]


def _permute_forward(x_RD: Array, order_R: Array, back_R: Array) -> tuple[Array, Array]:
    return _permute(x_RD, order_R, back_R), back_R


def _permute_backward(back_R: Array, y_RD: Array) -> tuple[Array, None, None]:
    return y_RD[back_R], None, None


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(per_token: int, x_MD: Array, order_R: Array, back_R: Array) -> Array:
    """A row for each choice of each token."""
    return x_MD[order_R // per_token]


def _spread_forward(
    per_token: int, x_MD: Array, order_R: Array, back_R: Array
) -> tuple[Array, Array]:
    return _spread(per_token, x_MD, order_R, back_R), back_R


def _spread_backward(per_token: int, back_R: Array, y_RD: Array) -> tuple[Array, None, None]:
    return _sum_choices(per_token, y_RD[back_R]), None, None


_spread.defvjp(_spread_forward, _spread_backward)


def _sum_choices(per_token: int, x_RD: Array) -> Array:
    return jnp.sum(x_RD.reshape(-1, per_token, x_RD.shape[1]), axis=1)


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
