"""Evaluation tasks of lm-evaluation-harness: the paper's suite, and their data from local files or the hub. A
local task is the harness's own definition (prompt, choices, metrics) with the data swapped for a file."""

from __future__ import annotations

import difflib
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PAPER = "paper"
"""Stands for all of :data:`PAPER_TASKS`."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
"""How the names of local data files may go on behind the task's."""
_SPLIT = "test"
_CLOSE = 0.6


@dataclass(frozen=True)
class PaperTask:
    """One column of the paper's table."""

    name: str
    """In the harness."""
    label: str
    """In the paper."""
    metric: str
    """What the paper reports, as the harness names it."""
    definition: str
    """File of the harness, relative to its ``tasks`` folder."""
    fields: str
    """What a row of its data must have, separated by spaces."""


PAPER_TASKS = (
    PaperTask("wikitext", "Wikitext ppl", "word_perplexity", "wikitext/wikitext.yaml", "page"),
    PaperTask("lambada_openai", "LAMBADA", "acc", "lambada/lambada_openai.yaml", "text"),
    PaperTask("piqa", "PiQA", "acc_norm", "piqa/piqa.yaml", "goal sol1 sol2 label"),
    PaperTask(
        "hellaswag",
        "HellaSwag",
        "acc_norm",
        "hellaswag/hellaswag.yaml",
        "activity_label ctx_a ctx_b endings label",
    ),
    PaperTask(
        "sciq",
        "SciQ",
        "acc",
        "sciq/sciq.yaml",
        "question support correct_answer distractor1 distractor2 distractor3",
    ),
    PaperTask("arc_challenge", "ARC-c", "acc_norm", "arc/arc_challenge.yaml", "question choices answerKey"),
    PaperTask(
        "winogrande", "WinoGrande", "acc", "winogrande/default.yaml", "sentence option1 option2 answer"
    ),
)
_BY_NAME = {task.name: task for task in PAPER_TASKS}


def task_names(wanted: Sequence[str]) -> list[str]:
    """The tasks that a list of names means: ``paper`` stands for seven, none is named twice.

    Raises:
        ValueError: there is no name.
    """
    names: list[str] = []
    for name in wanted:
        names += [task.name for task in PAPER_TASKS] if name.strip() == PAPER else [name.strip()]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ValueError(
            "no evaluation task is named; give 'paper' or names of lm-evaluation-harness such as "
            "lambada_openai,piqa"
        )
    return names


def check_installed() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        ValueError: it is not installed.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ValueError(
            "evaluation tasks need lm-evaluation-harness, which is not installed here; "
            "run pip install 'megatron-iiet[eval]'"
        )


def find_data(names: Sequence[str], data_dir: str | Path) -> dict[str, Path]:
    """The local data file of every task: ``data_dir/NAME`` with one of the :data:`SUFFIXES`.

    Raises:
        ValueError: a file is missing.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "does not exist"
        raise ValueError(
            f"the folder of evaluation data {folder} {found}; name one with NAME.jsonl of each task"
        )
    files = {}
    for name in names:
        choices = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        file = next((choice for choice in choices if choice.is_file()), None)
        if file is None:
            raise ValueError(
                f"{choices[0]} is missing, the data of evaluation task '{name}' (or the same name ending in "
                f"{', '.join(SUFFIXES[1:])}); put it there, or leave the task out"
            )
        files[name] = file
    return files


def load_tasks(names: Sequence[str], data_dir: str | Path = "") -> dict[str, Any]:
    """The tasks as the harness's ``TaskManager.load`` returns them, zero-shot unless their definition says
    otherwise; with ``data_dir`` from local files alone, else from the hub or its cache.

    Raises:
        ValueError: the harness is not installed, a task does not exist, generates text instead of scoring
            it, or its data is missing or damaged.
    """
    check_installed()
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the console is for our own lines
    datasets.disable_progress_bars()
    loaded = _load_local(names, data_dir) if data_dir else _load_online(names)
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in ("loglikelihood", "loglikelihood_rolling", "multiple_choice"):
            raise ValueError(
                f"evaluation task '{name}' needs {task.OUTPUT_TYPE}, but only tasks that score given text "
                "run here; export the model and run it with lm_eval --model hf"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _load_online(names: Sequence[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    usual = [_usual_definition(name) for name in names]
    if None in usual:
        for name in names:
            _check_known(name)
        manager, specs = _index(), list(names)
    else:
        manager, specs = TaskManager(include_defaults=False), [str(path) for path in usual]
    try:
        return dict(manager.load(specs))
    except Exception as error:  # whatever the hub, the network or a dataset's reader raises
        raise ValueError(
            f"the data of evaluation tasks {', '.join(names)} could not be loaded ({_first_line(error)}); "
            "without access to the Hugging Face hub give local files with --data-dir "
            "(evaluation.tasks_data_dir in training)"
        ) from error


def _load_local(names: Sequence[str], data_dir: str | Path) -> dict[str, Any]:
    import datasets
    import yaml
    from lm_eval.tasks import TaskManager

    files = find_data(names, data_dir)
    # Caches lie in the same temporary folder: nothing stale is read, no two processes write one file.
    with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
        readers, arguments = {}, {}
        for name, file in files.items():
            readers[name] = "parquet" if file.suffix == ".parquet" else "json"
            data_files = {_SPLIT: str(file.resolve())}
            arguments[name] = {"data_files": data_files, "cache_dir": folder, "keep_in_memory": True}
            definition = {
                "include": str(_definition(name)),
                "task": name,
                "dataset_path": readers[name],
                "dataset_name": None,
                "dataset_kwargs": arguments[name],
                "training_split": None,
                "validation_split": None,
                "fewshot_split": None,
                "test_split": _SPLIT,
            }
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(definition))
        manager = TaskManager(include_path=folder, include_defaults=False)
        tasks: dict[str, Any] = {}
        for name, file in files.items():
            with _readable(name, file):
                rows = datasets.load_dataset(readers[name], **arguments[name])[_SPLIT]
            _check_rows(rows, name, file)
            with _readable(name, file):
                tasks |= manager.load([name])["tasks"]
    return {"tasks": tasks, "groups": {}, "group_map": {}}


@contextmanager
def _readable(name: str, file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each reader of the datasets library has exceptions of its own
        raise ValueError(
            f"{file} cannot be read as the data of evaluation task '{name}' "
            f"({_first_line(error.__cause__ or error)}); repair it or leave the task out"
        ) from error


def _check_rows(rows: Any, name: str, file: Path) -> None:
    """Refuse a file without rows, or whose rows lack what the paper's task reads of them."""
    if not len(rows):
        raise ValueError(f"{file}, the data of evaluation task '{name}', has no rows; put some there")
    wanted = _BY_NAME[name].fields.split() if name in _BY_NAME else []
    missing = [field for field in wanted if field not in rows.features]
    if missing:
        raise ValueError(
            f"{file}: its rows have no '{missing[0]}' but {', '.join(rows.column_names)}; evaluation task "
            f"'{name}' needs {', '.join(wanted)}"
        )


@cache
def _index() -> Any:
    """The harness's index of all it has, which takes a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _definition(name: str) -> Path:
    usual = _usual_definition(name)
    if usual is not None:
        return usual
    _check_known(name)
    path = _index().task_index[name].yaml_path
    if name not in _index().all_subtasks or path is None:
        raise ValueError(
            f"'{name}' names a group of evaluation tasks or one without a definition file, which has no "
            "data file of its own; name its tasks one by one"
        )
    return Path(path)


def _usual_definition(name: str) -> Path | None:
    """Where the definition of a task lies if it is the paper's or lies where most do; needs no index."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    if name in _BY_NAME:
        return root / _BY_NAME[name].definition
    path = root / name / f"{name}.yaml"
    if not re.fullmatch(r"\w+", name) or not path.is_file():
        return None
    return path if f"task: {name}" in path.read_text().splitlines() else None


def _check_known(name: str) -> None:
    known = _index().all_tasks
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3, cutoff=_CLOSE)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; lm_eval ls tasks lists them all"
    raise ValueError(f"lm-evaluation-harness has no task '{name}'{hint}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
