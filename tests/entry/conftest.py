"""A base and a text so small that every stage runs in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from opt_deus_jax.models.model_config import read_model_config
from opt_deus_jax.models.params import named_tensors
from tests.entry.launching import CONFIG, sentence, succeed


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300,  # pyright: ignore
        special_tokens=["<|end|>"],  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator([sentence(0, 200)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(hf_config))
    draw = np.random.default_rng(1)
    tensors = {
        name: np.ones(spec.shape, np.float32)
        if spec.init == "ones"
        else draw.normal(0, 0.1, spec.shape).astype(np.float32)
        for name, spec in named_tensors(read_model_config(hf_config), 4)
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="package")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(i, 60)}) + "\n" for i in range(40)))
    return path


@pytest.fixture(scope="package")
def flags(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    workdir = tmp_path_factory.mktemp("run")
    common = [f"--config={CONFIG}", f"--config.base={base}", f"--config.data.train={text}"]
    return [*common, f"--workdir={workdir}"]


@pytest.fixture(scope="package")
def workdir(flags: list[str]) -> Path:
    """The work directory after every stage has been run."""
    directory = Path(flags[-1].removeprefix("--workdir="))
    succeed("expand", *flags)
    succeed("prepare_data", *flags)
    succeed("train", *flags)
    succeed("export", *flags)
    return directory
