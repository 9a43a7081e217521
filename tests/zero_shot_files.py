"""Small copies of the zero-shot tasks, in the datasets' columns and in words that the tests' tokenizer knows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "then", "sleeps", "in", "sun"]


def documents(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` random documents of ``task``."""
    rng = random.Random(f"{task} {seed}")

    def text(most: int = 4) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    def lettered() -> dict[str, Any]:
        labels = ["A", "B", "C", "D"][: rng.randint(3, 4)]
        return {"choices": {"text": [text() for _ in labels], "label": labels}, "answerKey": rng.choice(labels)}

    def document() -> dict[str, Any]:
        match task:
            case "winogrande":
                sentence = f"{text()} _ {text()}"
                return {"sentence": sentence, "option1": "fox", "option2": "dog", "answer": rng.choice("12")}
            case "openbookqa":
                return {"id": "x", "question_stem": text(), **lettered()}
            case "boolq":
                return {"passage": text(), "question": text(), "label": rng.randint(0, 1), "idx": 0}
            case "piqa":
                return {"goal": text(), "sol1": text(), "sol2": text(), "label": rng.randint(0, 1)}
            case "hellaswag":
                endings = [text() for _ in range(4)]
                context = {"activity_label": "dog", "ctx_a": text(2), "ctx_b": text(2)}
                return {**context, "endings": endings, "label": str(rng.randint(0, 3))}
            case _:
                return {"id": "x", "question": text(), **lettered()}

    return [document() for _ in range(count)]


def write_task(folder: Path, task: str, count: int = 8, name: str | None = None) -> Path:
    """Write ``count`` documents of ``task`` into ``folder``."""
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"{task}.jsonl")
    path.write_text("".join(json.dumps(document) + "\n" for document in documents(task, count)), encoding="utf-8")
    return path
