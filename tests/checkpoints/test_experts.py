"""Experts as one stack, from a folder as transformers saves it."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opt_deus_jax.checkpoints.fused import fuse
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.errors import UserError
from opt_deus_jax.models.model_config import read_model_config
from tests.families import oracle, write

STACK = "model.layers.2.block_sparse_moe.experts.*.w3.weight"
ONE = STACK.replace("*", "1")


def test_a_stack_and_its_parts_are_those_of_the_model_in_memory(tmp_path):
    source = write("mixtral", tmp_path)
    gate_up = oracle("mixtral").model.layers[2].mlp.experts.gate_up_proj.detach().numpy()
    up = gate_up[:, 48:]
    assert source.tensors[STACK].shape == (4, 48, 32)
    np.testing.assert_array_equal(source.read(STACK), up)
    part = (slice(1, 3), slice(40, 48), slice(None, None))
    np.testing.assert_array_equal(source.read_part(STACK, part), up[part])
    assert not any(".experts.1." in name for name in source.tensors)


def test_what_is_written_is_what_was_read_and_each_stack_is_made_once(tmp_path):
    source, made = write("mixtral", tmp_path), []

    def read(name):
        made.append(name)
        return source.read(name)

    stored, read_stored = fuse(source.tensors, read, read_model_config(source.hf_config), 4)
    written = load_file(tmp_path / "model.safetensors")
    assert {name for name, _ in stored} == written.keys()
    for name, info in stored:
        array = read_stored(name)
        assert array.shape == info.shape
        np.testing.assert_array_equal(array, written[name])
    assert sorted(made) == sorted(source.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(ONE), f"misses tensor {ONE}"),
        (
            lambda tensors: tensors.update({ONE: tensors[ONE][1:]}),
            f"{ONE} has shape .47, 32., .*48",
        ),
        (
            lambda tensors: tensors.update({ONE: tensors[ONE].astype(np.float16)}),
            "w3.weight have several dtypes, float16, float32",
        ),
        (
            lambda tensors: tensors.update({ONE.replace("1.w3", "4.w3"): tensors[ONE]}),
            "unknown tensor .*experts.4.w3.weight",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(tmp_path, change, message):
    write("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)
