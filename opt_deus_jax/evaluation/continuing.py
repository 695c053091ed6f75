"""Continuing many prompts with few compiled programs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from opt_deus_jax.distributed.sharding import num_shards
from opt_deus_jax.evaluation.loading import LoadedModel
from opt_deus_jax.models.generation import generate

# Prompts are padded to a multiple of this.
_PROMPT_STEP = 256


def continue_prompts(
    model: LoadedModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    dtype: str = "float32",
    batch_tokens: int = 2048,
    on_done: Callable[[int], Any] = lambda _: None,
) -> list[list[int]]:
    """Continues prompts of any lengths in batches of similar ones.

    Args:
        model: The model.
        prompts: Token ids of each, none empty.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 is greedy.
        top_p: Nucleus sampling.
        dtype: Type of the activations and of the cache.
        batch_tokens: Tokens a batch, prompts and continuations together.
        on_done: Is told how many further prompts are done.

    Returns:
        The new tokens of each prompt, without the one that ended it.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    continuations: list[list[int]] = [[] for _ in prompts]
    shards = num_shards("batch", model.mesh)
    start = 0
    while start < len(order):
        longest = len(prompts[order[start]])
        length = longest + -longest % _PROMPT_STEP
        rows = max(batch_tokens // (length + max_new_tokens) // shards, 1) * shards
        # One row more than there are prompts: the fillers make lengths and numbers recur.
        numbers = order[start : start + max(rows - 1, 1)]
        fillers = max(rows, len(numbers) + 1) - len(numbers)
        fillers += -(len(numbers) + fillers) % shards
        with jax.set_mesh(model.mesh):
            generated = generate(
                model.params,
                [prompts[number] for number in numbers] + [[0] * length] * fillers,
                config=model.config,
                max_new_tokens=max_new_tokens,
                eos_ids=model.tokenizer.eos_ids,
                temperature=temperature,
                top_p=top_p,
                seed=start,
                dtype=dtype,
            )
        for number, continuation in zip(numbers, generated, strict=False):
            continuations[number] = continuation
        start += len(numbers)
        on_done(len(numbers))
    return continuations
