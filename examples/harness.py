"""Zero-shot scores of one model under dense attention, a plain window, and sinks, by the lm-evaluation-harness.

    pip install "sinks[lm-eval]"
    python examples/harness.py

The task is made here, from Python's language reference, so that nothing but the model is downloaded: after a passage
longer than the window, which of four sentences comes next? Any task of the harness can stand in its place, by name.
"""

import argparse
import json
import random
import re
import tempfile
from pathlib import Path

from lm_eval.tasks import TaskManager

from sinks import load
from sinks.assets.texts import read_text
from sinks.evals.harness import Reading, harness


def questions(count: int, context: int, seed: int = 0) -> list[dict[str, object]]:
    """Passages of about `context` characters, each with its true next sentence and three from elsewhere."""
    text = re.sub(r"\s+", " ", read_text().text)
    sentences = re.findall(r"[A-Z][^.]{40,160}\.(?= [A-Z])", text)
    places = [at for sentence in sentences if (at := text.find(sentence)) > context]
    draw = random.Random(seed)
    found: list[dict[str, object]] = []
    for at in sorted(draw.sample(places, count)):
        true = re.match(r"[^.]*\.", text[at:])
        assert true
        choices = [true[0], *draw.sample([sentence for sentence in sentences if sentence != true[0]], 3)]
        draw.shuffle(choices)
        found.append(
            {"passage": text[at - context : at].rstrip(), "choices": choices, "answer": choices.index(true[0])}
        )
    return found


def task(folder: Path, documents: list[dict[str, object]]) -> TaskManager:
    """A multiple-choice task of the harness over local documents."""
    data = folder / "documents.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    description = {
        "task": "next_sentence",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "next_sentence.yaml").write_text(json.dumps(description))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


def main() -> None:
    """Make the task, run it in every mode, and print one line for each."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", help="name, Hub id, folder or GGUF file; by default the built-in model")
    options.add_argument("--documents", type=int, default=50)
    options.add_argument("--context", type=int, default=3000, help="characters before each question")
    options.add_argument("--sinks", type=int, default=4)
    options.add_argument("--window", type=int, default=252)
    asked = options.parse_args()
    reading = Reading(sinks=asked.sinks, window=asked.window, batch_size=4)  # four choices: each context is read once
    with tempfile.TemporaryDirectory() as folder:
        manager = task(Path(folder), questions(asked.documents, asked.context))
        found = harness(load(asked.model), ["next_sentence"], reading=reading, task_manager=manager)
    for mode, results in found.items():
        scores = results["results"]["next_sentence"]
        shown = [
            f"{name} {scores[f'{name},none']:.3f} ± {scores[f'{name}_stderr,none']:.3f}" for name in ("acc", "acc_norm")
        ]
        print(f"{mode:8}", *shown, sep="  ")


if __name__ == "__main__":
    main()
