"""Options of an evaluation that change what is read or where results go: step, length and first token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.evaluation.evaluate import Options, evaluate_model
from megatron_iiet.evaluation.models import (
    HuggingFaceScorer,
    ModelOptions,
    OwnScorer,
    _codec,
    _hugging_face_codec,
    prepare_model,
)
from megatron_iiet.hf import folders
from megatron_iiet.models import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage import portable
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.evaluation.ranks import evaluate_all
from tests.evaluation.task_data import write_task_data
from tests.tiny import make_data, tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portable folder of a model that reads 32 tokens."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(make_data(folder), folder / "run", model={"init_std": 0.2})
    transformer = Transformer(config)
    transformer.initialise(3)
    config.data.tokenizer = "tokenizer.model"
    state = dict(transformer.named_parameters())
    portable.save(config, state, folder / "model", extra_files=[folder / "tokenizer.model"])
    return folder / "model"


@pytest.mark.slow
def test_results_of_two_steps_are_kept_apart(tasks: Path, tmp_path: Path) -> None:
    """And are those of the step that was asked for; the newest's are in a folder of their own as well."""
    run = tmp_path / "run"
    config = tiny_config(
        make_data(tmp_path), run, training={"steps": 4}, checkpoint={"interval": 2, "keep": 0}
    )
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, 1))
    perplexities = {}
    for step, folder in ((2, "step_00000002"), (4, "step_00000004"), (None, ".")):
        options = Options(ModelOptions(str(run), step=step), ("wikitext",), str(tasks), limit=2)
        expected = evaluate_model(options).metrics["wikitext"]
        written = json.loads((run / "evaluation" / folder / "results.json").read_text())
        assert f"step_{step or 4:08d}" in written["model"]
        assert written["tasks"]["wikitext"]["metrics"] == expected
        perplexities[step] = expected["word_perplexity"]
    assert perplexities[None] == perplexities[4] != perplexities[2]
    assert sorted(p.name for p in (run / "evaluation").iterdir() if p.is_dir()) == [
        "step_00000002",
        "step_00000004",
    ]


@pytest.mark.slow
def test_a_length_that_two_ranks_cannot_share_is_shortened(model: Path, tasks: Path) -> None:
    """15 tokens under sequence parallelism are 14; without it they are 15."""
    cut = ModelOptions(str(model), max_length=15, parallel=ParallelConfig(tensor=2, sequence=True))
    whole = ModelOptions(str(model), max_length=15, parallel=ParallelConfig(tensor=2))
    found = run_ranks(evaluate_all, 2, [cut, whole], tasks, ("wikitext",))
    for length, results in zip((14, 15), found[0], strict=True):
        (expected,) = evaluate_all([ModelOptions(str(model), max_length=length)], tasks, ("wikitext",))
        assert results.metrics["wikitext"]["word_perplexity"] == pytest.approx(
            expected.metrics["wikitext"]["word_perplexity"], rel=1e-4
        )
    assert found[0] == found[1]
    one, other = (results.metrics["wikitext"]["word_perplexity"] for results in found[0])
    assert one != pytest.approx(other, rel=1e-3)


def test_the_length_of_one_process_is_what_was_asked_for(model: Path) -> None:
    with ParallelContext.start() as context:
        assert prepare_model(ModelOptions(str(model), max_length=15), 1).load(context).max_length == 15
        for length in (None, 32):
            assert (
                prepare_model(ModelOptions(str(model), max_length=length), 1).load(context).max_length == 32
            )


def test_what_a_text_without_context_follows(model: Path) -> None:
    tokenizer = load_tokenizer(str(model / "tokenizer.model"))
    assert tokenizer.bos_id not in (None, tokenizer.eod_id)
    starts = {
        start: prepare_model(ModelOptions(str(model), start=start), 1).codec  # type: ignore[arg-type]
        for start in ("auto", "bos", "eos")
    }
    assert {start: codec.start_id for start, codec in starts.items()} == {
        "auto": tokenizer.eod_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eod_id,
    }
    assert {codec.end_id for codec in starts.values()} == {tokenizer.eod_id}


def test_a_tokenizer_may_have_no_more_ids_than_the_model(model: Path) -> None:
    path = str(model / "tokenizer.model")
    size = load_tokenizer(path).vocab_size
    assert _codec(ModelOptions("m"), path, size).end_id < size
    with pytest.raises(
        ValueError, match=rf"has {size} ids, but the model m knows {size - 1}; give the token"
    ):
        _codec(ModelOptions("m"), path, size - 1)


def test_a_model_folder_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"--step is given, but --model {tmp_path} is a model folder, which"):
        prepare_model(ModelOptions(str(tmp_path), step=3), 1)


@pytest.mark.parametrize(
    ("kind", "start", "bos", "eos", "expected"),
    [
        ("llama", "auto", 1, 2, (1, 2)),
        ("llama", "auto", None, 2, (2, 2)),
        ("llama", "eos", 1, 2, (2, 2)),
        ("llama", "auto", 1, None, (1, 1)),
        ("iiet", "auto", 1, 2, (2, 2)),  # trained here, where documents follow an end-of-document token
        ("iiet", "bos", 1, 2, (1, 2)),
        ("iiet", "auto", 1, None, "has no eos token to condition a text without context on"),
        ("llama", "bos", None, 2, "has no bos token"),
    ],
)
def test_what_a_text_follows_in_a_hugging_face_folder(
    kind: str, start: Any, bos: int | None, eos: int | None, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SimpleNamespace(bos_token_id=bos, eos_token_id=eos, encode=list)
    monkeypatch.setattr(folders, "load_tokenizer", lambda path, trusted: tokenizer)
    monkeypatch.setattr(folders, "text_follows", lambda path: "eod" if kind == "iiet" else "tokenizer")
    options = ModelOptions("a folder", start=start)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"the tokenizer of a folder {expected}"):
            _hugging_face_codec(options, 8)
        return
    codec = _hugging_face_codec(options, 8)
    assert (codec.start_id, codec.end_id) == expected
    assert codec.encode([3, 7]) == [3, 7]
    with pytest.raises(
        ValueError, match="the tokenizer makes token 8 of the text, but the model knows 8; gi"
    ):
        codec.encode([3, 8])


@pytest.mark.parametrize(
    ("fields", "options", "found"),
    [
        (
            {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 24, "n_positions": 64},
            {},
            ("Transformer++", 1024, 24, 64),
        ),
        ({"model_type": "gpt2", "n_positions": 32}, {}, ("gpt2", 0, 0, 32)),
        ({"model_type": "mamba"}, {}, ("mamba", 0, 0, 2048)),
        ({"max_position_embeddings": 64}, {"max_length": 16, "batch_size": 3}, ("None", 0, 0, 16)),
    ],
    ids=["llama", "gpt2", "mamba", "nothing"],
)  # fmt: skip
def test_what_is_known_of_a_hugging_face_folder(
    fields: dict[str, Any],
    options: dict[str, Any],
    found: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its name and shape in the table, and the longest input: asked for, said by the folder, or usual."""
    asked = []
    model = torch.nn.Linear(1, 1)
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, encode=list)
    monkeypatch.setattr(folders, "is_hugging_face", lambda path: True)
    monkeypatch.setattr(folders, "load_tokenizer", lambda path, trusted: tokenizer)
    monkeypatch.setattr(folders, "read_fields", lambda path: fields)
    monkeypatch.setattr(folders, "load_model", lambda *given: asked.append(given) or model)
    prepared = prepare_model(ModelOptions("a folder", precision="bf16", **options), 1)
    assert prepared.description == "Hugging Face a folder"
    scorer = prepared.load(SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    assert (prepared.system, prepared.hidden_size, prepared.num_layers, scorer.max_length) == found
    assert asked == [("a folder", torch.bfloat16, False)]
    assert scorer.batch_size == options.get("batch_size", 8)
    assert not model.training


def test_inputs_have_the_length_they_need() -> None:
    """Nothing is filled up to the longest input, nor to a multiple."""
    for kind in (HuggingFaceScorer, OwnScorer):
        assert not kind.has_fixed_shape
    assert HuggingFaceScorer.multiple == 1
