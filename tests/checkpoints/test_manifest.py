import dataclasses
import importlib.metadata
import json

import pytest

from opt_deus_jax.checkpoints.hf import open_hf_directory
from opt_deus_jax.checkpoints.manifest import (
    FILE_NAME,
    Manifest,
    manifest_of,
    parse_manifest,
    read_manifest,
    software_versions,
    write_manifest,
)
from opt_deus_jax.errors import UserError
from opt_deus_jax.upscaling.layout import plan_layout
from tests.llama_checkpoints import hf_config, random_tensors, write_directory

MANIFEST = Manifest(
    method="opt_deus",
    options={"layout": "top", "epsilon": 0.01},
    trained="new",
    layers=tuple(dataclasses.asdict(origin) for origin in plan_layout("top", 3, 1)),
    base={"name": "b", "num_layers": 3, "sha256": "0" * 64},
    identity={"bit_identical": True},
    diagnostics=({"depth": 2, "name": "query"},),
    versions={"jax": "0.10"},
)


def test_reading_gives_back_what_was_written(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert (tmp_path / FILE_NAME).read_text().endswith("}\n")


def test_it_says_which_layers_are_new():
    assert MANIFEST.is_new == (False, False, True, False)


def test_versions_are_those_installed():
    versions = software_versions()
    assert versions["jax"] == importlib.metadata.version("jax")
    assert {"opt_deus_jax", "jaxlib", "ott-jax", "numpy"} <= versions.keys()


@pytest.mark.parametrize(
    "change", [{"format_version": 2}, {"format_version": None}, {"more": 1}, {"layers": ...}]
)
def test_another_format_is_refused(tmp_path, change):
    write_manifest(tmp_path, MANIFEST)
    content = json.loads((tmp_path / FILE_NAME).read_text())
    content = {k: v for k, v in (content | change).items() if v is not ...}
    with pytest.raises(UserError, match="m.json: not a manifest of format 1; expand .* again"):
        parse_manifest(content, "m.json")


@pytest.mark.parametrize("content", ["[1, 2]", "null", "{", "", "\ud800"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=f"{FILE_NAME}: not .*again") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_carries_that_of_its_folder(tmp_path):
    directory = write_directory(tmp_path / "grown", hf_config(), random_tensors(hf_config()))
    assert manifest_of(open_hf_directory(directory, "grown")) is None
    write_manifest(directory, MANIFEST)
    assert manifest_of(open_hf_directory(directory, "grown")) == MANIFEST
    (directory / FILE_NAME).write_text("{")
    with pytest.raises(UserError, match=f"^grown/{FILE_NAME}: not valid JSON"):
        manifest_of(open_hf_directory(directory, "grown"))


def test_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{FILE_NAME}: not found; run experiments.expand"):
        read_manifest(tmp_path)
