"""Parameters, FLOPs and memory of a network, from its shape and what of it is trained."""

import dataclasses
from collections.abc import Mapping, Sequence

from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.models.model_config import ModelConfig
from opt_deus_jax.models.params import block_size, block_specs, outer_size, outer_specs

# The kernel that ends the block.
_LAST = ("down_kernel", "experts_down_kernel")


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a network takes.

    FLOPs are those of the matrix products, a token, where a multiply-add is two. Of experts those
    that a token is sent to are counted, the others apart. Attention counts
    every pair of tokens of a sequence, the masked half included, as utilisation is usually stated
    (PaLM, arXiv 2204.02311, appendix B), and where a layer has a window, as many pairs a token as
    that is wide. Of long sequences `reference` leaves out up to three
    eighths of the pairs, `cudnn` and `splash` nearly half.

    Attributes:
        parameters: All parameters.
        active_parameters: Those that a token meets: of experts the chosen ones.
        trained_parameters: Those that are trained.
        forward_flops: FLOPs a token of a forward pass.
        backward_flops: FLOPs a token of what the gradients of the trained parameters need: each
            trained kernel's own gradient, and the gradients of activations from the loss down to
            the lowest trained parameter. A `lax.scan` treats its lowest block like the others, so
            what runs has up to one block's gradients of activations more, where only a part of the
            lowest trained block is trained.
        recomputed_flops: FLOPs a token that rematerialisation repeats in the backward pass; no
            part of the other two.
        idle_expert_flops: FLOPs a token of products with experts that it is not sent to, which
            `training.experts=dense` makes in all three; `grouped` makes none (on a CPU, where XLA
            has no grouped product, more than `dense`). No part of the other three.
        training_bytes: Memory of training beyond activations: frozen parameters, float32 masters,
            gradients and both AdamW moments of the trained ones.
    """

    parameters: int
    active_parameters: int
    trained_parameters: int
    forward_flops: int
    backward_flops: int
    recomputed_flops: int
    idle_expert_flops: int
    training_bytes: int

    @property
    def model_flops(self) -> int:
        """FLOPs a token that training cannot do without."""
        return self.forward_flops + self.backward_flops


def _active_sizes(config: ModelConfig, kind: LayerKind) -> dict[str, int]:
    """How many elements of each parameter a token meets."""
    sizes = {}
    for name, spec in block_specs(config, kind).items():
        sizes[name] = spec.size
        if spec.logical_axes[0] == "expert":
            assert config.experts is not None
            sizes[name] = spec.size // config.experts.number * config.experts.per_token
    return sizes


def _kernel_flops(config: ModelConfig, kind: LayerKind) -> dict[str, int]:
    sizes = _active_sizes(config, kind)
    return {name: 2 * size for name, size in sizes.items() if name.endswith("_kernel")}


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which gradients of a block's activations are needed for what is trained at or below them."""

    normed: bool
    query: bool
    key: bool
    value: bool
    attended: bool
    mlp_normed: bool
    gated: bool


def _wanted(names: frozenset[str], has_trained_below: bool) -> _Wanted:
    def trains(projection: str) -> bool:
        return any(f"{projection}_{part}" in names for part in ("kernel", "bias", "norm"))

    normed = has_trained_below or "input_norm" in names
    query, key, value = (normed or trains(name) for name in ("query", "key", "value"))
    attended = query or key or value
    mlp_normed = attended or trains("output") or "attention_output_norm" in names
    mlp_normed = mlp_normed or "post_attention_norm" in names
    gates = ("gate", "up", "router", "experts_gate", "experts_up")
    gated = mlp_normed or any(map(trains, gates))
    return _Wanted(normed, query, key, value, attended, mlp_normed, gated)


def _block_backward(
    kernel: Mapping[str, int], names: frozenset[str], wanted: _Wanted, attention_product: int
) -> int:
    total = sum(flops for name, flops in kernel.items() if name in names)
    readers = ("gate_kernel", "up_kernel", "router_kernel")
    expert_readers = ("experts_gate_kernel", "experts_up_kernel")
    passed = {
        **dict.fromkeys(("query_kernel", "key_kernel", "value_kernel"), wanted.normed),
        **dict.fromkeys((*readers, *expert_readers), wanted.mlp_normed),
        "output_kernel": wanted.attended,
        **dict.fromkeys(_LAST, wanted.gated),
    }
    total += sum(flops for name, flops in kernel.items() if passed[name])
    # Gradients of the attention weights, and of what they are made from and applied to.
    products = (wanted.query or wanted.key) + wanted.query + wanted.key + wanted.value
    return total + products * attention_product


def _block_recomputed(
    config: ModelConfig,
    kernel: Mapping[str, int],
    names: frozenset[str],
    wanted: _Wanted,
    attention_product: int,
    remat: str,
) -> int:
    if remat == "matmuls":
        # What the weights are applied to is stored, the weights are not, nor what they sum to.
        return attention_product * (wanted.attended or "output_kernel" in names)
    is_in_backward = wanted.gated or not names.isdisjoint((*_LAST, "mlp_output_norm"))
    if remat == "block" and is_in_backward:
        # No gradient needs the product that ends the block, unless a norm follows it.
        ends_with_norm = "mlp_output_norm" in config.facts.norms
        last = 0 if ends_with_norm else sum(kernel.get(name, 0) for name in _LAST)
        return sum(kernel.values()) - last + 2 * attention_product
    return 0


def _all_flops(
    config: ModelConfig,
    trained_outer: frozenset[str],
    trained_blocks: Sequence[frozenset[str]],
    sequence_length: int,
    remat: str,
) -> tuple[int, int, int]:
    """FLOPs a token: forward, backward and recomputed."""
    kinds = config.kinds_of(len(trained_blocks))
    kernels_of = {kind: _kernel_flops(config, kind) for kind in set(kinds)}
    products = [
        2
        * min(sequence_length, kind.window or sequence_length)
        * config.num_heads
        * config.head_dim
        for kind in kinds
    ]
    head = 2 * config.vocabulary_size * config.width
    has_trained_below = "embedding" in trained_outer
    backward = recomputed = 0
    for names, kind, product in zip(trained_blocks, kinds, products, strict=True):
        wanted, kernel = _wanted(names, has_trained_below), kernels_of[kind]
        backward += _block_backward(kernel, names, wanted, product)
        recomputed += _block_recomputed(config, kernel, names, wanted, product, remat)
        has_trained_below = has_trained_below or bool(names)
    head_is_trained = ("embedding" if config.tied_embeddings else "head") in trained_outer
    backward += head * (head_is_trained + (has_trained_below or "final_norm" in trained_outer))
    kernels = sum(sum(kernels_of[kind].values()) for kind in kinds)
    return kernels + 2 * sum(products) + head, backward, recomputed


def _to_all_experts(config: ModelConfig) -> ModelConfig:
    if config.experts is None:
        return config
    experts = dataclasses.replace(config.experts, per_token=config.experts.number)
    return dataclasses.replace(config, experts=experts)


def count_costs(
    config: ModelConfig,
    trained_outer: frozenset[str],
    trained_blocks: Sequence[frozenset[str]],
    *,
    sequence_length: int,
    frozen_bytes: int,
    remat: str = "none",
    experts: str = "dense",
) -> Costs:
    """Counts exactly.

    Args:
        config: The network; its own depth is not used where all layers are of one kind.
        trained_outer: The trained parameters outside the blocks, of `outer_specs`; a tied
            embedding is both ends of the network.
        trained_blocks: For every layer from the bottom up, the trained parameters of its block, of
            `block_specs`.
        sequence_length: Tokens a sequence.
        frozen_bytes: Bytes a frozen parameter.
        remat: none, matmuls or block, as `training.remat`.
        experts: dense or grouped, as `training.experts`.

    Returns:
        The counts.
    """
    outer, kinds = outer_specs(config), config.kinds_of(len(trained_blocks))
    specs_of = {kind: block_specs(config, kind) for kind in set(kinds)}
    parameters = sum(block_size(config, kind) for kind in kinds) + outer_size(config)
    active = sum(sum(_active_sizes(config, kind).values()) for kind in kinds) + outer_size(config)
    trained = sum(outer[name].size for name in trained_outer)
    for names, kind in zip(trained_blocks, kinds, strict=True):
        trained += sum(specs_of[kind][name].size for name in names)
    chosen, every = (
        _all_flops(network, trained_outer, trained_blocks, sequence_length, remat)
        for network in (config, _to_all_experts(config))
    )
    forward, backward, recomputed = chosen
    return Costs(
        parameters=parameters,
        active_parameters=active,
        trained_parameters=trained,
        forward_flops=forward,
        backward_flops=backward,
        recomputed_flops=recomputed,
        idle_expert_flops=sum(every) - sum(chosen) if experts == "dense" else 0,
        training_bytes=(parameters - trained) * frozen_bytes + trained * 16,
    )
