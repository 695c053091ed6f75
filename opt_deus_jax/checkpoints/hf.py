"""Hugging Face directories: safetensors read and written one tensor at a time."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from opt_deus_jax.checkpoints.source import CheckpointSource, TensorInfo
from opt_deus_jax.errors import UserError
from opt_deus_jax.whole_files import write_json

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
    # That of a grown model: what is made from it may need to know which layers were new.
    "upscale_manifest.json",
)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; give a folder with config.json and safetensors"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return content


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    weight_map = _load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: field weight_map is missing or empty; fetch it again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{path}: weight_map gives {file!r} for tensor {tensor}, not the name of a file "
                "in the same folder; fetch it again"
            )
    return weight_map


def _check_index(path: Path, weight_map: Mapping[str, str], shard_of: Mapping[str, Path]) -> None:
    for tensor, file in weight_map.items():
        if tensor not in shard_of or shard_of[tensor].name != file:
            raise UserError(f"{path}: tensor {tensor} is not in {file}; fetch both again")
    for tensor, shard in shard_of.items():
        if tensor not in weight_map:
            raise UserError(
                f"{path}: tensor {tensor} of {shard.name} has no entry; fetch the index again"
            )


def _single_file(directory: Path) -> str:
    if (directory / SINGLE_FILE).exists():
        return SINGLE_FILE
    found = "pickled weights, which are never loaded: " if list(directory.glob("*.bin")) else ""
    raise UserError(
        f"{directory}: {found}no {SINGLE_FILE} and no {INDEX_FILE}; save the model as safetensors"
    )


def _list_shard(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="np") as shard:
            infos = {}
            for name in shard.keys():  # noqa: SIM118 - safe_open is not iterable
                piece = shard.get_slice(name)
                if piece.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{path}: tensor {name} has dtype {piece.get_dtype()}; use a checkpoint in "
                        f"one of {', '.join(_DTYPES)}"
                    )
                infos[name] = TensorInfo(tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])
            return infos
    except FileNotFoundError:
        raise UserError(f"{path}: shard is missing; fetch it again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: damaged or truncated safetensors ({error}); fetch it again"
        ) from None


def open_hf_directory(directory: Path, name: str) -> CheckpointSource:
    """Opens a Hugging Face directory of one or many safetensors.

    Args:
        directory: The folder.
        name: What the user called it.

    Returns:
        A source; tensors are read when asked for.

    Raises:
        UserError: A file is missing, damaged or not what it should be.
    """
    hf_config = _load_json(directory / "config.json")
    shard_of: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    weight_map = _read_index(directory) if (directory / INDEX_FILE).exists() else None
    files = [_single_file(directory)] if weight_map is None else sorted(set(weight_map.values()))
    for file in files:
        path = directory / file
        for tensor, info in _list_shard(path).items():
            if tensor in shard_of:
                raise UserError(f"{path}: tensor {tensor} is also in {shard_of[tensor].name}")
            tensors[tensor] = info
            shard_of[tensor] = path
    if weight_map is not None:
        _check_index(directory / INDEX_FILE, weight_map, shard_of)

    def read(tensor: str) -> np.ndarray:
        with safe_open(shard_of[tensor], framework="np") as shard:
            return shard.get_tensor(tensor)

    def read_slice(tensor: str, part: tuple[slice, ...]) -> np.ndarray:
        with safe_open(shard_of[tensor], framework="np") as shard:
            return shard.get_slice(tensor)[part]

    side_files = {
        file: (directory / file).read_bytes() for file in _SIDE_FILES if (directory / file).exists()
    }
    return CheckpointSource(name, hf_config, tensors, read, side_files, read_slice)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A safetensors file as it will be.

    Attributes:
        file: Its name.
        header: The bytes that it begins with.
        tensors: Names and kinds of what follows, in order and without gaps.
    """

    file: str
    header: bytes
    tensors: tuple[tuple[str, TensorInfo], ...]

    def places(self) -> Iterator[tuple[str, int, int]]:
        """Name, first byte in the file and number of bytes of each tensor."""
        first = len(self.header)
        for name, info in self.tensors:
            yield name, first, info.num_bytes
            first += info.num_bytes


def plan_shards(tensors: Iterable[tuple[str, TensorInfo]], max_shard_bytes: int) -> list[Shard]:
    """Divides tensors into files.

    Args:
        tensors: Name, shape and dtype of each, in the order of writing.
        max_shard_bytes: A new file is begun before this size is passed.

    Returns:
        The files, in the order of writing.
    """
    parts: list[list[tuple[str, TensorInfo]]] = [[]]
    filled = 0
    for name, info in tensors:
        if parts[-1] and filled + info.num_bytes > max_shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append((name, info))
        filled += info.num_bytes
    if len(parts) == 1:
        return [Shard(SINGLE_FILE, _header(parts[0]), tuple(parts[0]))]
    return [
        Shard(f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors", _header(part), tuple(part))
        for i, part in enumerate(parts)
    ]


def _header(tensors: list[tuple[str, TensorInfo]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors:
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        offset += info.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def write_shard(
    directory: Path,
    shard: Shard,
    read: Callable[[str], np.ndarray],
    *,
    kept: Container[str] = (),
    on_written: Callable[[str, np.ndarray], None] = lambda name, array: None,
) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    Args:
        directory: An existing folder.
        shard: The file.
        read: Makes or reads one tensor; called in the order of writing.
        kept: The first of the tensors, where they are in the file already; they are not read.
        on_written: Called with each of the others when it is in the file.
    """
    # The safetensors package writes only from a dict that holds the whole shard in memory.
    places = list(shard.places())
    missing = [place for place in places if place[0] not in kept]
    infos = dict(shard.tensors)
    with (directory / shard.file).open("r+b" if len(missing) < len(places) else "wb") as file:
        if len(missing) == len(places):
            file.write(shard.header)
        else:
            # What follows was cut short, or is damaged.
            _, first, size = places[len(places) - len(missing) - 1]
            file.truncate(first + size)
            file.seek(0, os.SEEK_END)
        for name, _, _ in missing:
            array, info = read(name), infos[name]
            if array.shape != info.shape or array.dtype != info.dtype:
                raise ValueError(f"{name}: got {array.shape} {array.dtype}, planned {info}")
            array = np.ascontiguousarray(array)
            file.write(array.view(np.uint8).data)
            file.flush()
            on_written(name, array)
        os.fsync(file.fileno())


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Writes the index of several files; one file needs none."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.file for shard in shards for name, _ in shard.tensors}
    total = sum(info.num_bytes for shard in shards for _, info in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX_FILE, index)


def write_weights(
    directory: Path,
    tensors: Iterable[tuple[str, TensorInfo]],
    read: Callable[[str], np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes safetensors, with an index where there are several, one tensor in memory at a time.

    Args:
        directory: An existing folder.
        tensors: Name, shape and dtype of each tensor, in the order in which `read` is called.
        read: Makes or reads one tensor.
        max_shard_bytes: A new file is begun before this size is passed.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    for shard in shards:
        write_shard(directory, shard, read)
    write_index(directory, shards)


def check_room(directory: Path, num_bytes: int, held: int = 0) -> None:
    """Refuses what the disk has no room for.

    Args:
        directory: A folder that is to be made.
        num_bytes: Room that it will need.
        held: How much of that is written already.

    Raises:
        UserError: The disk has no room.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free + held < num_bytes:
        raise UserError(
            f"{directory}: no space left on the device, {num_bytes:,} bytes are needed and "
            f"{free + held:,} free; free some or choose another --workdir"
        )


@contextlib.contextmanager
def naming_full_disk(
    directory: Path, num_bytes: int, remedy: str, kind: type[UserError] = UserError
) -> Iterator[None]:
    """Says in one line that the disk is full.

    Args:
        directory: What is made.
        num_bytes: Room that it needs.
        remedy: What to do.
        kind: What is raised.

    Raises:
        UserError: Of that kind, in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise kind(
                f"{directory}: no space left on the device, {num_bytes:,} bytes are needed; "
                f"{remedy}"
            ) from None
        raise


def create_directory(directory: Path, num_bytes: int, fill: Callable[[Path], None]) -> None:
    """Fills a folder under a temporary name and renames it when it is complete.

    Args:
        directory: The folder to make; must not exist.
        num_bytes: Room that it will need.
        fill: Writes the content into the folder that it is given.

    Raises:
        UserError: The folder exists, or the disk has no room. Nothing is left behind.
    """
    if directory.exists():
        raise UserError(f"{directory}: exists; delete it or choose another --workdir")
    check_room(directory, num_bytes)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with naming_full_disk(directory, num_bytes, "free some or choose another --workdir"):
            fill(partial)
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hash_array(array: np.ndarray) -> str:
    """sha256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """One sha256 over the hashes of named tensors, whatever their order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
