"""Log-likelihoods against transformers, on meshes, and of grown models."""

import math
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

from opt_deus_jax.config import MeshConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation import predictions, scoring
from opt_deus_jax.evaluation.scoring import score_continuations
from opt_deus_jax.models import block
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import identity_values
from opt_deus_jax.training.placement import param_shardings
from opt_deus_jax.training.segments import plan_segments
from opt_deus_jax.training.weights import load_params
from tests.llama_checkpoints import Tensors, hf_config, oracle_model, random_tensors, source_of

_CONFIG = hf_config(vocab_size=96, num_hidden_layers=2, max_position_embeddings=64)
_TENSORS = random_tensors(_CONFIG, scale=0.3)


def _mesh(devices: int, **sizes: int) -> Mesh:
    return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


def _scores(config: dict[str, Any], tensors: Tensors, mesh: Mesh, pairs: Any) -> Any:
    model_config = read_model_config(config)
    segments = plan_segments((frozenset(),) * model_config.num_layers)
    params = load_params(
        source_of(config, tensors),
        model_config,
        segments,
        dtype=np.dtype(np.float32),
        shardings=param_shardings(model_config, segments, mesh),
    )
    return score_continuations(params, pairs, config=model_config, mesh=mesh, batch_tokens=512)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[list[int], list[int]]]:
    """Questions with several answers, ones of the same first token, and some that must be cut."""
    draw = np.random.default_rng(2)
    made = []
    for length in (1, 3, 20, 40, 62, 63, 64, 90):
        context = draw.integers(0, 96, length).tolist()
        made += [(context, [answer]) for answer in range(11)]
        made += [(context, draw.integers(0, 96, size).tolist()) for size in (2, 5, 30)]
    return made


@pytest.fixture(scope="module")
def alone(pairs: Any) -> Any:
    return _scores(_CONFIG, _TENSORS, _mesh(1), pairs)


def test_equals_transformers(pairs: Any, alone: Any) -> None:
    model = oracle_model(_CONFIG, _TENSORS)
    truncated = 0
    for number, (context, answer) in enumerate(pairs):
        truncated += len(context + answer) > 65
        tokens = (context + answer)[-65:]
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:-1]])).logits[0, -len(answer) :]
        log_probabilities = torch.log_softmax(logits.double(), -1)
        expected = log_probabilities[range(len(answer)), answer].sum()
        assert alone.log_likelihoods[number] == pytest.approx(float(expected), abs=1e-4)
        assert alone.is_greedy[number] == (logits.argmax(-1).tolist() == answer)
    assert alone.truncated == truncated > 0
    assert 0 < alone.is_greedy.sum() < len(pairs)


def test_is_the_same_on_a_mesh(pairs: Any, alone: Any) -> None:
    spread = _scores(_CONFIG, _TENSORS, _mesh(8, data=2, fsdp=2, tensor=2), pairs)
    np.testing.assert_allclose(spread.log_likelihoods, alone.log_likelihoods, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(spread.is_greedy, alone.is_greedy)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_taking_some_tokens_at_a_time_changes_nothing(
    sizes: dict[str, int], pairs: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "_CPU_TOKENS", 32)
    widths = set()
    project = block.multiply_kernel

    def noting(x_MD: Any, kernel_OD: Any) -> Any:
        if kernel_OD.shape[0] == _CONFIG["intermediate_size"]:
            widths.add(len(x_MD))
        return project(x_MD, kernel_OD)

    monkeypatch.setattr(block, "multiply_kernel", noting)
    # Traced with other pieces before; and what is traced here is for no other test.
    scoring.packed_hidden_states.clear_cache()  # pyright: ignore
    scores = _scores(_CONFIG, _TENSORS, _mesh(math.prod(sizes.values()), **sizes), pairs)
    scoring.packed_hidden_states.clear_cache()  # pyright: ignore
    assert 32 * (4 if sizes else 1) in widths
    np.testing.assert_allclose(scores.log_likelihoods, alone.log_likelihoods, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(scores.is_greedy, alone.is_greedy)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}])
def test_looking_at_some_of_the_vocabulary_at_a_time_changes_nothing(
    sizes: dict[str, int], pairs: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_BLOCK", 20)
    blocks = set()
    project = predictions.project_to_vocabulary

    def noting(hidden_CD: Any, head_VD: Any, logits: Any) -> Any:
        blocks.add(len(head_VD))
        return project(hidden_CD, head_VD, logits)

    monkeypatch.setattr(predictions, "project_to_vocabulary", noting)
    # Traced with other blocks before; and what is traced here is for no other test.
    predictions.score_tokens.clear_cache()  # pyright: ignore
    scores = _scores(_CONFIG, _TENSORS, _mesh(math.prod(sizes.values()), **sizes), pairs)
    predictions.score_tokens.clear_cache()  # pyright: ignore
    assert blocks == ({40, 16} if sizes else {20, 16})
    np.testing.assert_allclose(scores.log_likelihoods, alone.log_likelihoods, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(scores.is_greedy, alone.is_greedy)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}])
def test_of_equally_likely_tokens_the_first_is_greedy(sizes: dict[str, int]) -> None:
    tensors = _TENSORS | {"model.norm.weight": np.zeros_like(_TENSORS["model.norm.weight"])}
    pairs = [([3], [token]) for token in range(96)]
    scores = _scores(_CONFIG, tensors, _mesh(math.prod(sizes.values()), **sizes), pairs)
    assert scores.is_greedy.tolist() == [True] + [False] * 95
    np.testing.assert_allclose(scores.log_likelihoods, -math.log(96), rtol=1e-6)


def test_a_grown_model_scores_exactly_as_its_base(pairs: Any, alone: Any) -> None:
    config = {**_CONFIG, "num_hidden_layers": 5}
    drawn = random_tensors(config, seed=7, scale=0.3)
    source, grown = {0: 0, 3: 1}, {}
    for name, array in drawn.items():
        parts = name.split(".")
        if parts[1] != "layers":
            grown[name] = _TENSORS[name]
        elif int(parts[2]) in source:
            grown[name] = _TENSORS[".".join([*parts[:2], str(source[int(parts[2])]), *parts[3:]])]
        else:
            is_output = parts[-2] in ("o_proj", "down_proj")
            grown[name] = np.zeros_like(array) if is_output else array
    assert set(identity_values(read_model_config(config))) == {"output_kernel", "down_kernel"}
    scores = _scores(config, grown, _mesh(1), pairs)
    assert scores.log_likelihoods.tobytes() == alone.log_likelihoods.tobytes()
    assert scores.is_greedy.tobytes() == alone.is_greedy.tobytes()


def test_an_answer_longer_than_the_context_is_refused(alone: Any) -> None:
    with pytest.raises(UserError, match="65 tokens is longer than the model's context of 64"):
        _scores(_CONFIG, _TENSORS, _mesh(1), [([1], [2] * 65)])
    with pytest.raises(ValueError, match="at least one token"):
        _scores(_CONFIG, _TENSORS, _mesh(1), [([], [2])])
