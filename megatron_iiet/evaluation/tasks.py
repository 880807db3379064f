"""Evaluation tasks of lm-evaluation-harness: the paper's suite, and their data from local files or the hub. A
local task is the harness's own definition (prompt, choices, metrics) with the data swapped for a file."""

from __future__ import annotations

import difflib
import logging
import re
import socket
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PAPER = "paper"
"""Stands for all of :data:`PAPER_TASKS`."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
"""How the names of local data files may go on behind the task's."""
SCORES_ONLY = (
    "only tasks that score given text run here; run it on a checkpoint with tools/evaluate.py, on one process"
)
"""Why a model in training generates no text."""
_SPLIT = "test"
_CLOSE = 0.6
_NAMES = re.compile(r"""^(?:task|group|tag):[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
_REACH_SECONDS = 5.0
_GENERATION = (
    *("until", "do_sample", "temperature", "top_p", "top_k", "num_beams"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
)
"""What a task that generates text may say of how."""


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


def check_known(names: Sequence[str], include_path: str | Path = "") -> None:
    """Refuse a name that is no task, before anything is loaded.

    Raises:
        ValueError: with the names most like it; or ``include_path`` has no task.
    """
    own = _own_tasks(include_path)
    for name in names:
        if name not in own.all_tasks and _usual_definition(name) is None:
            _check_known(name, own.all_tasks, include_path)


def without_own(names: Sequence[str], include_path: str | Path) -> list[str]:
    """The tasks that are not defined in ``include_path``: those of the harness."""
    own = _own_tasks(include_path).all_tasks
    return [name for name in names if name not in own]


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


def load_tasks(
    names: Sequence[str],
    data_dir: str | Path = "",
    include_path: str | Path = "",
    no_generation: str = SCORES_ONLY,
) -> dict[str, Any]:
    """The tasks as the harness's ``TaskManager.load`` returns them, zero-shot unless their definition says
    otherwise; with ``data_dir`` from local files alone, else from the hub or its cache.

    Args:
        include_path: a folder of definitions of one's own, which go first and bring their own data.
        no_generation: why the model generates no text; empty: it does.

    Raises:
        ValueError: the harness is not installed, a task does not exist, generates text although the model
            does not, or in a way that is not supported, or its data is missing or damaged.
    """
    check_installed()
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the console is for our own lines
    datasets.disable_progress_bars()
    check_known(names, include_path)
    own = _own_tasks(include_path)
    theirs = without_own(names, include_path)
    mine = [name for name in names if name in own.all_tasks]
    loaded: dict[str, Any] = {}
    if theirs or not mine:
        loaded = _load_local(theirs, data_dir) if data_dir else _load_online(theirs)
    if mine:
        found = _load(own, mine, mine)
        loaded = {part: {**loaded.get(part, {}), **found.get(part, {})} for part in (*loaded, *found)}
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            _check_generation(name, task, no_generation)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


def _check_generation(name: str, task: Any, no_generation: str) -> None:
    if no_generation:
        raise ValueError(f"evaluation task '{name}' needs generate_until, but {no_generation}")
    given = task.get_config("generation_kwargs") or {}
    strange = [key for key in given if key not in _GENERATION or (key == "num_beams" and given[key] != 1)]
    if given.get("do_sample") and not given.get("temperature"):
        strange = ["do_sample"]  # from what distribution it does not say
    if strange:
        raise ValueError(
            f"evaluation task '{name}' has generation_kwargs {strange[0]} = {given[strange[0]]!r}, which is "
            "not supported here; export the model and run it with lm_eval --model hf"
        )


def _own_tasks(include_path: str | Path) -> Any:
    """The harness's index of a folder of definitions; without a folder an empty one.

    Raises:
        ValueError: there is no such folder, or no task in it.
    """
    from lm_eval.tasks import TaskManager

    if include_path and not Path(include_path).is_dir():
        raise ValueError(f"the folder of task definitions {include_path} does not exist; name another")
    found = TaskManager(include_path=str(include_path) or None, include_defaults=False)
    if include_path and not found.all_tasks:
        raise ValueError(
            f"the folder of task definitions {include_path} has none that lm-evaluation-harness can read; "
            "put NAME.yaml with 'task: NAME' there"
        )
    return found


def _load_online(names: Sequence[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    usual = [_usual_definition(name) for name in names]
    if None in usual:
        return _load(_index(), names, names)
    return _load(TaskManager(include_defaults=False), names, [str(path) for path in usual])


def _load(manager: Any, names: Sequence[str], specs: Sequence[str]) -> dict[str, Any]:
    """The tasks that ``specs`` stand for, names or files of definitions."""
    try:
        with _offline_without_hub():
            return dict(manager.load(list(specs)))
    except Exception as error:  # whatever the hub, the network or a dataset's reader raises
        raise ValueError(
            f"the data of evaluation tasks {', '.join(names)} could not be loaded ({_first_line(error)}); "
            "without access to the Hugging Face hub give local files with --data-dir "
            "(evaluation.tasks_data_dir in training)"
        ) from error


@contextmanager
def _offline_without_hub() -> Iterator[None]:
    """Where the hub cannot be reached, its libraries look into their caches at once, and do not try five
    times before."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _reachable(address: str) -> bool:
    """Whether a server takes connections; behind a proxy it is the proxy's affair."""
    url = urlsplit(address)
    if urllib.request.getproxies():
        return True
    try:
        port = url.port or {"http": 80}.get(url.scheme, 443)
        socket.create_connection((url.hostname, port), _REACH_SECONDS).close()
    except OSError:
        return False
    return True


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
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
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
    return path if f"task: {name}" in path.read_text(encoding="utf-8").splitlines() else None


def _check_known(name: str, own: Sequence[str], include_path: str | Path) -> None:
    texts = _definitions()
    # The index takes a minute; most misspelt names are nowhere in what it would read.
    if any(name in text for text in texts) and name in _index().all_tasks:
        return
    known = [found for text in texts for found in _NAMES.findall(text)]
    near = difflib.get_close_matches(name, dict.fromkeys([*own, *known]), n=3, cutoff=_CLOSE)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; lm_eval ls tasks lists them all"
    where = f"neither lm-evaluation-harness nor {include_path} has a"
    raise ValueError(f"{where if own else 'lm-evaluation-harness has no'} task '{name}'{hint}")


@cache
def _definitions() -> list[str]:
    """The texts of the harness's definitions."""
    import lm_eval.tasks

    files = sorted(Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
