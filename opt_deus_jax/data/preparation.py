"""Makes fixed-length records from text or instructions, once."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from opt_deus_jax.config import DataConfig
from opt_deus_jax.data import documents, instructions
from opt_deus_jax.data.chunks import Encoded, encode_chunks
from opt_deus_jax.data.documents import TextEncoder, encode_documents, is_held_out, read_documents
from opt_deus_jax.data.instructions import ChatEncoder, encode_conversations, read_conversations
from opt_deus_jax.data.records import (
    INFO_FILE,
    SPLITS,
    RecordsInfo,
    load_info,
    load_records,
)
from opt_deus_jax.data.sources import DOCSTRINGS, Source, find_sources, fingerprint
from opt_deus_jax.data.writers import InstructionWriter, SplitWriter, TextWriter
from opt_deus_jax.errors import UserError

FORMAT_VERSION = 2


def record_settings(
    data: DataConfig,
    tokenizer: TextEncoder | ChatEncoder,
    tokenizer_fingerprint: str,
    vocabulary_size: int,
) -> dict[str, Any]:
    """Collects what records follow from, and nothing that leaves them unchanged.

    Args:
        data: The data settings.
        tokenizer: The tokenizer.
        tokenizer_fingerprint: Any string that changes when the tokenizer does.
        vocabulary_size: Rows of the model's embedding.

    Returns:
        Values that JSON keeps, by the names of `DataConfig` where they come from there.
    """
    settings = dataclasses.asdict(data)
    unused = ("text_field",) if data.format != "text" else ("template", "packing")
    for name in ("num_workers", "seed", *unused) + ("held_out_fraction",) * bool(data.held_out):
        del settings[name]
    if settings.get("template") == "chat":
        chat_template = getattr(tokenizer, "chat_template", None) or ""
        settings["chat_template_sha256"] = hashlib.sha256(chat_template.encode()).hexdigest()
    return settings | {
        "vocabulary_size": vocabulary_size,
        "eos_id": tokenizer.eos_ids[0],
        "tokenizer_sha256": hashlib.sha256(tokenizer_fingerprint.encode()).hexdigest(),
        "format_version": FORMAT_VERSION,
    }


def prepare_records(
    directory: str | os.PathLike[str],
    data: DataConfig,
    tokenizer: TextEncoder | ChatEncoder,
    *,
    tokenizer_fingerprint: str,
    vocabulary_size: int | None = None,
) -> RecordsInfo:
    """Makes the records of both splits, or finds them made.

    Documents of text are each followed by the end-of-sequence token and joined in order, the
    incomplete last record dropped. Examples of instructions stay whole: each lies in one record. A
    longer one loses its end, and is dropped where no answer is left. The files are the same for any
    number of workers.

    Args:
        directory: Where `train.bin`, `held_out.bin` and, last, `records.json` are written.
        data: The data settings.
        tokenizer: The tokenizer, a `ChatEncoder` for instructions; it must survive pickling.
        tokenizer_fingerprint: Any string that changes when the tokenizer does.
        vocabulary_size: Rows of the model's embedding; the tokenizer's own where None.

    Returns:
        What is in the folder.

    Raises:
        UserError: A setting or the text is unusable, the folder holds records of other settings or
            of text that has changed since, a split has no whole record, a token lies outside the
            vocabulary, the disk is full.
    """
    _check_config(data)
    directory = Path(directory)
    size = tokenizer.vocabulary_size if vocabulary_size is None else vocabulary_size
    settings = record_settings(data, tokenizer, tokenizer_fingerprint, size)
    if (directory / INFO_FILE).exists():
        info = load_info(directory)
        _check_same(directory, info.settings, settings)
        _check_sources(directory, info.sources, _find_all(data))
        for split in SPLITS:
            load_records(directory, split)
        return info
    found = _find_all(data)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(_make_writer(directory, split, data, dtype))
                for split in SPLITS
            }
            sources = _fill(writers, found, data, tokenizer, size)
            splits = {split: writer.finish(split) for split, writer in writers.items()}
            for writer in writers.values():
                writer.publish()
        info = RecordsInfo(settings, sources, dtype, splits)
        _write_info(directory, info)
    except OSError as error:
        raise _disk_error(directory, data, dtype, error) from error
    return info


def _find_all(data: DataConfig) -> dict[str, list[Source]]:
    """Lists all files first: a typing error in the last should not cost an hour."""
    endings = documents.ENDINGS if data.format == "text" else instructions.ENDINGS
    specs = {"train": data.train} | ({"held_out": data.held_out} if data.held_out else {})
    found = {name: find_sources(spec, endings) for name, spec in specs.items()}
    if data.format != "text" and any(s.name == DOCSTRINGS for s in sum(found.values(), [])):
        raise UserError(
            f"config field data.train={data.train!r}: docstrings hold no instructions; name files"
            f" ({', '.join(endings)}), or use data.format=text"
        )
    return found


def _make_writer(directory: Path, split: str, data: DataConfig, dtype: str) -> SplitWriter:
    path = directory / f"{split}.bin"
    budget = getattr(data, f"max_{split}_tokens")
    if data.format == "text":
        return TextWriter(path, budget, dtype, data.sequence_length)
    return InstructionWriter(path, budget, dtype, data.sequence_length, data.packing)


def _fill(
    writers: Mapping[str, SplitWriter],
    found: Mapping[str, list[Source]],
    data: DataConfig,
    tokenizer: Any,
    size: int,
) -> dict[str, list[list[str | None]]]:
    """Writes all tokens; returns the sources with the hashes of those that were opened."""
    sources: dict[str, list[list[str | None]]] = {
        name: [[source.name, None] for source in files] for name, files in found.items()
    }
    encode: Callable[[list[Any]], Encoded] = functools.partial(encode_documents, tokenizer)
    if data.format != "text":
        encode = functools.partial(encode_conversations, tokenizer, data.template)
    budgets = (data.max_train_tokens, data.max_held_out_tokens)
    with (
        tqdm(
            desc="tokens",
            total=sum(budgets) if all(budgets) else None,
            unit="",
            unit_scale=True,
            disable=None,
        ) as progress,
        contextlib.closing(
            encode_chunks(_labelled(writers, found, sources, data), encode, data.num_workers)
        ) as chunks,
    ):
        for split, encoded in chunks:
            highest = int(encoded.tokens.max(initial=0))
            if highest >= size:
                raise UserError(
                    f"tokenizer: gives token {highest}, but the vocabulary has {size}: use the"
                    " tokenizer that belongs to this model"
                )
            progress.update(writers[split].append(encoded))
            if all(writer.is_full for writer in writers.values()):
                break
    return sources


def _labelled(
    writers: Mapping[str, SplitWriter],
    found: Mapping[str, list[Source]],
    sources: Mapping[str, list[list[str | None]]],
    data: DataConfig,
) -> Iterator[tuple[str, Any]]:
    """Yields each document with its split, leaving off where the splits have enough.

    The hash of each file that is opened is written into `sources`.
    """
    for name, files in found.items():
        splits = (name,) if len(found) > 1 else SPLITS
        for number, source in enumerate(files):
            if all(writers[split].is_full for split in splits):
                break
            sources[name][number][1] = fingerprint(source)
            for document in _read(source, data):
                split = splits[0]
                if len(splits) > 1:
                    split = splits[is_held_out(document.id, data.held_out_fraction)]
                if not writers[split].is_full:
                    yield split, document
                if all(writers[split].is_full for split in splits):
                    break


def _read(source: Source, data: DataConfig) -> Iterator[Any]:
    if data.format == "text":
        return read_documents(source, data.text_field)
    return read_conversations(source, data.format, data.template)


def _check_config(data: DataConfig) -> None:
    if data.sequence_length < 1:
        raise UserError(f"config field data.sequence_length={data.sequence_length}: use 1 or more")
    for name in ("max_train_tokens", "max_held_out_tokens", "num_workers"):
        if getattr(data, name) < 0:
            raise UserError(f"config field data.{name}={getattr(data, name)}: use 0 or more")
    for name in ("max_train_tokens", "max_held_out_tokens"):
        if 0 < getattr(data, name) < data.sequence_length:
            raise UserError(
                f"config field data.{name}={getattr(data, name)}: fewer than the"
                f" {data.sequence_length} of data.sequence_length; use more, or 0 for all"
            )
    if not data.held_out and not 0 < data.held_out_fraction < 1:
        raise UserError(
            f"config field data.held_out_fraction={data.held_out_fraction}: use a share between 0"
            " and 1, or name held-out text by --config.data.held_out=FILES"
        )
    if data.held_out and data.held_out.strip() == data.train.strip():
        raise UserError(
            f"config field data.held_out={data.held_out!r}: is the training text; leave it empty to"
            " hold out a part of that"
        )
    if data.format == "messages" and data.template == "alpaca":
        raise UserError(
            "config field data.template='alpaca': has no place for the turns of"
            " data.format='messages'; use chat"
        )


def _check_same(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    names = [name for name in old | new if old.get(name) != new.get(name)]
    if names:
        changes = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names)
        raise UserError(
            f"{directory}: holds records of other settings ({changes}): use another --workdir, or"
            " delete that folder"
        )


def _check_sources(
    directory: Path,
    old: Mapping[str, list[list[str | None]]],
    found: Mapping[str, list[Source]],
) -> None:
    remedy = "use another --workdir, or delete that folder"
    for name, files in found.items():
        names = [entry[0] for entry in old[name]]
        if names != [source.name for source in files]:
            raise UserError(
                f"{directory}: data.{name} named {len(names)} files when these records were made,"
                f" and names {len(files)} or others now: {remedy}"
            )
        for source, (_, sha256) in zip(files, old[name], strict=True):
            if sha256 is not None and fingerprint(source) != sha256:
                place = source.name if source.name == DOCSTRINGS else source.path
                raise UserError(
                    f"{place}: has changed since {directory} was made from it: {remedy}"
                )


def _write_info(directory: Path, info: RecordsInfo) -> None:
    temporary = directory / (INFO_FILE + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(info), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / INFO_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def _disk_error(directory: Path, data: DataConfig, dtype: str, error: OSError) -> UserError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{directory}: cannot be written ({error.strerror}): use another --workdir"
        )
    width = np.dtype(dtype).itemsize * (1 if data.format == "text" else 2)
    budgets = (data.max_train_tokens, data.max_held_out_tokens)
    need = f"up to {sum(budgets) * width} bytes are needed"
    if not all(budgets) or data.format != "text":
        need = f"{width} bytes a token are needed, --config.data.max_train_tokens caps them"
    return UserError(
        f"{directory}: the disk is full ({shutil.disk_usage(directory).free} bytes free): {need};"
        " free some or use another --workdir"
    )
