"""The same training by transformers and torch; both come with the extra `test`.

python -m experiments.oracles.torch_train OPTIONS takes a step for every batch on the standard
input. OPTIONS is a JSON object: model (a grown folder), trained_layers, optimizer (the fields of
OptimizerConfig; the learning rate is constant), threads, compile.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from opt_deus_jax.reporting.turns import serve_turns


def _adamw(
    parameters: list[torch.nn.Parameter], optimizer: dict[str, Any]
) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [p for p in parameters if (p.ndim > 1) == is_kernel],
            "weight_decay": optimizer["weight_decay"] * is_kernel,
        }
        for is_kernel in (True, False)
    ]
    return torch.optim.AdamW(
        groups,
        lr=optimizer["learning_rate"],
        betas=(optimizer["beta1"], optimizer["beta2"]),
        eps=optimizer["epsilon"],
        fused=True,  # The fastest of its implementations, on CPU too.
    )


def main() -> None:
    """Trains what it is told to."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        options["model"], dtype=torch.float32, attn_implementation="sdpa", use_cache=False
    )
    model.train().requires_grad_(False)
    for layer in options["trained_layers"]:
        model.model.layers[layer].requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _adamw(parameters, options["optimizer"])
    forward = torch.compile(model) if options["compile"] else model

    def step(tokens_BL: np.ndarray) -> float:
        tokens = torch.from_numpy(tokens_BL.astype(np.int64))
        # Straight into the loss: no second reference keeps the logits alive in the backward pass.
        loss = torch.nn.functional.cross_entropy(
            forward(input_ids=tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options["optimizer"]["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve_turns(step)


if __name__ == "__main__":
    main()
