r"""Tokenises text or instructions into fixed-length records.

python -m experiments.prepare_data --config=configs/smollm2_135m.py:demo --workdir=runs/first
Writes WORKDIR/records. Text: --config.data.train=FILES_OR_FOLDERS (txt, jsonl, jsonl.gz, .zst, .xz,
parquet) or docstrings: for the docstrings of the installed packages. Instructions:
--config.data.format=alpaca or messages, from json, jsonl, jsonl.gz, .zst, .xz or parquet; only the
answers are trained on. Run again, it checks that the text is still the same.
"""

import hashlib

from rich.table import Table

from opt_deus_jax import launch
from opt_deus_jax.checkpoints.opening import open_checkpoint
from opt_deus_jax.checkpoints.tokenizer import load_tokenizer
from opt_deus_jax.data.preparation import prepare_records
from opt_deus_jax.reporting.tables import show

launch.define_flags()


def main() -> None:
    """Tokenises with the base's own tokenizer."""
    experiment, workdir = launch.start(("base", "data"))
    source = open_checkpoint(experiment.base)
    tokenizer = load_tokenizer(source.side_files, source.hf_config, source.name)
    info = prepare_records(
        workdir / "records",
        experiment.data,
        tokenizer,
        tokenizer_fingerprint=hashlib.sha256(tokenizer.tokenizer_json).hexdigest(),
        vocabulary_size=source.hf_config["vocab_size"],
    )
    shown = {"documents": "documents", "records": "sequences", "tokens": "tokens"}
    if experiment.data.format != "text":
        shown |= {
            "documents": "examples",
            "predicted_tokens": "tokens of answers",
            "truncated": "answers cut at data.sequence_length",
            "dropped": "examples left out: answer beyond it",
        }
    table = Table("", *info.splits, title=f"{workdir / 'records'}")
    for field, label in shown.items():
        table.add_row(label, *(f"{getattr(split, field):,}" for split in info.splits.values()))
    show(table)


if __name__ == "__main__":
    launch.run(main)
