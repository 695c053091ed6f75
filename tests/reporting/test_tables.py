import io

import pytest
from rich.console import Console
from rich.table import Table

from opt_deus_jax.models.layer_kinds import LayerKind
from opt_deus_jax.reporting.tables import layer_table, show
from opt_deus_jax.upscaling.layout import plan_layout


def test_layers_of_several_kinds_are_told_apart():
    kinds = [LayerKind(), LayerKind(window=512, rope=1), LayerKind(window=512, rope=None)]
    layers = plan_layout("explicit", 2, 0, gaps=(0,))
    names = [frozenset(), frozenset({"query_kernel"}), frozenset()]
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(layer_table(layers, names, kinds, "grown"))
    rows = [
        line for line in console.export_text().splitlines() if "frozen" in line or "new" in line
    ]
    for row, expected in zip(
        rows, ("full ", "window 512 ", "window 512, not rotated"), strict=True
    ):
        assert expected in row
    assert "A = 0, B = 1" in rows[1]


def test_a_wide_table_is_not_wrapped_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("COLUMNS", raising=False)
    show(Table("x" * 110))
    assert "x" * 110 in capsys.readouterr().out
