"""A few rows for each of the paper's tasks, in the formats of their data sets, written for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _rows(fields: str, *values: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(fields.split(), row, strict=True)) for row in values]


_MILL = (
    " = The mill = \n\n The mill stood by the river for 120 years , and ground corn for 3 @,@ 400 people . \n"
)
_FERRY = (
    " = The ferry = \n\n The ferry crossed the strait twice a day . In winter it lay still , for the ice was "
    "thick and the captain ( an old man ) would not risk the hull . \n \n = = Later years = = \n\n A bridge "
    "was built in 1931 . The ferry was sold to a circus , which painted it red and sailed from town to town "
    "with 2 elephants , 11 horses and a band of twenty . \n"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "wikitext": _rows(
        "page",
        (_MILL,),
        (" = A short page = \n\n It ends here . \n",),
        (_FERRY,),
        (" = Bread = \n\n Flour , water , salt and time : the baker 's four tools . \n",),
    ),
    "lambada_openai": _rows(
        "text",
        ("The girl hid the key under the stone. When her brother came home she told him to lift the stone",),
        ("He had saved for a boat all his life. On his birthday he walked to the harbour and bought a boat",),
        ("Nobody owned a clock, so everyone listened for the bell. At noon they all heard the bell",),
        ("She gave the old violin to the repairer. A week later he called and said it was a rare violin",),
    ),
    "piqa": _rows(
        "goal sol1 sol2 label",
        ("keep bread fresh", "put it in a closed box", "leave it in the rain", 0),
        ("open a jar", "shout at the lid", "turn the lid to the left", 1),
        ("clean a window", "wipe it with a wet cloth", "paint it", 0),
        ("find north at night", "look for shoes", "look for the pole star", 1),
    ),
    "hellaswag": _rows(
        "activity_label ctx_a ctx_b endings label",
        (
            "Baking",
            "A woman mixes flour and eggs.",
            "she",
            ["puts the dough into the oven.", "drives to the moon.", "sings to a fish.", "sleeps in it."],
            "0",
        ),
        (
            "Rowing",
            "Four men sit in a long boat.",
            "they",
            ["bake it.", "pull the oars all at once.", "read [substeps] the water.", "fold it in half."],
            "1",
        ),
        (
            "Gardening",
            "A boy digs a hole.",
            "he",
            ["eats the spade.", "phones the hole.", "sets a small tree in it.", "irons it flat."],
            "2",
        ),
        (
            "Climbing",
            "Two friends tie a rope.",
            "the first one",
            ["melts.", "buys a hat.", "is a rope.", "climbs up the wall while the other holds it."],
            "3",
        ),
    ),
    "sciq": _rows(
        "question correct_answer distractor1 distractor2 distractor3 support",
        ("What do bees make?", "honey", "steel", "milk", "paper money", "Bees make honey from nectar."),
        ("What pulls things down?", "gravity", "sound", "light", "paint", ""),
        ("What is ice made of?", "water", "sand", "glass", "salt", "Ice is frozen water."),
        ("Which star is nearest?", "the sun", "the moon", "Mars", "a comet", "  The sun is a star."),
    ),
    "arc_challenge": _rows(
        "id question choices answerKey",
        *(
            (f"row {number}", question, {"text": texts.split(", "), "label": list(labels)}, answer)
            for number, (question, texts, labels, answer) in enumerate(
                (
                    ("Which one flies?", "a swallow, a mole, a trout, a snail", "ABCD", "A"),
                    ("What boils at 100 degrees?", "iron, water, stone", "123", "2"),
                    ("Which needs sunlight?", "a lamp, a coin, an oak tree, a nail", "ABCD", "C"),
                    ("What melts first?", "butter, rock, brass, clay", "ABCD", "A"),
                )
            )
        ),
    ),
    "winogrande": _rows(
        "sentence option1 option2 answer",
        ("The cup fell off the shelf because the _ was wet.", "cup", "shelf", "2"),
        ("Ada lent Eva a coat since _ was cold.", "Ada", "Eva", "2"),
        ("The cart could not pass the gate, for the _ was too wide.", "cart", "gate", "1"),
        ("Tom thanked Max after _ had helped.", "Tom", "Max", "2"),
    ),
}


def write_task_data(folder: Path, names: tuple[str, ...] = tuple(ROWS)) -> Path:
    """``NAME.jsonl`` of each task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        lines = [json.dumps(row) + "\n" for row in ROWS[name]]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder
