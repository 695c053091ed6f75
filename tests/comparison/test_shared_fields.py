"""Errors of a comparison name the fields that its users can set."""

import pytest

from opt_deus_jax.comparison.shared_fields import naming_shared_fields
from opt_deus_jax.errors import DivergedError, UserError


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (
            "no text is named: set --config.data.train=FILES_OR_FOLDERS",
            "no text is named: set --config.experiment.data.train=FILES_OR_FOLDERS",
        ),
        (
            "config field training.steps=0: lower it or optimizer.decay_fraction",
            "config field experiment.training.steps=0: lower it or "
            "experiment.optimizer.decay_fraction",
        ),
        (
            "config field base is empty; set --config.base=FOLDER",
            "config field experiment.base is empty; set --config.experiment.base=FOLDER",
        ),
        ("config field experiment.data.train='': x", "config field experiment.data.train='': x"),
        ("contender a: config field base='b': x", "contender a: config field base='b': x"),
        ("config field upscale.layout='x'", "config field upscale.layout='x'"),
        ("runs/data.train: not text", "runs/data.train: not text"),
        ("data.train.jsonl: not text", "data.train.jsonl: not text"),
    ],
)
def test_a_field_of_the_shared_experiment_is_named_as_it_is_set(said: str, named: str):
    with pytest.raises(UserError) as error, naming_shared_fields():
        raise UserError(said)
    assert str(error.value) == named


def test_the_kind_of_an_error_stays():
    with pytest.raises(DivergedError, match=r"experiment\.training\.steps"), naming_shared_fields():
        raise DivergedError("config field training.steps")
