"""The tool around the harness: tasks and their data, the paper's table, what is written, what is refused."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.evaluation import tasks
from megatron_iiet.evaluation.evaluate import Options, _as_data, _load_in_turn, _report, evaluate_model
from megatron_iiet.evaluation.harness import TaskResults
from megatron_iiet.evaluation.models import ModelOptions, prepare_model
from megatron_iiet.evaluation.paper_table import (
    PAPER_SIZES,
    all_metrics_table,
    mean_accuracy,
    paper_size,
    paper_table,
)
from megatron_iiet.evaluation.tasks import PAPER_TASKS, find_data, load_tasks, task_names
from megatron_iiet.models import Transformer
from megatron_iiet.storage import portable
from tests.data.hub_server import serve_hub
from tests.evaluation.task_data import ROWS, write_task_data
from tests.tiny import make_data, tiny_config
from tests.tool_runs import run_here

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable folder with a SentencePiece tokenizer, as tools/convert_checkpoint.py makes it."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(make_data(folder), folder / "run", model={"max_position_embeddings": 128})
    transformer = Transformer(config)
    transformer.initialise(3)
    config.data.tokenizer = "tokenizer.model"
    state = dict(transformer.named_parameters())
    portable.save(config, state, folder / "model", extra_files=[folder / "tokenizer.model"])
    return folder / "model"


def test_names() -> None:
    paper = [task.name for task in PAPER_TASKS]
    assert task_names(["paper"]) == paper == list(ROWS)
    assert task_names(["piqa", " boolq", "piqa", "paper"]) == ["piqa", "boolq"] + [
        n for n in paper if n != "piqa"
    ]
    with pytest.raises(ValueError, match="no evaluation task is named; give 'paper'"):
        task_names([""])


def test_definitions_are_those_of_the_harness(data: Path) -> None:
    """What our files name is what the harness has under that name, metric and fields included."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    for task in PAPER_TASKS:
        text = (root / task.definition).read_text()
        assert f"task: {task.name}\n" in text
        loaded = load_tasks([task.name], data)["tasks"][task.name]
        metrics = {entry["metric"] for entry in loaded.config.metric_list}
        assert task.metric in metrics
        assert loaded.get_config("num_fewshot") == 0
        assert len(loaded.eval_docs) == len(ROWS[task.name])


def test_data_files_of_every_kind(tmp_path: Path) -> None:
    """Packed and columnar files hold the same rows; the plain one goes first."""
    import pandas as pd

    rows = ROWS["piqa"]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    expected = [row["goal"] for row in rows]
    for kind in ("jsonl.gz", "parquet", "jsonl"):
        file = tmp_path / f"piqa.{kind}"
        if kind == "parquet":
            pd.DataFrame(rows).to_parquet(file)
        else:
            file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
        assert find_data(["piqa"], tmp_path)["piqa"] == (
            tmp_path / "piqa.jsonl.gz" if kind == "parquet" else file
        )
        if kind == "parquet":
            (tmp_path / "piqa.jsonl.gz").unlink()
        docs = load_tasks(["piqa"], tmp_path)["tasks"]["piqa"].eval_docs
        assert [doc["goal"] for doc in docs] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sciq", None, r"sciq\.jsonl is missing, the data of evaluation task 'sciq' .*\.parquet"),
        ("sciq", "", r"sciq\.jsonl.*'sciq'"),
        ("sciq", '{"question": "a"}\n', r"sciq\.jsonl: its rows have no 'support' but question;"),
        (
            "sciq",
            '{"question": "a", \n',
            r"sciq\.jsonl cannot be read as the data of evaluation task 'sciq' \(",
        ),
        ("gsm8k", '{"question": "1 + 1?", "answer": "#### 2"}\n', "'gsm8k' needs generate_until, but only"),
    ],
)
def test_bad_data(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / f"{name}.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tasks([name], tmp_path)


@pytest.mark.parametrize(("suffix", "content"), [("jsonl", ""), ("jsonl", "\n"), ("json", "[]")])
def test_a_file_without_rows(suffix: str, content: str, tmp_path: Path) -> None:
    (tmp_path / f"lambada_openai.{suffix}").write_text(content)
    with pytest.raises(ValueError, match=rf"lambada_openai\.{suffix}.* of evaluation task 'lambada_openai'"):
        load_tasks(["lambada_openai"], tmp_path)


def test_no_folder_of_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist; name one with NAME.jsonl"):
        find_data(["piqa"], tmp_path / "nowhere")


@pytest.mark.slow
def test_unknown_tasks_and_groups(tmp_path: Path) -> None:
    for name, message in (
        ("helaswag", "no task 'helaswag'; did you mean hellaswag"),
        ("mmlu", "names a group"),
    ):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=message):
            load_tasks([name], tmp_path)


def metrics(**values: float) -> dict[str, dict[str, float]]:
    return {task.name: {task.metric: values[task.name]} for task in PAPER_TASKS if task.name in values}


def test_paper_table() -> None:
    measured = metrics(
        wikitext=24.987,
        lambada_openai=0.41,
        piqa=0.6,
        hellaswag=0.5,
        sciq=0.9,
        arc_challenge=0.25,
        winogrande=0.5,
    )
    size = paper_size(1024, 24)
    assert size is not None
    assert (size.name, size.tokens) == ("340M", "16 B")
    lines = paper_table("IIET paper, r = 3", measured, size).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    labels = ["Wikitext ppl ↓", *(f"{task.label} ↑" for task in PAPER_TASKS[1:]), "mean ↑"]
    assert cells[0] == ["", *labels]
    assert cells[2] == ["IIET paper, r = 3", "24.99", "41.0", "60.0", "50.0", "90.0", "25.0", "50.0", "52.7"]
    blank = ["–"] * 6
    assert ["paper: IIET", "25.00", *blank, "48.9"] in cells
    assert ["paper: Transformer++", "28.20", *blank, "46.5"] in cells
    assert len(set(map(len, lines))) == 1
    assert mean_accuracy(measured) == pytest.approx(3.16 / 6)


def test_paper_table_of_some_tasks() -> None:
    lines = paper_table("rk2", metrics(piqa=0.5), None).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["rk2", "–", "–", "50.0", *["–"] * 5]
    assert len(lines) == 3
    assert mean_accuracy(metrics(piqa=0.5)) is None


def test_paper_sizes() -> None:
    """The gains that the abstract states follow from the table."""
    assert paper_size(512, 12) is None
    for size in PAPER_SIZES[:2]:
        rows = {row.system: row for row in size.rows}
        plain, iiet, lite = rows["Transformer++"], rows["IIET"], rows["E-IIET"]
        assert iiet.perplexity < lite.perplexity < plain.perplexity  # type: ignore[operator]
        assert iiet.mean_accuracy >= lite.mean_accuracy > plain.mean_accuracy  # type: ignore[operator]
    gains = [
        rows["IIET"].mean_accuracy - rows["Transformer++"].mean_accuracy
        for size in PAPER_SIZES[:2]
        for rows in [{row.system: row for row in size.rows}]
    ]
    assert sum(gains) / 2 == pytest.approx(2.65, abs=0.051)


def test_what_the_paper_reports() -> None:
    """Tables 1 and 2 of arXiv 2509.22463, copied a second time."""
    assert [(size.name, size.tokens, size.hidden_size, size.num_layers) for size in PAPER_SIZES] == [
        ("340M", "16 B", 1024, 24), ("740M", "30 B", 1536, 24), ("1.3B", "16 B", 2048, 24),
    ]  # fmt: skip
    rows = [
        [f"{row.system}: {row.perplexity} {row.mean_accuracy}" for row in size.rows] for size in PAPER_SIZES
    ]
    assert rows == [
        [
            "Transformer++: 28.2 46.5", "Trans WS (4×): None 46.3", "PCformer: 25.7 48.3", "IIET: 25.0 48.9",
            "Distil PCformer: 27.2 47.6", "Lower Bound: 27.0 48.4", "E-IIET: 25.7 48.9",
        ],
        [
            "Transformer++: 23.3 49.0", "PCformer: 21.2 50.9", "IIET: 20.7 51.9",
            "Distil PCformer: 22.5 49.6", "Lower Bound: 23.0 50.3", "E-IIET: 21.2 51.3",
        ],
        ["Transformer++: None 49.0"],
    ]  # fmt: skip
    for size in PAPER_SIZES:
        assert paper_size(size.hidden_size, size.num_layers) is size
        assert paper_size(size.hidden_size, size.num_layers + 1) is None


SIZED = "The paper's (arXiv 2509.22463) models of 740M saw 30 B tokens."
UNSIZED = "The paper (arXiv 2509.22463) reports no model of this size."
LIMITED = "Measured on the first 1 rows of each task: no figures of the whole tasks."


@pytest.mark.parametrize(
    ("found", "shape", "limit", "words"),
    [
        ({"piqa": {"acc": 0.5}}, (1536, 24), None, SIZED),
        ({"piqa": {"acc": 0.5}}, (8, 24), None, UNSIZED),
        ({"boolq": {"acc": 0.5}}, (1536, 24), None, ""),
        ({"boolq": {"acc": 0.5}}, (1, 1), 1, LIMITED),
    ],
)  # fmt: skip
def test_what_a_report_says(
    found: dict[str, dict[str, float]], shape: tuple[int, int], limit: int | None, words: str
) -> None:
    """The paper's table where its tasks were measured, one sentence of what is beside it, all metrics."""
    prepared = cast(Any, SimpleNamespace(system="rk2", hidden_size=shape[0], num_layers=shape[1]))
    results = TaskResults(found, dict.fromkeys(found, 7))
    text = _report(Options(ModelOptions("nowhere"), limit=limit), prepared, results)
    *head, last = text.split("\n\n")
    assert last == all_metrics_table(results.metrics, results.rows)
    table = [paper_table("rk2", found, paper_size(*shape))] if "piqa" in found else []
    assert head == [*table, words] if words else head == []


def test_the_console_is_left_to_our_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    logger = logging.getLogger("lm_eval")
    shown, level = datasets.are_progress_bars_disabled(), logger.level
    monkeypatch.setattr(tasks, "_load_local", lambda names, folder: {"tasks": {}})
    try:
        datasets.enable_progress_bars()
        logger.setLevel(logging.INFO)
        assert load_tasks([], "somewhere") == {"tasks": {}}
        assert datasets.are_progress_bars_disabled()
        assert logger.getEffectiveLevel() == logging.ERROR
    finally:
        (datasets.disable_progress_bars if shown else datasets.enable_progress_bars)()
        logger.setLevel(level)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for work in (lambda: load_tasks(["piqa"]), lambda: evaluate_model(Options(ModelOptions("nowhere")))):
        with pytest.raises(ValueError, match=r"tasks need lm-evaluation-harness, .*'megatron-iiet\[eval\]'"):
            work()


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_of_a_host_downloads(local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    context = cast(
        Any, SimpleNamespace(local_rank=local_rank, barrier=lambda: done.append("all wait for each other"))
    )

    def load(names: list[str], *places: str) -> dict[str, Any]:
        done.append(f"{names} {' '.join(places)}")
        return {"tasks": names}

    monkeypatch.setattr("megatron_iiet.evaluation.evaluate.load_tasks", load)
    assert _load_in_turn(["piqa"], "data", "own", "why", context) == {"tasks": ["piqa"]}
    assert done == (["['piqa'] data own why", "all wait for each other"][:: 1 if local_rank == 0 else -1])


def test_all_metrics_with_their_standard_errors() -> None:
    found = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.25, "acc_norm": 0.75},
        "wikitext": {"word_perplexity": 2.5e6},
    }
    lines = all_metrics_table(found, {"piqa": 7, "wikitext": 3}).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["piqa", "acc", "0.5000", "0.2500", "7"],
        ["piqa", "acc_norm", "0.7500", "–", "7"],
        ["wikitext", "word_perplexity", "2.5e+06", "–", "3"],
    ]


def test_a_metric_that_is_no_number_is_null_in_json() -> None:
    results = TaskResults({"piqa": {"acc": 0.5, "acc_stderr": math.nan, "ppl": math.inf}}, {"piqa": 7})
    prepared = cast(
        Any, SimpleNamespace(description="a model", system="IIET", hidden_size=1024, num_layers=24)
    )
    written = _as_data(Options(ModelOptions("nowhere")), prepared, results, 64, 1.5)
    read = json.loads(json.dumps(written), parse_constant=pytest.fail)
    assert read["tasks"]["piqa"]["metrics"] == {"acc": 0.5, "acc_stderr": None, "ppl": None}
    assert read["paper"]["systems"]["IIET"] == {"perplexity": 25.0, "mean_accuracy_percent": 48.9}


def test_a_limit_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="--limit is 0, but must be at least 1"):
        evaluate_model(Options(ModelOptions("nowhere"), limit=0))


def test_what_is_printed_and_written(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate_model(Options(ModelOptions(str(model)), ("paper",), data_dir=str(data), limit=3))
    printed = capsys.readouterr()
    folder = model / "evaluation"
    report = (folder / "results.md").read_text()
    assert report.strip() in printed.out
    assert "100%" not in printed.out + printed.err, "bars of the harness belong nowhere"
    assert "first 3 rows" in report
    assert "reports no model of this size" in report
    written = json.loads((folder / "results.json").read_text())
    assert written["tasks"]["piqa"]["metrics"] == results.metrics["piqa"]
    assert set(results.metrics["piqa"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert {task["rows"] for task in written["tasks"].values()} == {3}
    assert written["mean_accuracy"] == mean_accuracy(results.metrics)
    assert (written["limit"], written["max_length"], written["precision"]) == (3, 128, "fp32")
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "--model is nowhere, which does not exist; give"),
        ({"batch_size": 0}, "--batch-size is 0, but must be at least 1"),
        ({"max_length": 129}, "--max-length is 129, but the model .* reads 128 tokens at most"),
        ({"step": 3}, "holds no complete checkpoint"),
        ({"tokenizer": "nowhere.model"}, "The tokenizer nowhere.model is missing"),
        ({"parallel": ParallelConfig(tensor=3)}, "parallel.tensor is 3, but does not divide"),
        ({"parallel": ParallelConfig(tensor=2)}, "the number of processes is 1, but must be a multiple"),
    ],
)
def test_bad_models(options: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_model(ModelOptions(**{"path": str(model), **options}), 1)


def test_model_without_tokenizer(model: Path, tmp_path: Path) -> None:
    stored = portable.StoredModel(model)
    stored.config.data.tokenizer = ""
    portable.save(stored.config, stored, tmp_path / "bare")
    with pytest.raises(ValueError, match="bare names no tokenizer; give one with --tokenizer"):
        prepare_model(ModelOptions(str(tmp_path / "bare")), 1)
    prepared = prepare_model(
        ModelOptions(str(tmp_path / "bare"), tokenizer=str(model / "tokenizer.model")), 1
    )
    assert prepared.codec.start_id == prepared.codec.end_id


def hugging_face_folder(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **fields}))
    return folder


def test_hugging_face_folders_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    """Nothing is unpickled, code is run only if that is asked for, and what is missing is named."""
    tokenizer = str(model / "tokenizer.model")
    pickled = hugging_face_folder(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"not read")
    prepared = prepare_model(ModelOptions(str(pickled), tokenizer=tokenizer), 1)
    with pytest.raises(ValueError, match=r"model of .*pickled cannot be loaded .*safetensors"):
        prepared.load(None)  # type: ignore[arg-type]
    coded = hugging_face_folder(
        tmp_path / "coded",
        model_type="of-their-own",
        auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    )
    (coded / "theirs.py").write_text("raise SystemExit('code was run')\n")
    prepared = prepare_model(ModelOptions(str(coded), tokenizer=tokenizer), 1)
    with pytest.raises(
        ValueError, match="coded brings code of its own; read it, then add --trust-remote-code"
    ):
        prepared.load(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pickled has no tokenizer; give one with --tokenizer"):
        prepare_model(ModelOptions(str(pickled)), 1)
    with pytest.raises(ValueError, match=r"--step is given, but --model .* has no steps"):
        prepare_model(ModelOptions(str(pickled), step=1), 1)


def run_tool(
    *arguments: str, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "tools/evaluate.py"), *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        command,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_tool_on_two_processes(model: Path, data: Path, tmp_path: Path) -> None:
    """Under torchrun, split; the same figures as here, printed once."""
    output = tmp_path / "out"
    done = run_tool(
        *("--model", str(model), "--tasks", "piqa,lambada_openai", "--data-dir", str(data)),
        *("--output", str(output), "--parallel.tensor", "2"),
        launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LAMBADA") == 1
    names = ("piqa", "lambada_openai")
    here = evaluate_model(
        Options(ModelOptions(str(model)), names, data_dir=str(data), output=str(tmp_path / "here"))
    )
    written = json.loads((output / "results.json").read_text())["tasks"]
    for name in names:
        found = {k: v for k, v in written[name]["metrics"].items() if "stderr" not in k}
        expected = {k: v for k, v in here.metrics[name].items() if "stderr" not in k}
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_tool_online(model: Path, data: Path, tmp_path: Path) -> None:
    """From a hub, with the split that the definition names; and without one."""
    for name, split in (("EleutherAI/lambada_openai", "test"), ("baber/piqa", "validation")):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        task = name.split("/")[1]
        (folder / f"{split}.jsonl").write_bytes((data / f"{task}.jsonl").read_bytes())
    other = json.dumps({**ROWS["piqa"][0], "goal": "not evaluated"}) + "\n"
    (tmp_path / "hub/baber/piqa/train.jsonl").write_text(other)
    output = tmp_path / "out"
    arguments = ("--model", str(model), "--tasks", "lambada_openai,piqa", "--output", str(output))
    with serve_hub(tmp_path / "hub") as address:
        done = run_tool(*arguments, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    written = json.loads((output / "results.json").read_text())["tasks"]
    here = evaluate_model(
        Options(
            ModelOptions(str(model)),
            ("piqa", "lambada_openai"),
            data_dir=str(data),
            output=str(tmp_path / "here"),
        )
    )
    for name, values in here.metrics.items():
        assert written[name]["metrics"] == pytest.approx(values, rel=1e-5)
    refused = run_tool(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other-cache"))
    assert refused.returncode == 2
    assert "error: the data of evaluation tasks lambada_openai, piqa could not be loaded (" in refused.stderr
    assert "--data-dir" in refused.stderr


@pytest.mark.slow
def test_tool_names_the_missing_file(model: Path, data: Path, tmp_path: Path) -> None:
    done = run_here("tools/evaluate.py", "--model", str(model), "--data-dir", str(tmp_path))
    assert done.code == 2
    assert done.err.startswith(f"error: {tmp_path}/wikitext.jsonl is missing")
