"""What the command lines of tools/ accept, what they hand on and what they print: every option of each.

The work itself is tested where its room is; here a stand-in does it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import megatron_iiet.data.preprocess.work
import megatron_iiet.distillation.analysis
import megatron_iiet.durable
import megatron_iiet.evaluation.evaluate
import megatron_iiet.evaluation.tasks
import megatron_iiet.hf.generation
import megatron_iiet.training.curves
import megatron_iiet.training.pretrain
import megatron_iiet.training.summary
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.distillation.plans import PlanRequest
from megatron_iiet.durable import Terminated
from megatron_iiet.hf.generation import Sampling
from megatron_iiet.training.lock import Holder
from tests.storage.saves import FILE, Saves, flip_a_bit

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = sorted(path.stem for path in TOOLS.glob("*.py"))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A tool as a module, which changes nothing of this process's signals."""
    monkeypatch.setattr(megatron_iiet.durable, "leave_cleanly_on_sigterm", lambda: None)
    monkeypatch.setattr(megatron_iiet.data.preprocess.work, "give_back_large_blocks", lambda: None)
    for variable in ("RANK", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(variable, raising=False)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their types up
        spec.loader.exec_module(module)
        return module

    return load


Start = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """A module's main, with arguments: exit status, standard output, standard error."""

    def start(tool: ModuleType, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *arguments])
        try:
            status = tool.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return int(status or 0), captured.out, captured.err

    return start


# An option: its names, what stands for its value, its default. "!": must be given; "-": without help.
OPTIONS = {
    "checkpoints": """
        run RUN_DIR ! | --verify [STEP ...]:int | --pin STEP:int | --unpin STEP:int | --reject STEP:int
        --accept STEP:int | --roll-back STEP:int | --reason REASON = 'by hand'""",
    "convert_checkpoint": """
        --from-hf DIR | --from-run RUN_DIR | --from-model DIR | --refresh EXPORT | --to DIR
        --to-hf DIR | --step STEP:int
        --dtype {fp32,bf16,fp16} | --max-shard-size SIZE | --as-llama = False | --chat-template FILE
        --solver.kind VALUE | --solver.variant VALUE | --solver.output_norm VALUE
        --solver.coefficient_init VALUE | --solver.history_norm VALUE | --solver.key_values VALUE
        --solver.repeats VALUE | --solver.stage_coefficients VALUE | --solver.predictor_order VALUE
        --solver.iterations VALUE | --solver.merge VALUE | --solver.predictor VALUE | --solver.damping VALUE
        --solver.readout VALUE""",
    "cuda_check": """
        --targets TARGETS [TARGETS ...] = ('80', '90', '100', '120') | --jobs JOBS:int = 2
        --kernels-only = False""",
    "evaluate": """
        --model DIR | --tasks paper|NAME,NAME = 'paper' | --data-dir DIR = '' | --include-path DIR = ''
        --limit N:int | --output DIR = '' | --step N:int | --batch-size B:int = 8 | --max-length T:int
        --precision {fp32,bf16} = 'fp32' | --tokenizer FILE = '' | --start {auto,bos,eos} = 'auto'
        --trust-remote-code = False | --parallel.tensor t:int = 1 | --parallel.pipeline p:int = 1
        --parallel.sequence = False | --compare {paper} | --results DIR [DIR ...]
        --table {table1,table2,table5} = 'table1' | --format {markdown,latex,csv} = 'markdown'
        --local_rank/--local-rank LOCAL_RANK:int hidden""",
    "generate": """
        --model DIR ! | --step STEP:int | --tokenizer FILE | --prompt TEXT | --interactive = False
        --max-new-tokens MAX_NEW_TOKENS:int = 128 - | --temperature TEMPERATURE:float = 0.8
        --top-k TOP_K:int = 50 | --top-p TOP_P:float = 1.0 - | --seed SEED:int = 0 -
        --precision {fp32,bf16} = 'fp32' - | --kv-cache {all,last,first} | --draft N|FILE
        --trust-remote-code = False""",
    "gpu_acceptance": """
        --output FOLDER:Path = PosixPath('gpu-report') | --minutes N:float = 9.0 | --only NAME [NAME ...]
        --device {cuda,cpu} = 'cuda' | --toy = False | --shard PREFIX | --tokenizer FILE
        --check {build,kernels,documents,bandwidth,step,deepspeed,waits,inference,sanitizer,training} hidden
        --seconds SECONDS:float hidden""",
    "gpu_bundle": """
        --python X.Y = '3.12' | --output FOLDER:Path = PosixPath('gpu-bundle')
        --most-megabytes MB:float = 60.0""",
    "inspect_dataset": """
        prefixes PREFIX [PREFIX ...] ! | --verify = False | --tokenizer TOKENIZER | --samples SAMPLES:int = 3
        --json = False""",
    "iteration_influence": """
        --model DIR ! | --output DIR ! | --data PATH = '' | --tokenizer FILE = '' | --sequences N:int = 256
        --sequence-length T:int | --micro-batch-size B:int = 8 | --precision {fp32,bf16} = 'fp32'
        --parallel.tensor t:int = 1 | --parallel.pipeline p:int = 1 | --parallel.sequence = False
        --ablation = False | --threshold auto|X:threshold | --budget K:int | --flops-ratio X:float
        --lower-bound = False | --rank-by {cosine,loss} = 'cosine'
        --local_rank/--local-rank LOCAL_RANK:int hidden""",
    "merge_datasets": """
        --inputs PREFIX [PREFIX ...] ! | --output-prefix OUTPUT_PREFIX ! | --by-reference = False
        --overwrite = False""",
    "plot_losses": "--run LABEL=DIR ! | --output FILE.png ! -",
    "preprocess_data": """
        --input PATH [PATH ...] = [] | --input-format {arrow,csv,json,jsonl,parquet,tsv,txt}
        --txt-documents {file,blank-line} = 'file' | --dataset NAME | --split SPLIT | --streaming = False
        --json-keys KEY [KEY ...] = ['text'] | --text-template T | --max-document-bytes N
        --bad-rows {error,skip} = 'error' | --bad-inputs {fail,skip} = 'fail'
        --tokenizer-model FILE | --max-uncut-bytes N:int = 8388608 | --append-eod = False
        --eod-token TOKEN | --output-prefix P | --output-dir D | --inputs-per-shard K:int = 1 | --split-by KEY
        --holdout-validation X:float = 0.0 | --holdout-test X:float = 0.0 | --shuffle SEED:int
        --overwrite = False | --sample-tokens N | --corpus-tokens N | --seed SEED:int = 1234
        --min-characters N:int = 0
        --max-characters N:int | --language CODE [CODE ...] = [] | --language-score X:float = 0.65
        --deduplicate = False | --workers N:int | --num-jobs N:int | --job I:int
        --vocab-file FILE | --merge-file FILE | --tokenizer-type TYPE | --dataset-impl mmap
        --keep-newlines = False | --keep-sequential-samples = False | --log-interval N:int
        --split-sentences = False | --lang NAME | --partitions N:int""",
    "serve": """
        --model DIR ! | --step STEP:int | --tokenizer FILE | --name NAME
        --host HOST = '127.0.0.1' | --port PORT:_port = 8000 | --ready-file FILE
        --dtype {fp32,bf16} = 'fp32' | --device {cpu,cuda} = 'cpu' | --threads N:_positive
        --kv-cache {all,first} | --trust-remote-code = False | --max-concurrent N:_positive = 8
        --max-waiting N:_whole = 64 | --context T:_positive | --max-tokens T:_positive
        --max-body BYTES:_positive = 1048576 | --grace S:_whole = 10""",
    "summarize_run": "run RUN_DIR ! | --also [PATH ...] = [] | --brief = False | --complete = False",
    "train_tokenizer": """
        --input INPUT [INPUT ...] ! | --output-prefix OUTPUT_PREFIX ! | --vocab-size VOCAB_SIZE:int = 32000
        --max-characters MAX_CHARACTERS:int = 30000000 | --json-key JSON_KEY = 'text'""",
}


def describe(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """As in OPTIONS."""
    formatter, words = parser._get_formatter(), ["/".join(action.option_strings) or action.dest]
    if action.nargs != 0:
        default = formatter._get_default_metavar_for_optional(action) if action.option_strings else ""
        words.append(formatter._format_args(action, default))
    text = " ".join(words) + (f":{action.type.__name__}" if callable(action.type) else "")
    if action.default is not None:
        text += f" = {action.default!r}"
    hidden = action.help == argparse.SUPPRESS
    return text + " !" * action.required + " hidden" * hidden + " -" * (not action.help)


@pytest.fixture
def parser_of(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The parser that a tool's main makes."""

    class MadeError(Exception):
        pass

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise MadeError(parser)

    def parser_of(name: str) -> argparse.ArgumentParser:
        module = load(name)
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(MadeError) as made:
            module.main()
        parser: argparse.ArgumentParser = made.value.args[0]
        return parser

    return parser_of


@pytest.mark.parametrize("name", NAMES)
def test_options(name: str, parser_of: Callable[..., Any]) -> None:
    """A missing option, help or choice, and another default, are seen by users."""
    parser = parser_of(name)
    assert parser._actions[0].dest == "help"
    described = [describe(parser, action) for action in parser._actions[1:]]
    assert described == [
        option.strip()
        for line in OPTIONS[name].strip().splitlines()
        for option in line.replace(" | ", "\n").splitlines()
    ]
    shorts = name in ("cuda_check", "inspect_dataset", "merge_datasets", "train_tokenizer")
    assert parser.allow_abbrev == shorts
    lines = [
        line for line in (sys.modules[f"tool_{name}"].__doc__ or "").splitlines() if line.startswith(" ")
    ]
    shown = parser.format_help()
    assert all(f"\n{line}\n" in f"\n{shown}\n" for line in lines), (
        "the examples are shown as they are written"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        (
            "convert_checkpoint",
            ["--to", "x"],
            "one of the arguments --from-hf --from-run --from-model --refresh is req",
        ),
        ("convert_checkpoint", ["--from-hf", "x"], "one of the arguments --to --to-hf is required"),
        ("convert_checkpoint", ["--from-hf", "x", "--from-run", "x"], "not allowed with argument --from-hf"),
        ("convert_checkpoint", ["--from-hf", "x", "--to", "x", "--to-hf", "x"], "not allowed with arg"),
        (
            "iteration_influence",
            ["--model", "x", "--output", "x", "--threshold", "a"],
            "'a' is neither a num",
        ),
    ],
)
def test_refused_arguments(
    load: Callable[[str], ModuleType], start: Start, name: str, arguments: list[str], sentence: str
) -> None:
    status, _, error = start(load(name), *arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert sentence in error


def fail(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


# --- preprocess_data ---


@pytest.fixture
def preprocess(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, which remembers its options and ends as its attribute `report` says."""
    tool = load("preprocess_data")
    tool.report = SimpleNamespace(waiting="", failures=[], exit_code=0)  # type: ignore[attr-defined]

    def preprocess(options: object, log: Callable[[str], None]) -> object:
        tool.options = options  # type: ignore[attr-defined]
        log("one line")
        return tool.report

    monkeypatch.setattr(tool, "preprocess", preprocess)
    return tool


def test_preprocess_hands_on(preprocess: ModuleType, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "--dataset d --split s --streaming --json-keys a b --bad-rows skip --bad-inputs skip "
        "--tokenizer-model t --append-eod --eod-token e --output-dir o --inputs-per-shard 3 --split-by k "
        "--shuffle 9 "
        "--input-format csv --txt-documents blank-line --max-document-bytes 4M --min-characters 5 "
        "--max-characters 6 --language en de --language-score 0.8 --holdout-validation 0.1 "
        "--holdout-test 0.2 --sample-tokens 2K --corpus-tokens 3M --seed 7 --deduplicate "
        "--workers 4 --num-jobs 5 --job 2"
    )
    called = []
    for name in ("leave_cleanly_on_sigterm", "give_back_large_blocks"):
        monkeypatch.setattr(preprocess, name, lambda name=name: called.append(name))
    assert start(preprocess, *given.split())[0] == 0
    assert called == ["leave_cleanly_on_sigterm", "give_back_large_blocks"]
    assert asdict(preprocess.options) == {
        "tokenizer_model": "t", "inputs": [], "dataset": "d", "split": "s", "streaming": True,
        "output_prefix": None, "output_dir": "o", "inputs_per_shard": 3, "json_keys": ["a", "b"],
        "append_eod": True, "eod_token": "e", "split_by": "k", "sample_tokens": 2000,
        "corpus_tokens": 3_000_000, "seed": 7,
        "holdout_validation": 0.1, "holdout_test": 0.2, "deduplicate": True, "bad_rows": "skip",
        "bad_inputs": "skip", "shuffle": 9, "overwrite": False, "workers": 4, "num_jobs": 5, "job": 2,
        "chunk_bytes": 1 << 20, "progress": True, "max_uncut_bytes": 8 << 20,
        "input_format": "csv", "txt_documents": "blank-line", "text_template": None,
        "max_document_bytes": 4_000_000, "min_characters": 5, "max_characters": 6,
        "language": ["en", "de"], "language_score": 0.8,
    }  # fmt: skip


@pytest.mark.parametrize(("slurm", "workers"), [("3", 3), ("", 2), (None, 2)])
def test_preprocess_takes_the_cores_it_has(
    preprocess: ModuleType,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    slurm: str | None,
    workers: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 6})
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert start(preprocess, "--input", "a", "b", "--tokenizer-model", "t", "--output-prefix", "p")[0] == 0
    options = preprocess.options
    assert (options.inputs, options.output_prefix, options.workers) == (["a", "b"], "p", workers)
    assert (options.num_jobs, options.job) == (1, 0)
    assert (options.sample_tokens, options.corpus_tokens) == (None, None)


def test_preprocess_says_how_it_ended(preprocess: ModuleType, start: Start) -> None:
    class Report(SimpleNamespace):
        def __str__(self) -> str:
            return "the report"

    arguments = ("--input", "a", "--tokenizer-model", "t", "--output-prefix", "p")
    preprocess.report = Report(waiting="", failures=[], exit_code=0)  # type: ignore[attr-defined]
    assert start(preprocess, *arguments) == (0, "one line\nthe report\n", "")
    preprocess.report = Report(waiting="it waits", failures=["f", "g"], exit_code=3)  # type: ignore[attr-defined]
    again = "2 shards failed; run the same command again to do only what is missing.\n"
    told = "one line\nthe report\n", f"it waits\n{again}error: f\nerror: g\n"
    assert start(preprocess, *arguments) == (3, *told)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError, KeyboardInterrupt, Terminated])
def test_preprocess_says_what_stopped_it(
    preprocess: ModuleType, start: Start, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(preprocess, "preprocess", fail(kind("it went wrong")))
    status, out, error = start(preprocess, "--input", "a", "--tokenizer-model", "t", "--output-prefix", "p")
    if kind in (KeyboardInterrupt, Terminated):
        said = "error: interrupted; finished shards stay, run the same command again for the rest.\n"
        assert (status, out, error) == (130 if kind is KeyboardInterrupt else 143, "", said)
    else:
        assert (status, out, error) == (1, "", "error: it went wrong\n")


# --- the other tools of data ---


def test_train_tokenizer(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load("train_tokenizer")
    monkeypatch.setattr(tool, "train_tokenizer", lambda *given, **named: (given, named))
    named = {"vocab_size": 5, "max_characters": 6, "key": "k"}
    arguments = "--input a b --output-prefix p --vocab-size 5 --max-characters 6 --json-key k"
    assert start(tool, *arguments.split()) == (0, f"{((['a', 'b'], 'p'), named)}\n", "")
    monkeypatch.setattr(tool, "train_tokenizer", fail(ValueError("no text")))
    assert start(tool, *arguments.split()) == (1, "", "error: no text\n")


def test_merge_datasets(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load("merge_datasets")
    called: list[str] = []
    monkeypatch.setattr(tool, "leave_cleanly_on_sigterm", lambda: called.append("it"))
    monkeypatch.setattr(tool, "merge", lambda **named: named)
    given = {"inputs": ["a", "b"], "output_prefix": "p", "by_reference": True, "overwrite": True}
    arguments = ["--inputs", "a", "b", "--output-prefix", "p", "--by-reference", "--overwrite"]
    assert start(tool, *arguments) == (0, f"{given}\n", "")
    assert called == ["it"]
    monkeypatch.setattr(tool, "merge", fail(OSError("the disk is full")))
    assert start(tool, *arguments) == (1, "", "error: the disk is full\n")
    for signal, status in ((KeyboardInterrupt(), 130), (Terminated(143), 143)):
        monkeypatch.setattr(tool, "merge", fail(signal))
        assert start(tool, *arguments) == (status, "", "error: interrupted; nothing was written.\n")


def test_inspect_dataset(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound and unsound corpora, as text and as JSON, with and without a check of every byte."""
    tool = load("inspect_dataset")

    class Told(SimpleNamespace):
        def as_dict(self) -> dict[str, Any]:
            return {"told": self.told}

        def __str__(self) -> str:
            return str(self.told)

    def summarize(prefix: str, tokenizer: object, samples: int) -> Told:
        if prefix == "gone":
            raise ValueError("there is no gone")
        return Told(told=f"{prefix} {tokenizer} {samples} é")

    monkeypatch.setattr(tool, "summarize", summarize)
    monkeypatch.setattr(tool, "load_tokenizer", lambda path: f"loaded {path}")
    monkeypatch.setattr(
        tool, "verify", lambda prefix, path: Told(told=f"{prefix} {path}", num_defects=int(prefix == "bad"))
    )
    assert start(tool, "a", "b", "a") == (0, "a None 3 é\nb None 3 é\n", "")
    told = "a loaded t 2 é\na t\n"
    assert start(tool, "a", "--verify", "--tokenizer", "t", "--samples", "2") == (0, told, "")
    assert start(tool, "bad", "--verify") == (1, "bad None 3 é\nbad None\n", "")
    assert start(tool, "gone", "a") == (1, "a None 3 é\n", "error: there is no gone\n")
    status, out, error = start(tool, "bad", "gone", "--verify", "--json")
    assert (status, error) == (1, "error: there is no gone\n")
    assert json.loads(out) == [
        {"prefix": "bad", "told": "bad None 3 é", "verification": {"told": "bad None", "num_defects": 1}},
        {
            "prefix": "gone",
            "error": "there is no gone",
            "verification": {"told": "gone None", "num_defects": 0},
        },
    ]
    assert '\n  {\n    "prefix"' in out
    assert "é" in out, "text can be read"
    monkeypatch.setattr(tool, "corpus_prefix", fail(ValueError("no prefix")))
    assert start(tool, "a") == (1, "", "error: no prefix\n")
    monkeypatch.setattr(tool, "corpus_prefix", fail(KeyboardInterrupt()))
    assert start(tool, "a") == (130, "", "error: interrupted.\n")


# --- runs ---


def test_plot_losses(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, drawn = load("plot_losses"), []
    monkeypatch.setattr(megatron_iiet.training.curves, "plot_losses", lambda *given: drawn.append(given))
    arguments = ("--output", "o.png", "--run", "a=b=runs/x", "--run", "c=runs/y")
    assert start(tool, *arguments) == (0, "", "")
    assert drawn == [({"a=b": "runs/x", "c": "runs/y"}, "o.png")]
    for wrong in ("runs/x", "=runs/x", "x="):
        sentence = f"error: --run wants LABEL=DIR, found a=b {wrong}\n"
        assert start(tool, "--output", "o", "--run", "a=b", "--run", wrong) == (2, "", sentence)
    monkeypatch.setattr(megatron_iiet.training.curves, "plot_losses", fail(ValueError("no log")))
    assert start(tool, *arguments) == (2, "", "error: no log\n")


def test_summarize_run(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool, summary = load("summarize_run"), megatron_iiet.training.summary
    monkeypatch.setattr(summary, "summarize_run", lambda run: "it went well")
    monkeypatch.setattr(summary, "list_files", lambda *paths: [f"file {path}" for path in paths])
    run = str(tmp_path)
    listed = f"\nfiles:\nfile {run}\n"
    assert start(tool, run) == (0, f"\nit went well\n{listed}", "")
    sample = tmp_path / "sample.txt"
    sample.write_text("Once\nmore\n\n")
    listed = f"\nfiles:\nfile a\nfile b\nfile {run}\n"
    told = f"\nit went well\n\nsampled text ({sample}):\nOnce\nmore\n{listed}"
    assert start(tool, run, "--also", "a", "b") == (0, told, "")
    assert start(tool, run, "--brief") == (0, f"{run}: it went well\n", "")
    monkeypatch.setattr(summary, "check_complete", lambda run: None)
    assert start(tool, run, "--complete") == (0, "", "")
    monkeypatch.setattr(summary, "check_complete", fail(ValueError("1 of 2 steps")))
    assert start(tool, run, "--complete") == (2, "", "error: 1 of 2 steps\n")
    monkeypatch.setattr(summary, "summarize_run", fail(ValueError("no steps yet")))
    assert start(tool, run) == (2, "", "error: no steps yet\n")


# --- models ---


def test_generate(load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is asked for reaches the model and its generator; the text comes piece by piece."""
    tool, opened, asked = load("generate"), [], []

    def generate(prompt: str, sampling: Sampling, *, write: Callable[[str], None], **named: int) -> Any:
        asked.append((prompt, sampling, named))
        write("and ")
        write("so on")
        return SimpleNamespace(tokens=6, seconds=4.0)

    def open_generator(*given: object, **named: object) -> object:
        opened.append((given, named))
        return SimpleNamespace(generate=generate)

    monkeypatch.setattr(megatron_iiet.hf.generation, "open_generator", open_generator)
    given = (
        "--model m --step 3 --tokenizer t --prompt x --prompt y --max-new-tokens 9 --temperature 0.5 "
        "--top-k 4 --top-p 0.75 --seed 8 --precision bf16 --kv-cache last --draft 2 --trust-remote-code"
    )
    assert start(tool, *given.split()) == (0, "[x]and so on\n\n[y]and so on\n\n", "")
    named = {
        "step": 3, "tokenizer": "t", "precision": "bf16", "kv_cache": "last", "draft": 2,
        "trust_remote_code": True,
    }  # fmt: skip
    assert opened == [(("m",), named)]
    wanted = {"max_new_tokens": 9, "seed": 8}
    assert asked == [(prompt, Sampling(0.5, 4, 0.75), wanted) for prompt in ("x", "y")]
    for draft, meant in (("-1", -1), ("plan.json", "plan.json"), ("1.5", "1.5"), ("--1", -1)):
        if meant != -1 or draft == "-1":
            start(tool, "--model", "m", f"--draft={draft}")
            assert opened.pop()[1]["draft"] == meant
    asked.clear()
    assert start(tool, "--model", "m") == (0, "[]and so on\n\n", "")
    assert asked == [("", Sampling(0.8, 50, 1.0), {"max_new_tokens": 128, "seed": 0})]
    typed = iter(["a", "b"])

    def read(question: str) -> str:
        print(question, end="")
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    shown = "".join(f"> [{word}]and so on\n\n(6 tokens, 1.5 a second)\n" for word in "ab")
    assert start(tool, "--model", "m", "--interactive") == (0, f"{shown}> \n", "")
    monkeypatch.setattr("builtins.input", fail(KeyboardInterrupt()))
    assert start(tool, "--model", "m", "--interactive") == (0, "\n", "")
    monkeypatch.setattr(megatron_iiet.hf.generation, "open_generator", fail(ImportError("no transformers")))
    assert start(tool, "--model", "m") == (2, "", "error: no transformers\n")


GRID = "--parallel.tensor 2 --parallel.pipeline 3 --parallel.sequence --local_rank 1"


def test_evaluate(load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = megatron_iiet.evaluation
    tool, asked, checked = load("evaluate"), [], []
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    for variable in offline:
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr(evaluation.tasks, "check_installed", lambda: checked.append("it"))
    monkeypatch.setattr(evaluation.evaluate, "evaluate_model", asked.append)
    assert start(tool, "--model", "m") == (0, "", "")
    assert checked == ["it"]
    assert [os.environ[variable] for variable in offline] == ["", "", ""]
    default = evaluation.evaluate.Options(evaluation.models.ModelOptions("m"))
    assert asked.pop() == default
    given = (
        "--model m --tasks a,b --data-dir d --include-path i --limit 3 --output o --step 4 --batch-size 5 "
        f"--max-length 6 --precision bf16 --tokenizer t --start bos --trust-remote-code {GRID}"
    )
    assert start(tool, *given.split()) == (0, "", "")
    assert [os.environ[variable] for variable in offline] == ["1", "1", "1"]
    model = evaluation.models.ModelOptions("m", 4, "t", "bos", 6, 5, "bf16", True, ParallelConfig(2, 3, True))
    assert asked == [evaluation.evaluate.Options(model, ("a", "b"), "d", 3, "o", "i")]
    monkeypatch.setattr(evaluation.evaluate, "evaluate_model", fail(OSError("no such task")))
    assert start(tool, "--model", "m") == (2, "", "error: no such task\n")
    monkeypatch.setattr(evaluation.tasks, "check_installed", fail(ValueError("install lm_eval")))
    assert start(tool, "--model", "m") == (2, "", "error: install lm_eval\n")


@pytest.mark.parametrize(
    ("rule", "request_"),
    [
        ("", PlanRequest("auto")),
        ("--threshold auto", PlanRequest("auto")),
        ("--threshold 0", PlanRequest(0.0)),
        ("--threshold 0.25", PlanRequest(0.25)),
        ("--budget 0", PlanRequest(budget=0)),
        ("--budget 3 --rank-by loss", PlanRequest(budget=3, ranking="loss")),
        ("--flops-ratio 0.5", PlanRequest(flops_ratio=0.5)),
        ("--lower-bound", PlanRequest(lower_bound=True)),
    ],
)
def test_influence(
    load: Callable[[str], ModuleType],
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    request_: PlanRequest,
) -> None:
    tool, analysis, asked = load("iteration_influence"), megatron_iiet.distillation.analysis, []
    monkeypatch.setattr(analysis, "analyse", asked.append)
    assert start(tool, "--model", "m", "--output", "o", *rule.split()) == (0, "", "")
    assert asked.pop() == analysis.Options("m", Path("o"), request_)
    given = (
        "--model m --output o --data d --tokenizer t --sequences 3 --micro-batch-size 4 --sequence-length 5 "
        f"--precision bf16 --ablation {GRID} {rule}"
    )
    assert start(tool, *given.split()) == (0, "", "")
    grid = ParallelConfig(2, 3, True)
    assert asked == [analysis.Options("m", Path("o"), request_, "d", "t", 3, 4, 5, "bf16", grid, True)]


def test_influence_is_refused_in_a_sentence(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load("iteration_influence")
    status, _, error = start(tool, "--model", "m", "--output", "o", "--budget", "1", "--lower-bound")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: --budget and --lower-bound given for the plan")
    monkeypatch.setattr(megatron_iiet.distillation.analysis, "analyse", fail(OSError("no such run")))
    assert start(tool, "--model", "m", "--output", "o") == (2, "", "error: no such run\n")


# --- the scripts at the root ---


@pytest.mark.parametrize("script", ["pretrain_iiet", "distill_iiet"])
def test_scripts(script: str, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is configured is trained; what is wrong is a sentence; distillation alone has short names."""
    tool = script_module(script)
    trained: list[Any] = []
    monkeypatch.setattr("megatron_iiet.training.pretrain.pretrain", trained.append)
    (tmp_path / "plan.json").write_text(json.dumps({"iterations": [1, 0]}))
    (tmp_path / "tokenizer.model").touch()
    distils = script == "distill_iiet"
    needed = (
        f"--output_dir {tmp_path}/run --data.prefix {tmp_path}/x --data.tokenizer {tmp_path}/tokenizer.model"
    )
    teacher = ["--teacher" if distils else "--distillation.teacher", str(tmp_path)]
    assert start(tool, *needed.split(), "--optimizer.lr", "0.5", *teacher) == (0, "", "")
    config = trained.pop().config
    assert (config.optimizer.lr, config.distillation.teacher) == (0.5, str(tmp_path))
    status, _, error = start(tool, *needed.split(), "--plan", f"{tmp_path}/none.json", *teacher)
    assert status == 2
    assert (f"cannot read the iteration plan {tmp_path}/none.json" in error) == distils
    status, _, error = start(tool, *needed.split())
    assert (status, len(trained)) == ((2, 0) if distils else (0, 1))
    assert error.startswith("error: there is no teacher; give --teacher the folder") == distils
    for kind in (ValueError, FloatingPointError, OSError):
        monkeypatch.setattr("megatron_iiet.training.pretrain.pretrain", fail(kind("it went wrong")))
        assert start(tool, *needed.split(), *teacher) == (2, "", "error: it went wrong\n")


def script_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS.parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- cuda_check ---

WIDE = "void merge_norm::forward_kernel<float, 8, 1, (merge_norm::Access)0>(merge_norm::ForwardParams<float>)"
NARROW = (
    "void merge_norm::forward_kernel<float, 8, 1, (merge_norm::Access)1>(merge_norm::ForwardParams<float>)"
)
PTXAS = f"""
ptxas info    : Compiling entry function '{WIDE}' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '{NARROW}' for 'sm_90'
    8 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers
"""
NOT_WIDE = "accesses that are not 16 bytes wide: "
MACHINE_CODE = f"""
        /*0000*/  LDG.E R1, [R2] ;
.text.{WIDE}:
        /*0000*/  LDG.E.128.CONSTANT R4, [R2] ;
        /*0010*/  LDG.E.128.CONSTANT R8, [R2] ;
        /*0020*/  LDG.E R1, [R2] ;
        /*0030*/  STG.E.128 [R2], R4 ;
        /*0040*/  LDS R1, [R2] ;
.text.{NARROW}:
        /*0000*/  LDG.E.U16 R1, [R2] ;
"""


def test_what_the_compiler_says_of_kernels(load: Callable[[str], ModuleType]) -> None:
    tool = load("cuda_check")
    wide, narrow = (f"forward_kernel<float, 8, 1, (Access){n}>" for n in range(2))
    kernels = tool.parse_resources(PTXAS)
    assert kernels == [tool.Kernel(wide, 40, 0), tool.Kernel(narrow, 72, 56)]
    assert tool.count_accesses(MACHINE_CODE) == {
        wide: {"LDG.E.128.CONSTANT": 2, "LDG.E": 1, "STG.E.128": 1},
        narrow: {"LDG.E.U16": 1},
    }


@pytest.mark.parametrize(
    ("local_bytes", "place", "accesses", "problem"),
    [
        (0, 0, {}, None),
        (8, 0, {}, "spills or uses local memory (8 bytes)"),
        (0, 0, {"LDG.E.128": 9, "STG.E.128": 9, "LDG.E": 4, "STG.E": 4}, None),
        (0, 1, {"LDG.E.U16": 99}, None),
        (0, 0, {"LDG.E.128": 9, "STG.E.128": 9, "LDG.E": 5}, NOT_WIDE + "{'LDG.E': 5}"),
        (0, 0, {"LDG.E.128": 9, "STG.E.128": 9, "STG.E.64": 1}, NOT_WIDE + "{'STG.E.64': 1}"),
        (0, 0, {"LDG.E.128": 9, "STG.E": 1}, "no 16-byte loads or stores"),
        (0, 0, {"STG.E.128": 9, "LDG.E": 1}, "no 16-byte loads or stores"),
    ],
)  # fmt: skip
def test_kernels_with_problems(
    load: Callable[[str], ModuleType],
    local_bytes: int,
    place: int,
    accesses: dict[str, int],
    problem: str | None,
) -> None:
    tool = load("cuda_check")
    kernel = tool.Kernel(f"k<(Access){place}>", 40, local_bytes, Counter(accesses))
    assert kernel.problem == problem
    told = [] if problem is None else [f"f32 sm_90 k<(Access){place}>: {problem}"]
    assert tool.Unit("f32", "90", [kernel]).problems() == told
    assert tool.Unit("f32", "90", [kernel], "no").problems() == ["f32 sm_90 does not compile:\nno"]


def test_cuda_check(
    load: Callable[[str], ModuleType], start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every storage type for every target; what fails is told, what was not looked at too."""
    tool = load("cuda_check")
    monkeypatch.setattr(tool, "BUILD", tmp_path / "build")
    monkeypatch.setattr(tool, "demangled", lambda text: text)
    monkeypatch.setattr(tool.shutil, "which", lambda name: None)
    told = "cuda-check: skipped, there is no nvcc: kernels, registers, machine code and the torch binding\n"
    assert start(tool) == (0, told, "")
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/bin/{name}")
    commands: list[list[str]] = []
    broken: set[str] = set()

    def run(*command: object) -> SimpleNamespace:
        words = [str(word) for word in command]
        commands.append(words)
        wide_only, code = (
            PTXAS.partition("ptxas info    : Compiling entry function '" + NARROW)[0],
            MACHINE_CODE,
        )
        wrong = any(word in " ".join(words) for word in broken)
        return SimpleNamespace(
            returncode=int(wrong), stderr="bad" if wrong else wide_only, stdout="bad" if wrong else code
        )

    monkeypatch.setattr(tool, "run", run)
    row = "{}   sm_90          1              40            0  3\n"
    head = "type  target   kernels  most registers  local bytes  16-byte accesses\n"
    table = head + "".join(
        row.format(f"{kind:4}"[:4]).replace("   sm", "  sm") for kind in ("f32", "bf16", "f16")
    )
    good = "torch binding: ok\nemulator self-tests: ok\n"
    assert start(tool, "--targets", "90") == (0, f"{table}{good}cuda-check: ok, 0 checks skipped\n", "")
    assert sum("-cubin" in words for words in commands) == 3
    assert sum("-arch=sm_90" in words for words in commands) == 3
    assert [words[-1] for words in commands if "pytest" in words] == ["selftest"]
    assert start(tool, "--targets", "90", "--kernels-only") == (
        0,
        f"{table}cuda-check: ok, 0 checks skipped\n",
        "",
    )
    broken |= {"torch_cuda.cpp", "selftest", "instantiate_bf16"}
    status, out, _ = start(tool, "--targets", "90", "100", "--jobs", "1")
    assert status == 1
    assert out.count("sm_100") == 2 + 1
    assert "torch binding: FAILED\nemulator self-tests: FAILED\n" in out
    assert "bf16 sm_90 does not compile:\nbad\nbf16 sm_100 does not compile:\nbad\n" in out
    assert "torch_cuda.cpp does not compile:\nbad\nthe emulator's self-tests fail:\nbad\n" in out
    assert out.endswith("cuda-check: FAILED, 4 problems, 0 checks skipped\n")
    monkeypatch.setattr(tool, "disassembler", lambda: None)
    broken.clear()
    status, out, _ = start(tool, "--targets", "90", "--kernels-only")
    assert status == 0
    assert out.count("not disassembled") == 3
    skipped = "machine code (nvidia-cuda-nvdisasm could not be installed)"
    assert out.endswith(f"cuda-check: ok, 1 checks skipped: {skipped}\n")


# --- checkpoints ---


def test_checkpoints(load: Callable[[str], ModuleType], start: Start, tmp_path: Path) -> None:
    """Listed, pinned, verified and rolled back, on real ones."""
    tool, run = load("checkpoints"), Saves(tmp_path)
    assert start(tool, str(tmp_path)) == (
        2,
        "",
        f"error: {tmp_path} has no checkpoints; give the output_dir of a training run\n",
    )
    run.save(2, 4)
    status, listed, _ = start(tool, str(tmp_path), "--pin", "2", "--reason", "best so far")
    assert status == 0
    first, second = listed.splitlines()
    assert first.startswith("step_00000002 ")
    assert first.endswith(", pinned (best so far)")
    assert second.endswith(", in force")
    assert start(tool, str(tmp_path), "--unpin", "2")[1].splitlines()[0] == first.removesuffix(
        ", pinned (best so far)"
    )
    assert start(tool, str(tmp_path), "--reject", "4")[1].endswith(", in force, rejected (by hand)\n")
    assert start(tool, str(tmp_path), "--accept", "4")[1].endswith(", in force\n")
    status, _, error = start(tool, str(tmp_path), "--pin", "3")
    assert (status, "step_00000003 is no complete checkpoint" in error) == (2, True)
    verified = "step_00000002  verified, 0.0 MB\nstep_00000004  verified, 0.0 MB\n"
    assert start(tool, str(tmp_path), "--verify") == (0, verified, "")
    flip_a_bit(run.at(4) / FILE)
    status, told, _ = start(tool, str(tmp_path), "--verify")
    assert status == 1
    assert "are not what was written there" in told.splitlines()[1]
    assert start(tool, str(tmp_path), "--verify", "2")[0] == 0
    status, _, error = start(tool, str(tmp_path), "--roll-back", "4")
    assert (status, "are not what was written there" in error) == (2, True)
    (tmp_path / "run.lock").write_bytes(Holder.of_this_process().to_bytes())
    status, _, error = start(tool, str(tmp_path), "--roll-back", "2")
    assert (status, "where another run writes" in error) == (2, True)
    (tmp_path / "run.lock").unlink()
    status, listed, _ = start(tool, str(tmp_path), "--roll-back", "2")
    assert status == 0
    assert listed.splitlines()[0].endswith(", in force")
    assert listed.splitlines()[1].endswith("rejected (the run was set back to step_00000002)")
