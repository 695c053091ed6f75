import sys

import pytest

from opt_deus_jax.launch import config_arguments


def test_config_flags_are_found_in_both_spellings(monkeypatch: pytest.MonkeyPatch):
    line = "NAME --config a.py:b --workdir=w --config.base=x,y=z --config.data.packing --only=c"
    monkeypatch.setattr(sys, "argv", line.split())
    assert config_arguments() == [
        ("--config", "a.py:b"),
        ("--config.base", "x,y=z"),
        ("--config.data.packing", ""),
    ]
