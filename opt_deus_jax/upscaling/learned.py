"""What is learned by making a grown model, and the notes by which journals keep it.

A note stands with a tensor and tells all that it depends on: hashes of the base, and of a new layer
how it came about. A file's notes tell everything once, so they need those of no other file.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from opt_deus_jax.transport.diagnostics import (
    MapPicture,
    MatrixReport,
    picture_from_json,
    picture_to_json,
    report_from_json,
)
from opt_deus_jax.upscaling.lesa import PredictorReport
from opt_deus_jax.upscaling.new_block import Fused


@dataclasses.dataclass(frozen=True)
class Learned:
    """What making a grown model has told.

    Attributes:
        base: sha256 of each tensor of the base that was read.
        reports: For each fused layer, by depth, the report of each transported matrix.
        pictures: Of the first fused layer.
        predictors: Of method `lesa`: what was learned of each matrix.
    """

    base: dict[str, str]
    reports: dict[int, tuple[MatrixReport, ...]]
    pictures: dict[str, MapPicture]
    predictors: tuple[PredictorReport, ...]


def note_of_layer(
    depth: int,
    fused: Fused,
    base: Mapping[str, str],
    predictors: tuple[PredictorReport, ...],
    *,
    is_first: bool,
) -> dict[str, Any]:
    """What is noted with the tensors of a fused layer.

    Args:
        depth: Where it is.
        fused: How it was made.
        base: sha256 of the tensors that it was made of.
        predictors: By which it was predicted.
        is_first: Whether it is the lowest of all fused layers, which is drawn.

    Returns:
        JSON.
    """
    reports = [dataclasses.asdict(report) for report in fused.reports]
    note: dict[str, Any] = {"base": dict(base), "depth": depth, "reports": reports}
    if predictors:
        note["predictors"] = [dataclasses.asdict(report) for report in predictors]
    if is_first and fused.pictures:
        note["pictures"] = {name: picture_to_json(p) for name, p in fused.pictures.items()}
    return note


class News:
    """Of the notes of one file what is not in its journal yet."""

    def __init__(self, notes: Iterable[Mapping[str, Any]]):
        """Knows of the notes that are in it."""
        self._base: set[str] = set()
        self._depths: set[int] = set()
        for note in notes:
            self.of(note)

    def of(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """What is new in a note, which counts as told from then on."""
        base = {k: v for k, v in note.get("base", {}).items() if k not in self._base}
        self._base |= base.keys()
        news = {"base": base} if base else {}
        if "depth" in note and note["depth"] not in self._depths:
            self._depths.add(note["depth"])
            news |= {key: value for key, value in note.items() if key != "base"}
        return news


def learned_from(notes: Iterable[Mapping[str, Any]]) -> Learned:
    """Puts together what was noted with all tensors.

    Args:
        notes: Of all files, in any order; a layer may have been made for several.
    """
    base: dict[str, str] = {}
    layers: dict[int, Mapping[str, Any]] = {}
    for note in notes:
        base |= note.get("base", {})
        if "depth" in note:
            layers[note["depth"]] = note
    lowest = layers[min(layers)] if layers else {}
    return Learned(
        base=base,
        reports={
            depth: tuple(map(report_from_json, layers[depth]["reports"]))
            for depth in sorted(layers)
        },
        pictures={k: picture_from_json(v) for k, v in lowest.get("pictures", {}).items()},
        predictors=tuple(PredictorReport(**fields) for fields in lowest.get("predictors", ())),
    )
