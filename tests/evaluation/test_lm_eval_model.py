"""The model class against lm_eval's own `hf` backend, on the same checkpoint and questions."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.config import PAPER_TASKS, EvaluationConfig, MeshConfig, UpscaleConfig
from opt_deus_jax.distributed.mesh import make_mesh
from opt_deus_jax.errors import UserError
from opt_deus_jax.evaluation.continuing import continue_prompts
from opt_deus_jax.evaluation.lm_eval_model import OptDeusModel
from opt_deus_jax.evaluation.loading import LoadedModel
from opt_deus_jax.evaluation.results import metric_rows
from opt_deus_jax.evaluation.tasks import load_tasks, run_tasks
from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.upscaling.expand import expand_checkpoint
from opt_deus_jax.upscaling.probe import probe_tokens
from tests.evaluation.conftest import hf_backend, write_model
from tests.llama_checkpoints import oracle_model, params_of, smollm2

_TIE = 1e-3


def _requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]  # pyright: ignore


def _assert_same_answers(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Log-likelihoods within 1e-3 nats, and the same choices but for ties; returns how many."""
    compared = 0
    assert ours["samples"].keys() == theirs["samples"].keys()
    for task, rows in ours["samples"].items():
        for mine, other in zip(rows, theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            if task == "wikitext":
                for metric in ("word_perplexity", "byte_perplexity"):
                    assert mine[metric][0] == pytest.approx(other[metric][0], rel=1e-4)
                continue
            mine, other = (np.array([r[0] for r in row["filtered_resps"]]) for row in (mine, other))
            np.testing.assert_allclose(mine, other, atol=_TIE, rtol=0)
            chosen = int(mine.argmax())
            assert other.max() - other[chosen] <= _TIE
            compared += len(mine)
    return compared


def test_lm_eval_knows_it_by_name() -> None:
    assert get_model("opt_deus_jax") is OptDeusModel


def test_the_paper_s_tasks_equal_the_hf_backend(
    model: OptDeusModel, oracle: Any, questions: Path
) -> None:
    settings = EvaluationConfig(local_data=str(questions), limit=3)
    tasks = load_tasks(settings)
    ours = run_tasks(model, settings, tasks=tasks, log_samples=True)
    theirs = run_tasks(oracle, settings, tasks=tasks, log_samples=True)
    # Four tasks of 3 questions with 4, 4, 5 and 2 choices, three of 2, and mmlu's subjects.
    assert _assert_same_answers(ours, theirs) == 3 * (4 + 4 + 2 + 5 + 2 + 2) + 57 * 4
    rows = metric_rows(ours)
    assert {row["task"] for row in rows} >= set(PAPER_TASKS)
    for mine, other in zip(rows, metric_rows(theirs), strict=True):
        assert mine["task"] == other["task"]
        assert mine["value"] == pytest.approx(other["value"], rel=1e-3), mine
    assert {row["questions"] for row in rows if row["task"] == "mmlu"} == {57}
    # The passages of boolq and logiqa are longer than this model's context.
    assert ours["config"]["truncated_requests"] > 0
    assert ours["results"].keys() == theirs["results"].keys()
    assert {"versions", "n-shot", "configs", "group_subtasks", "lm_eval_version"} <= ours.keys()


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("with_bos") / "model", adds_bos=True)


def test_texts_become_the_same_tokens(checkpoint: Path, with_bos: Path) -> None:
    pairs = [("the base", " computes"), ("the base ", "computes"), ("", "the"), ("A.", " B")]
    pairs += [("<|begin|>the", " base"), ("<|end|>the", " base"), ("the\n", "\nbase")]
    for folder in (checkpoint, with_bos):
        ours, theirs = OptDeusModel(str(folder)), hf_backend(str(folder))
        assert ours.prefix_token_id == theirs.prefix_token_id == int(folder == with_bos)
        assert ours.eot_token_id == theirs.eot_token_id == 0
        assert ours.max_length == theirs.max_length == 96
        for context, continuation in pairs:
            assert ours.tok_encode(continuation) == theirs.tok_encode(continuation)
            if context:
                expected = theirs._encode_pair(context, continuation)
                assert ours._encode_pair(context, continuation) == expected
        requests = _requests("loglikelihood", pairs)
        np.testing.assert_allclose(
            [answer[0] for answer in ours.loglikelihood(requests, disable_tqdm=True)],
            [answer[0] for answer in theirs.loglikelihood(requests, disable_tqdm=True)],
            atol=_TIE,
            rtol=0,
        )


def test_generations_equal_the_hf_backend(model: OptDeusModel, oracle: Any) -> None:
    texts = ["the base computes", "Question: what", "the grown model " * 12, "A."]
    greedy: list[dict[str, Any]] = [{"until": ["e"], "max_gen_toks": 12}, {"max_gen_toks": 6}]
    arguments = [(text, dict(settings)) for text in texts for settings in greedy]
    requests = _requests("generate_until", arguments)
    found = model.generate_until(requests, disable_tqdm=True)
    # One at a time: the oracle pads on the left of its batches with tokens that it attends to.
    expected = [oracle.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert found == expected
    assert len(set(found)) > 4


def _make_special(folder: Path, listed: int, own: int, other: int) -> None:
    """Writes tokens as <|ID|>; the first two end a text, the second as the tokenizer's own."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    named = {token: f"<|{token}|>" for token in (listed, own, other)}
    vocabulary = content["model"]["vocab"].items()
    content["model"]["vocab"] = {named.get(token, text): token for text, token in vocabulary}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] += [
        {"id": token, "content": text, "special": True, **plain} for token, text in named.items()
    ]
    path.write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, listed]}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": named[own]}))


def test_a_generation_ends_at_any_token_that_ends_a_text(
    checkpoint: Path, model: OptDeusModel, tmp_path: Path
) -> None:
    texts = ["the base computes", "Question: what", "A."]
    prompts = [model.tok_encode(text) for text in texts]
    whole = continue_prompts(model.model, prompts, max_new_tokens=12)
    # Tokens that only one of the three writes: bytes beyond ASCII, of which no other is made.
    ends = [
        next(t for t in row[3:] if 100 < t < 258 and sum(t in other for other in whole) == 1)
        for row in whole
    ]
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    _make_special(folder, *ends)
    ours, theirs = OptDeusModel(str(folder)), hf_backend(str(folder))
    assert ours.model.tokenizer.eos_ids == (0, *ends[:2])
    assert ours.eot_token_id == theirs.eot_token_id == ends[1]
    settings = {"until": [f"<|{ends[2]}|>"], "max_gen_toks": 12}
    requests = _requests("generate_until", [(text, dict(settings)) for text in texts])
    found = ours.generate_until(requests, disable_tqdm=True)
    assert found == [theirs.generate_until([one], disable_tqdm=True)[0] for one in requests]
    cut = [row[: row.index(end)] for row, end in zip(whole, ends, strict=True)]
    assert found == [model.model.tokenizer.decode(row) for row in cut]


@pytest.mark.parametrize("layout", ["top", "uniform"])
def test_a_grown_model_answers_exactly_as_its_base(
    checkpoint: Path, model: OptDeusModel, tmp_path: Path, layout: str
) -> None:
    source, folder = open_checkpoint(str(checkpoint)), tmp_path / "grown"
    upscale = UpscaleConfig(method="opt_deus", layout=layout, num_new_layers=1)
    expand_checkpoint(source, upscale, folder, probe_BT=probe_tokens(source), max_shard_bytes=10**9)
    grown = OptDeusModel(str(folder))
    assert (model.model.config.num_layers, grown.model.config.num_layers) == (2, 3)
    arguments = [("the base", " computes"), ("the " * 120, "grown model"), ("A.", " B")]
    requests = _requests("loglikelihood", arguments)
    texts = _requests("loglikelihood_rolling", [("what its base computes " * 30,), ("A.",)])
    # Every bit of every sum.
    assert grown.loglikelihood(requests, True) == model.loglikelihood(requests, True)
    assert grown.loglikelihood_rolling(texts, True) == model.loglikelihood_rolling(texts, True)


def test_settings_of_generation_that_cannot_be_kept_are_refused(model: OptDeusModel) -> None:
    for settings, named in (({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 96}, "context")):
        with pytest.raises(UserError, match=named):
            model.generate_until(_requests("generate_until", [("the", settings)]), True)
    with pytest.raises(UserError, match="batch_tokens"):
        OptDeusModel(model.model, batch_size=8)


def test_smollm2_equals_the_hf_backend(questions: Path) -> None:
    source = smollm2()
    tokenizer = load_tokenizer(source.side_files, source.hf_config, source.name)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    config = read_model_config(source.hf_config)
    ours = OptDeusModel(LoadedModel(params_of(source), config, tokenizer, mesh), batch_tokens=256)
    tensors = {name: source.read(name) for name in source.tensors}
    files = {name: source.side_files[name] for name in ("tokenizer.json",)}
    backend = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]),
        **tokenizer.special_tokens,
    )
    theirs = hf_backend(oracle_model(source.hf_config, tensors), tokenizer=backend)
    settings = EvaluationConfig(
        tasks=("arc_easy", "winogrande", "wikitext"), local_data=str(questions), limit=2
    )
    tasks = load_tasks(settings)
    answers = [run_tasks(one, settings, tasks=tasks, log_samples=True) for one in (ours, theirs)]
    assert _assert_same_answers(*answers) == 2 * (4 + 2)
    mine, other = (one["results"]["wikitext"]["word_perplexity,none"] for one in answers)
    assert mine == pytest.approx(other, rel=1e-3)
