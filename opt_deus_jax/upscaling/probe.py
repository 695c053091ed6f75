"""Real tokens on which a grown model is run against its base."""

import numpy as np

from opt_deus_jax.checkpoints.source import CheckpointSource
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer

_TEXT = """A language model reads a text from left to right and says, after every word, which words
may come next. The deeper it is, the more steps it can take between reading and answering. In 1781,
William Herschel found a planet beyond Saturn; at first he took it for a comet. Its year is 84 of
ours, and its axis lies almost in the plane of its orbit, so each pole has 42 years of sunlight.

def fibonacci(n: int) -> list[int]:
    sequence = [0, 1]
    while len(sequence) < n:
        sequence.append(sequence[-1] + sequence[-2])
    return sequence[:n]

Les mots changent d'une langue a l'autre, mais 7 x 8 = 56 partout. The price rose from $3.20 to
$4.75 (a gain of 48.4%), which surprised nobody who had read the report: "Supply is tight," it said.
"""
_LENGTH = 128


def probe_tokens(source: CheckpointSource) -> np.ndarray:
    """Tokenises a fixed text with the checkpoint's own tokenizer.

    Args:
        source: A checkpoint; without a tokenizer.json among its files, token ids are spread over
            the vocabulary instead.

    Returns:
        int32 [b, t].

    Raises:
        UserError: The tokenizer does not fit the model.
    """
    vocabulary = source.hf_config["vocab_size"]
    if "tokenizer.json" in source.side_files:
        tokens = load_tokenizer(source.side_files, source.hf_config, source.name).encode(_TEXT)
    else:
        tokens = np.random.default_rng(0).integers(0, vocabulary, 2 * _LENGTH).tolist()
    length = min(_LENGTH, len(tokens), source.hf_config.get("max_position_embeddings", _LENGTH))
    rows = max(1, min(2, len(tokens) // length))
    return np.asarray(tokens[: rows * length], np.int32).reshape(rows, length)
