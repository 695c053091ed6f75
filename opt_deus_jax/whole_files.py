"""Files that are the old ones or the new ones, whenever the process that writes them is killed."""

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8 beside a file, then puts it in the file's place.

    Args:
        path: The file; its folder exists.
        text: All that will be in it.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON with a final newline as `write_text` does.

    Args:
        path: The file; its folder exists.
        content: What JSON keeps.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
