"""A few made-up questions of each of the paper's tasks, in the files of lm_eval's data sets."""

import gzip
import json
from pathlib import Path

import lm_eval.tasks
import numpy as np

_TEXT = "the grown model computes what its base computes and then it learns more from text"


def _text(draw: np.random.Generator, words: int) -> str:
    return " ".join(draw.choice(_TEXT.split(), words))


def _subjects() -> list[str]:
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    return sorted(path.stem.removeprefix("mmlu_") for path in folder.glob("mmlu_*.yaml"))


def _rows(draw: np.random.Generator, count: int) -> dict[str, list[dict]]:
    def text(words: int) -> str:
        return _text(draw, words)

    def texts(count: int, words: int) -> list[str]:
        return [text(int(draw.integers(1, words + 1))) for _ in range(count)]

    numbers = range(count)
    return {
        "arc_easy_test": [
            {
                "question": text(9),
                "choices": {"text": texts(4, 5), "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4],
            }
            for i in numbers
        ],
        "logiqa_test": [
            {"label": "abcd"[i % 4], "context": text(20), "question": text(6)}
            | {"options": texts(4, 6)}
            for i in numbers
        ],
        "winogrande_xl_validation": [
            {"sentence": f"{text(5)} _ {text(4)}.", "option1": "model", "option2": "base"}
            | {"answer": "12"[i % 2]}
            for i in numbers
        ],
        "commonsense_qa_validation": [
            {"question": text(8), "choices": {"label": list("ABCDE"), "text": texts(5, 2)}}
            | {"answerKey": "ABCDE"[i % 5]}
            for i in numbers
        ],
        "boolq_validation": [
            {"question": text(5), "passage": text(25), "label": i % 2} for i in numbers
        ],
        "piqa_validation": [
            {"goal": text(6), "sol1": text(9), "sol2": text(9), "label": i % 2} for i in numbers
        ],
        "mmlu_test": [
            {"question": text(6), "subject": subject, "choices": texts(4, 2), "answer": i % 4}
            for subject in _subjects()
            for i in range(2)
        ],
        # Longer than the model's context, and shorter.
        "wikitext2_raw_document_level_test": [
            {"page": f" = {text(2)} = \n \n {text(words)} . "} for words in (150, 20)
        ],
    }


def write_questions(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for name, rows in _rows(np.random.default_rng(5), count).items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder
