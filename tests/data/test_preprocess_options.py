"""Options: counts, contradictions, and which job SLURM says this is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.data.preprocess.options import PreprocessOptions, parse_count, share_of_work
from megatron_iiet.data.preprocess.plan import share
from megatron_iiet.data.reading.sources import InputFile
from tests.data.preprocess_runs import run_tool


@pytest.mark.parametrize(
    ("text", "count"),
    [("4000", 4000), ("300M", 300_000_000), ("16B", 16 * 10**9), ("1.5T", 1_500_000_000_000),
     ("0.5k", 500), (" 1_000 ", 1000), ("627b", 627 * 10**9)],
)  # fmt: skip
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "16 GB", "-1", "1e9", "16BB", "1.5", "0.0001K", ".5B", "５"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (count|whole number); write 4000, 300M, 16B or"):
        parse_count(text)


ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}
STEP = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 0)),
        (ARRAY, (4, 2)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_STEP": "2"}, (4, 2)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}, (4, 3)),
        (STEP, (8, 3)),
        ({**ARRAY, **STEP}, (32, 2 * 8 + 3)),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (1, 0)),
        ({"SLURM_NTASKS": "8"}, (1, 0)),  # a shell of salloc: no task
    ],
)
def test_share_of_work(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert share_of_work(environment) == expected
    assert share_of_work(environment, num_jobs=10, job=9) == (10, 9)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**ARRAY, "SLURM_ARRAY_TASK_ID": "9"},
            "9 does not count the 4 elements of an array that starts at 5",
        ),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_STEP": "2"}, "with step 2; use an array"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "without SLURM_ARRAY_TASK_COUNT; give --num-jobs and --job"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID is 'x', not a number"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "2"}, "SLURM_PROCID is 2 with SLURM_NTASKS 2"),
    ],
)
def test_contradictory_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_of_work(environment)


def test_half_of_a_share() -> None:
    with pytest.raises(ValueError, match="--job is given without --num-jobs"):
        share_of_work({}, job=1)
    with pytest.raises(ValueError, match="--num-jobs is given without --job"):
        share_of_work(ARRAY, num_jobs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "--workers is 0; give at least 1"),
        ({"num_jobs": 0}, "--num-jobs is 0; give at least 1"),
        ({"num_jobs": 2, "job": 2, "output_prefix": None, "output_dir": "d"}, "--job is 2; .* give 0 to 1"),
        ({"json_keys": ["text", "text"]}, "give one or more, each once"),
        ({"json_keys": ["a/b"]}, "cannot be part of a file name"),
        ({"inputs": []}, "Give either --input or --dataset"),
        ({"dataset": "name"}, "Give either --input or --dataset"),
        ({"inputs": [], "dataset": "name"}, "--dataset and --split go together"),
        ({"split": "train"}, "--dataset and --split go together"),
        ({"streaming": True}, "--streaming goes with --dataset"),
        ({"eod_token": "</s>"}, "--eod-token goes with --append-eod"),
        ({"output_dir": "d"}, "Give either --output-prefix .* or --output-dir"),
        ({"output_prefix": None}, "Give either --output-prefix .* or --output-dir"),
        ({"num_jobs": 2}, "--output-prefix makes a single shard, .* use --output-dir"),
        ({"inputs_per_shard": 2}, "--inputs-per-shard goes with --output-dir"),
        (
            {"num_jobs": 2, "overwrite": True, "output_prefix": None, "output_dir": "d"},
            "--overwrite would let 2 jobs remove each other's work; remove d first",
        ),
        ({"corpus_tokens": 5}, "--corpus-tokens goes with --sample-tokens"),
        ({"sample_tokens": 0}, "--sample-tokens is 0; give at least 1"),
        ({"holdout_test": 1.0}, "--holdout-test is 1.0; give a fraction"),
        ({"holdout_validation": -0.1}, "--holdout-validation is -0.1; give a fraction"),
        ({"holdout_validation": 0.5, "holdout_test": 0.5}, "leave nothing to train on"),
        ({"language_score": 0.5}, "--language-score goes with --language"),
        ({"language": ["en"], "language_score": 0.0}, "--language-score is 0.0; give more than 0"),
        (
            {"language": ["en"], "language_score": 1.01},
            "--language-score is 1.01; give more than 0, at most 1",
        ),
        ({"bad_rows": "ignore"}, "--bad-rows is 'ignore'; give error or skip"),
        ({"bad_inputs": "error"}, "--bad-inputs is 'error'; give fail or skip"),
    ],
)
def test_contradictions(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"inputs": ["a.jsonl"], "output_prefix": "p", "tokenizer_model": "t.model"}
    with pytest.raises(ValueError, match=message):
        PreprocessOptions(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"num_jobs": 3, "job": 2},
        {"num_jobs": 3, "job": 0, "inputs_per_shard": 1},
        {"sample_tokens": 1, "corpus_tokens": 1},
        {"holdout_validation": 0.5, "holdout_test": 0.499},
        {"overwrite": True},
        {"output_dir": None, "output_prefix": "p", "overwrite": True},
        {"inputs": (), "dataset": "name", "split": "train", "streaming": True},
    ],
    ids=str,
)
def test_edges_that_are_allowed(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"inputs": ["a.jsonl"], "output_dir": "d", "tokenizer_model": "t.model"}
    PreprocessOptions(**{**good, **change})


def test_what_is_made_unless_told_otherwise() -> None:
    """Another default would make another corpus of the same command."""
    given: dict[str, Any] = {"inputs": ["a.jsonl"], "output_dir": "d", "tokenizer_model": "t.model"}
    assert asdict(PreprocessOptions(**given)) == given | {
        "input_format": None,
        "txt_documents": "file",
        "text_template": None,
        "max_document_bytes": None,
        "max_uncut_bytes": 8 << 20,
        "min_characters": 0,
        "max_characters": None,
        "dataset": None,
        "split": None,
        "streaming": False,
        "output_prefix": None,
        "inputs_per_shard": 1,
        "json_keys": ("text",),
        "append_eod": False,
        "eod_token": None,
        "split_by": None,
        "sample_tokens": None,
        "corpus_tokens": None,
        "seed": 1234,
        "holdout_validation": 0.0,
        "holdout_test": 0.0,
        "language": (),
        "language_score": 0.65,
        "deduplicate": False,
        "bad_rows": "error",
        "bad_inputs": "fail",
        "shuffle": None,
        "overwrite": False,
        "workers": 1,
        "num_jobs": 1,
        "job": 0,
        "chunk_bytes": 1 << 20,
        "progress": True,
    }


@pytest.mark.parametrize("num_jobs", [1, 3, 7, 100])
def test_every_unit_belongs_to_one_job(num_jobs: int) -> None:
    units = [[InputFile(f"{number}.jsonl", number * 7919 % 1000, "")] for number in range(50)]
    shares = [share(units, num_jobs, job) for job in range(num_jobs)]
    assert sorted(unit for mine in shares for unit in mine) == list(range(50))
    loads = [sum(units[unit][0].size for unit in mine) for mine in shares]
    if num_jobs < 50:
        assert max(loads) - min(loads) < 1000  # no more than one unit apart


@pytest.mark.slow
def test_tool_reads_the_environment(tmp_path: Path, sentencepiece_model: Path) -> None:
    arguments = ["--input", tmp_path / "a.jsonl", "--tokenizer-model", sentencepiece_model]
    (tmp_path / "a.jsonl").write_text('{"text": "ba"}\n')
    done = run_tool(*arguments, "--output-dir", tmp_path / "out", environment=ARRAY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("job 2 of 4: nothing to do") or "job 2 of 4: " in done.stdout
    assert [path.name for path in (tmp_path / "out" / "preprocess").glob("job-*")] == [
        "job-00002-of-00004.jsonl"
    ]
    failed = run_tool(*arguments, "--output-prefix", tmp_path / "p", environment=STEP)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "which 8 jobs cannot share; use --output-dir" in failed.stderr


@pytest.mark.parametrize("value", ["16X", "0"])
def test_tool_refuses_bad_counts(tmp_path: Path, value: str) -> None:
    failed = run_tool(
        "--input", "a", "--tokenizer-model", "t", "--output-dir", tmp_path / "out", "--sample-tokens", value
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
