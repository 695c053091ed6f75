"""`upscale_manifest.json`: how a grown checkpoint was made, and which of its layers are new."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.errors import UserError
from opt_deus_jax.whole_files import write_json

FILE_NAME = "upscale_manifest.json"
FORMAT_VERSION = 1
_VERSIONED = ("opt_deus_jax", "jax", "jaxlib", "ott-jax", "numpy")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known about a grown checkpoint.

    Attributes:
        method: The preset's name.
        options: Every option that the expansion ran with, presets resolved.
        trained: `new`, `all` or a regular expression: what is to be trained.
        layers: One entry per layer, from the embedding up: depth, base_layer, previous, next,
            is_new.
        base: Name, number of layers and sha256 over all tensors of the base, and tokenizer_sha256
            of its tokenizer.json, where it has one.
        identity: The result of running the grown model against its base.
        diagnostics: Per new layer and matrix, what the transport reports; for `lesa`, per matrix,
            what its predictor learned.
        versions: Versions of the software that made it.
        format_version: Of this file.
    """

    method: str
    options: dict[str, Any]
    trained: str
    layers: tuple[dict[str, Any], ...]
    base: dict[str, Any]
    identity: dict[str, Any]
    diagnostics: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def is_new(self) -> tuple[bool, ...]:
        """For every layer whether it is new."""
        return tuple(layer["is_new"] for layer in self.layers)


def software_versions() -> dict[str, str]:
    """Versions of the packages whose numerics a checkpoint depends on."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest; the last file of a checkpoint."""
    write_json(directory / FILE_NAME, dataclasses.asdict(manifest))


def parse_manifest(content: Mapping[str, Any], where: str) -> Manifest:
    """Reads a manifest from its JSON.

    Args:
        content: The JSON object.
        where: What error messages call it.

    Returns:
        The manifest.

    Raises:
        UserError: It was written by another version of the format or fields are missing.
    """
    fields = {field.name for field in dataclasses.fields(Manifest)}
    is_object = isinstance(content, Mapping)
    if not is_object or content.get("format_version") != FORMAT_VERSION or set(content) != fields:
        raise UserError(
            f"{where}: not a manifest of format {FORMAT_VERSION}; expand the base again"
        )
    return Manifest(
        **{
            **content,
            "layers": tuple(content["layers"]),
            "diagnostics": tuple(content["diagnostics"]),
        }
    )


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a grown checkpoint.

    Args:
        directory: The Hugging Face folder of the grown model.

    Returns:
        The manifest.

    Raises:
        UserError: The folder is not a finished expansion.
    """
    path = directory / FILE_NAME
    try:
        return decode_manifest(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run experiments.expand first") from None


def manifest_of(source: CheckpointSource) -> Manifest | None:
    """The manifest that a checkpoint carries.

    Args:
        source: A checkpoint.

    Returns:
        The manifest; None where the checkpoint is not a grown model.

    Raises:
        UserError: It is damaged or of another format.
    """
    if FILE_NAME not in source.side_files:
        return None
    return decode_manifest(source.side_files[FILE_NAME], f"{source.name}/{FILE_NAME}")


def decode_manifest(content: bytes, where: str) -> Manifest:
    """Reads a manifest from its bytes; errors as of `parse_manifest`, which is told `where` too."""
    try:
        return parse_manifest(json.loads(content), where)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); expand the base again") from None
