"""Tasks of one's own, and tasks that generate text: by the harness's own class for models of transformers."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from lm_eval.evaluator import evaluate

from megatron_iiet.config import ConfigError
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.evaluation import tasks as tasks_module
from megatron_iiet.evaluation.evaluate import Options, evaluate_model
from megatron_iiet.evaluation.harness import HarnessModel
from megatron_iiet.evaluation.models import ModelOptions, prepare_model
from megatron_iiet.evaluation.tasks import _index, _reachable, load_tasks
from megatron_iiet.hf import register
from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.tokenizer import extras_of_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import portable
from megatron_iiet.training.task_evaluation import TaskEvaluation
from tests.evaluation.task_data import write_task_data
from tests.evaluation.test_harness import LENGTH, harness_class, iiet_config, tokenizer_folder  # noqa: F401
from tests.tiny import tiny_config

QUESTIONS = [
    "Who keeps the bell?",
    "What does the ferry carry in winter, when the ice is thick?",
    "Why?",
    "Bread needs flour, water, salt and time. " * 3,  # longer than there is room for
    "a",
]
KWARGS: dict[str, Any] = {"until": ["e", "\n\n"], "max_gen_toks": 14, "do_sample": False, "temperature": 0.0}


def write_task(folder: Path, name: str = "own_words", **keys: Any) -> Path:
    """``NAME.yaml`` and its data; the folder."""
    folder.mkdir(exist_ok=True)
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps({"q": text, "a": "never"}) + "\n" for text in QUESTIONS))
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": KWARGS,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **keys,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(definition))  # which is YAML
    return folder


@pytest.fixture(scope="module")
def iiet(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A portable folder; its head is not the embedding, or a text would be one token over and over."""
    config = iiet_config()
    config.model.tie_embeddings, config.model.init_std = False, 0.3
    model = Transformer(config)
    model.initialise(11)
    folder = tmp_path_factory.mktemp("generating") / "model"
    files = [tokenizer_folder / "tokenizer.json", tokenizer_folder / "tokenizer_config.json"]
    portable.save(config, dict(model.named_parameters()), folder, extra_files=files)
    return folder


@pytest.fixture(scope="module")
def export(iiet: Path) -> Path:
    stored, folder = portable.StoredModel(iiet), iiet.with_name("export")
    export_folder(stored.config, stored, folder, extras_of_tokenizer(iiet / "tokenizer.json"))
    register()
    return folder


def texts(model: Any, folder: Path, name: str = "own_words") -> list[str]:
    """What a model makes of each question, as it is told before metrics cut it."""
    tasks = load_tasks([name], include_path=folder, no_generation="")
    found = evaluate(model, tasks, bootstrap_iters=0, log_samples=True)
    return [row["resps"][0][0] for row in found["samples"][name]]


def ours(path: Path, folder: Path, name: str = "own_words", **options: Any) -> list[str]:
    prepared = prepare_model(ModelOptions(str(path), **options), 1)
    assert prepared.no_generation == ""
    with ParallelContext.start() as context:
        return texts(HarnessModel(prepared.load(context, True), prepared.codec), folder, name)


@pytest.mark.slow
def test_texts_are_those_of_the_harness_own_model_class(iiet: Path, export: Path, tmp_path: Path) -> None:
    """Of the export and of the portable folder: prompts cut at the left, texts cut at what ends them."""
    folder = write_task(tmp_path / "tasks")
    expected = texts(harness_class(export), folder)
    assert len(set(expected)) == len(QUESTIONS)
    assert len({len(text) for text in expected}) > 1, "some were cut"
    assert ours(export, folder, batch_size=2) == expected
    assert ours(iiet, folder, batch_size=4) == expected
    longer = write_task(tmp_path / "long", generation_kwargs={"until": ["never"], "max_gen_toks": LENGTH - 4})
    assert ours(iiet, longer) == texts(harness_class(export), longer) != expected


@pytest.mark.slow
def test_draws(iiet: Path, tmp_path: Path) -> None:
    """The same every time, and others for other questions; whatever the size of the batch."""
    drawn = {**KWARGS, "until": ["never"], "do_sample": True, "temperature": 1.5}
    folder = write_task(tmp_path / "tasks", generation_kwargs=drawn)
    found = ours(iiet, folder)
    assert found == ours(iiet, folder, batch_size=1)
    assert len(set(found)) == len(QUESTIONS)
    assert found != ours(
        iiet, write_task(tmp_path / "greedy", generation_kwargs={**KWARGS, "until": ["never"]})
    )


def test_beside_a_task_of_the_harness(iiet: Path, tmp_path: Path) -> None:
    folder, data = write_task(tmp_path / "tasks"), write_task_data(tmp_path / "data", ("piqa",))
    options = Options(
        ModelOptions(str(iiet)), ("piqa", "own_words"), data_dir=str(data), limit=2,
        output=str(tmp_path / "out"), include_path=str(folder),
    )  # fmt: skip
    results = evaluate_model(options)
    assert results.rows == {"own_words": 2, "piqa": 2}
    assert results.metrics["own_words"]["exact_match"] == 0
    alone = evaluate_model(Options(options.model, ("piqa",), str(data), 2, str(tmp_path / "out")))
    assert results.metrics["piqa"] == pytest.approx(alone.metrics["piqa"], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"generation_kwargs": {"num_beams": 4}},
            "has generation_kwargs num_beams = 4, which is not",
        ),
        (
            {"generation_kwargs": {"typical_p": 1}},
            "has generation_kwargs typical_p = 1, which is not",
        ),
        ({"generation_kwargs": {"do_sample": True}}, "has generation_kwargs do_sample = True, which is not"),
    ],
)
def test_ways_of_generating_that_are_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_tasks(["own_words"], include_path=write_task(tmp_path / "tasks", **keys), no_generation="")


def test_models_that_generate_nothing(iiet: Path, tmp_path: Path) -> None:
    """Split ones, those of others, and those in training."""
    folder = write_task(tmp_path / "tasks")
    split = prepare_model(ModelOptions(str(iiet), parallel=ParallelConfig(tensor=2)), 2).no_generation
    assert split.startswith("a model that is split over processes only scores")
    with pytest.raises(ValueError, match=f"task 'own_words' needs generate_until, but {split}"):
        load_tasks(["own_words"], include_path=folder, no_generation=split)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 320}))
    tokenizer = str(iiet / "tokenizer.json")
    refused = prepare_model(ModelOptions(str(other), tokenizer=tokenizer), 1).no_generation
    assert (
        "only LLaMA, Mistral, Qwen2, Qwen3 and IIET do that here; run it with lm_eval --model hf" in refused
    )
    tasks = {"tasks": ["own_words"], "tasks_include_path": str(folder)}
    config = tiny_config({"prefix": "unread", "tokenizer": "unread"}, tmp_path, evaluation=tasks)
    with pytest.raises(
        ConfigError, match="needs generate_until, but only tasks that score given text run here"
    ):
        TaskEvaluation(config)


def test_a_context_too_short_for_what_is_asked(iiet: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", generation_kwargs={"until": ["e"]})
    with pytest.raises(
        ValueError, match=r"asks for 256 new tokens, but the model reads 64 tokens in all; leave"
    ):
        ours(iiet, folder)


def test_folders_of_tasks(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the folder of task definitions .*nowhere does not exist; name another"
    ):
        load_tasks(["own_words"], include_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has none that lm-evaluation-harness can read; put NAME\.yaml"):
        load_tasks(["own_words"], include_path=tmp_path)


@pytest.mark.slow
def test_a_misspelt_task_is_known_before_its_data_and_the_model(tmp_path: Path) -> None:
    """Neither is there to be loaded. (The harness's index, which takes a minute, isn't made either.)"""
    folder = write_task(tmp_path / "tasks")

    def evaluated(*names: str, include_path: str = "") -> None:
        options = Options(ModelOptions("nowhere"), names, data_dir="nowhere", include_path=include_path)
        evaluate_model(options)

    made = _index.cache_info().misses
    with pytest.raises(
        ValueError, match=r"^lm-evaluation-harness has no task 'helaswag'; did you mean hellas"
    ):
        evaluated("piqa", "helaswag")
    with pytest.raises(
        ValueError, match=rf"neither lm.* nor {folder} has a task 'own_wrods'; .* own_words\?$"
    ):
        evaluated("own_words", "own_wrods", include_path=str(folder))
    with pytest.raises(ValueError, match=r"has no task 'qxqxqxqx'; lm_eval ls tasks lists them all"):
        evaluated("qxqxqxqx")
    assert _index.cache_info().misses == made


def test_without_a_hub_nothing_is_tried_five_times(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The port takes no connections, and there is nothing in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"data of evaluation tasks piqa could not be loaded \(.*OfflineMode"
    ):
        load_tasks(["piqa"])
    assert "Retry" not in "".join(capfd.readouterr())
    assert not constants.HF_HUB_OFFLINE, "for this loading only"
    assert not datasets.config.HF_HUB_OFFLINE


def test_what_can_be_reached() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert _reachable(f"http://127.0.0.1:{port}")
    assert not _reachable(f"http://127.0.0.1:{port}")
    assert not _reachable("https://no.such.host.invalid")


def test_where_a_server_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[Any, float]] = []

    def connect(place: Any, seconds: float) -> Any:
        tried.append((place, seconds))
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(tasks_module.socket, "create_connection", connect)
    monkeypatch.setattr(tasks_module.urllib.request, "getproxies", dict)
    for address in ("http://a", "https://b", "https://c:8443/path"):
        assert _reachable(address)
    assert [place for place, _ in tried] == [("a", 80), ("b", 443), ("c", 8443)]
    assert {seconds for _, seconds in tried} == {tasks_module._REACH_SECONDS}
    monkeypatch.setattr(tasks_module.urllib.request, "getproxies", lambda: {"https": "proxy"})
    assert _reachable("https://behind.a.proxy")
    assert len(tried) == 3, "which is the proxy's affair"
