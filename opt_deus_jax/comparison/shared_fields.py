"""Errors about what all contenders share, with the names by which a comparison sets it."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from opt_deus_jax.config import Experiment
from opt_deus_jax.errors import UserError

# Settings of `upscale` are a contender's own, and so is a base once a contender is named.
_PARTS = {
    field.name: [setting.name for setting in dataclasses.fields(field.default_factory)]  # pyright: ignore
    for field in dataclasses.fields(Experiment)
    if field.name != "upscale" and field.default_factory is not dataclasses.MISSING
}
_SETTINGS = "|".join(rf"{part}\.(?:{'|'.join(names)})" for part, names in _PARTS.items())
# Not where the same letters are of a path.
_NAMED = re.compile(
    rf"(?:(?<=--config\.)|(?<![\w./-]))(?=(?:{_SETTINGS})(?![\w/]|\.\w))"
    r"|(?<=--config\.)(?=base\b)|(?<=^config field )(?=base\b)"
)


@contextlib.contextmanager
def naming_shared_fields() -> Iterator[None]:
    """Has errors say `experiment.data.train` where they say `data.train`; also a decorator.

    Raises:
        UserError: What the block raised, so named.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(_NAMED.sub("experiment.", str(error))) from error.__cause__
