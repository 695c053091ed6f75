"""What is written down about a grown model: its manifest, its card, what it was made from."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from opt_deus_jax.checkpoints.checksum import json_checksum
from opt_deus_jax.checkpoints.hf import combine_hashes
from opt_deus_jax.checkpoints.manifest import Manifest, software_versions
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.upscaling.fusion import transport_epsilon
from opt_deus_jax.upscaling.grown_tensors import ExpansionPlan
from opt_deus_jax.upscaling.identity import IdentityReport
from opt_deus_jax.upscaling.learned import Learned


def _options(plan: ExpansionPlan) -> dict[str, Any]:
    options: dict[str, Any] = dataclasses.asdict(plan.method)
    options |= {"num_new_layers": sum(layer.is_new for layer in plan.layers)}
    if plan.method.weights == "transport":
        options["transport"] = plan.upscale.transport
        if plan.upscale.transport in ("reference", "barycentric"):
            options["epsilon"] = transport_epsilon(plan.upscale.transport, plan.upscale.epsilon)
        elif plan.upscale.epsilon is not None:
            options["epsilon"] = plan.upscale.epsilon
    if plan.method.weights in ("transport", "average"):
        options["fusion"] = plan.upscale.fusion
    if plan.method.weights in ("random", "predicted"):
        options["seed"] = plan.upscale.seed
    if plan.method.weights == "predicted":
        options["lesa_norms"] = plan.upscale.lesa_norms
    return options


def model_card(name: str, plan: ExpansionPlan, identity: IdentityReport) -> str:
    """The README.md of a grown model.

    Args:
        name: What the user called the base.
        plan: What was made of it.
        identity: How far it is from its base.

    Returns:
        Markdown.
    """
    new = [origin.depth for origin in plan.layers if origin.is_new]
    exact = (
        "computes exactly what its base computes"
        if identity.bit_identical
        else (f"differs from its base by {identity.mean_divergence:.4f} nats (mean KL)")
    )
    return (
        f"---\nlibrary_name: transformers\ntags: [depth-up-scaling, opt_deus_jax]\n---\n\n"
        f"# {Path(name).name}, grown to {len(plan.layers)} layers\n\n"
        f"Made by [opt_deus_jax](https://arxiv.org/abs/2508.08011) from `{Path(name).name}` "
        f"({plan.config.num_layers} layers) with method `{plan.upscale.method}`.\n"
        f"New layers: {', '.join(map(str, new)) or 'none'}.\n\n"
        f"Right after expansion the model {exact} ({identity.tokens} tokens compared). "
        "How it was made stands in `upscale_manifest.json`. The licence is that of the base.\n"
    )


def made_from(
    plan: ExpansionPlan, source: CheckpointSource, max_shard_bytes: int
) -> dict[str, Any]:
    """All that the written tensors depend on; the base's numbers are hashed as they are read.

    Args:
        plan: What is made.
        source: The base.
        max_shard_bytes: Size above which safetensors are split.

    Returns:
        JSON, of which a change makes a partial folder worthless.
    """
    tensors = {name: [info.shape, info.dtype.name] for name, info in source.tensors.items()}
    return {
        "base": json_checksum([source.hf_config, tensors]),
        "upscale": dataclasses.asdict(plan.upscale),
        "max_shard_bytes": max_shard_bytes,
        "versions": software_versions(),
    }


def expansion_manifest(
    source: CheckpointSource, plan: ExpansionPlan, learned: Learned, identity: IdentityReport
) -> Manifest:
    """The manifest of a grown model.

    Args:
        source: The base.
        plan: What was made of it.
        learned: What was learned by making it.
        identity: How far it is from its base.

    Returns:
        The manifest.
    """
    base: dict[str, Any] = {
        "name": Path(source.name).name,
        "num_layers": plan.config.num_layers,
        "sha256": combine_hashes(learned.base),
    }
    if tokenizer_json := source.side_files.get("tokenizer.json"):
        base["tokenizer_sha256"] = hashlib.sha256(tokenizer_json).hexdigest()
    return Manifest(
        method=plan.upscale.method,
        options=_options(plan),
        trained=plan.method.trained,
        layers=tuple(dataclasses.asdict(layer) for layer in plan.layers),
        base=base,
        identity=dataclasses.asdict(identity),
        diagnostics=tuple(
            {
                "depth": depth,
                **{k: v for k, v in dataclasses.asdict(report).items() if k != "match_order"},
            }
            for depth, reports in learned.reports.items()
            for report in reports
        )
        + tuple(map(dataclasses.asdict, learned.predictors)),
        versions=software_versions(),
    )
