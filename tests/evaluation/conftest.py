"""A tiny random Llama with a tokenizer, the questions, and lm_eval's own backend for both."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from opt_deus_jax.evaluation.lm_eval_model import OptDeusModel
from tests.evaluation.questions import write_questions
from tests.llama_checkpoints import hf_config, random_tensors, write_directory

WORDS = "Question: Answer: A. B. C. D. E. the grown model computes what its base computes"


def write_tokenizer(directory: Path, adds_bos: bool) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,  # pyright: ignore
        special_tokens=["<|end|>", "<|begin|>"],  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    config = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if adds_bos:
        config["bos_token"] = "<|begin|>"
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(directory: Path, adds_bos: bool = False) -> Path:
    """Its context is short, so that questions are cut."""
    config = hf_config(
        vocab_size=304,
        num_hidden_layers=2,
        max_position_embeddings=96,
        eos_token_id=0,
        bos_token_id=1 if adds_bos else None,
        dtype="float32",
    )
    write_directory(directory, config, random_tensors(config, scale=0.3))
    write_tokenizer(directory, adds_bos)
    return directory


def hf_backend(pretrained: Any, **arguments: Any) -> Any:
    backend: Any = HFLM
    return backend(pretrained, device="cpu", dtype="float32", batch_size=4, **arguments)


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="package")
def model(checkpoint: Path) -> OptDeusModel:
    return OptDeusModel(str(checkpoint))


@pytest.fixture(scope="package")
def oracle(checkpoint: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()
    return hf_backend(str(checkpoint))


@pytest.fixture(scope="package")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "lmeval")
