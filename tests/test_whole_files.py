import json
from pathlib import Path

import pytest

from opt_deus_jax.whole_files import write_json, write_text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "settings.json"
    write_json(path, {"name": "größer"})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "größer"}
    write_json(path, [1])
    assert path.read_text() == "[\n  1\n]\n"
