"""From what the user calls a base to a checkpoint that can be read."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from opt_deus_jax.checkpoints.fused import split_fused
from opt_deus_jax.checkpoints.gguf import open_gguf
from opt_deus_jax.checkpoints.hf import open_hf_directory
from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import ModelConfig, read_model_config
from opt_deus_jax.models.params import named_tensors

# Buffers that old checkpoints carry; they follow from config.json.
_DERIVED_SUFFIX = ".self_attn.rotary_emb.inv_freq"
# Some tools store the embedding twice; the copy is dropped when it is one.
_TIED_HEAD = "lm_head.weight"
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]


def _download(base: str) -> Path:
    try:
        return Path(snapshot_download(base, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"config field base={base!r}: no such folder or .gguf file here, and the hub did not "
            f"give it ({reason}); give a local path or check the name"
        ) from None


def open_checkpoint(base: str) -> CheckpointSource:
    """Opens a checkpoint for reading.

    Args:
        base: A Hugging Face directory, a `.gguf` file, or a hub id (which is downloaded into
            the hub's own cache; pickled weights are never fetched).

    Returns:
        A source whose tensors are exactly those of the network that its config describes.

    Raises:
        UserError: It cannot be opened, or tensors are missing, left over or of a wrong shape.
    """
    if not base:
        raise UserError("config field base is empty; set --config.base=FOLDER_OR_GGUF_OR_HUB_ID")
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        source = open_gguf(path)
    elif path.is_dir():
        source = open_hf_directory(path, base)
    elif path.exists():
        raise UserError(f"config field base={base!r}: a file that is not .gguf; give its folder")
    else:
        source = open_hf_directory(_download(base), base)
    return _checked(source)


def _check_tied_head(source: CheckpointSource) -> None:
    embedding, head = (source.read(name) for name in ("model.embed_tokens.weight", _TIED_HEAD))
    if embedding.tobytes() != head.tobytes():
        raise UserError(
            f"{source.name}: config.json ties the head to the embedding, but tensor {_TIED_HEAD} "
            "differs from it; set tie_word_embeddings to false"
        )


def _checked(source: CheckpointSource) -> CheckpointSource:
    config = read_model_config(source.hf_config, f"{source.name}: config.json")
    source = split_fused(source, config)
    expected = dict(named_tensors(config, config.num_layers))
    tensors = {k: v for k, v in source.tensors.items() if not k.endswith(_DERIVED_SUFFIX)}
    if config.tied_embeddings and _TIED_HEAD in tensors:
        _check_tied_head(source)
        del tensors[_TIED_HEAD]
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        kind, names = ("misses", missing) if missing else ("has unknown", extra)
        raise UserError(
            f"{source.name}: {kind} tensor {names[0]} (and {len(names) - 1} more); it does not "
            "match its config.json, fetch it again"
        )
    for name, spec in expected.items():
        if tensors[name].shape != spec.shape:
            raise UserError(
                f"{source.name}: tensor {name} has shape {tensors[name].shape}, config.json asks "
                f"for {spec.shape}; one of the two is of another model"
            )
    return CheckpointSource(
        source.name,
        source.hf_config,
        {k: tensors[k] for k in expected},
        source.read,
        source.side_files,
        source.read_slice,
    )


def read_config_only(base: str) -> tuple[dict[str, Any], ModelConfig]:
    """Reads a base's hyper-parameters without its weights.

    Args:
        base: As for `open_checkpoint`, or a `config.json`.

    Returns:
        The content of config.json, and what it means.

    Raises:
        UserError: It cannot be read or is not supported.
    """
    path = Path(base).expanduser()
    if path.suffix == ".json":
        try:
            hf_config = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"config field base={base!r}: cannot be read ({error})") from None
        if not isinstance(hf_config, dict):
            raise UserError(f"config field base={base!r}: not a JSON object; fetch it again")
    elif path.is_dir() and not list(path.glob("*.safetensors")):
        return read_config_only(str(path / "config.json"))
    else:
        hf_config = open_checkpoint(base).hf_config
    return hf_config, read_model_config(hf_config, base)
