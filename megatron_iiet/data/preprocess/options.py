"""What to make of which files: the options of preprocessing, checked, and how work is shared by jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_iiet.data.preprocess.language import LANGUAGE_SCORE
from megatron_iiet.data.reading.kinds import FORMATS, Reading, fitting_document_bytes, parse_template
from megatron_iiet.data.tokenizers.base import MAX_UNCUT_BYTES

_COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)")
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PreprocessOptions:
    """One run of preprocessing; the tool's flags carry the same names.

    Raises:
        ValueError: options that contradict each other or leave their range.
    """

    tokenizer_model: str  # SentencePiece .model or Hugging Face tokenizer.json
    inputs: Sequence[str] = ()  # files, folders or globs, "-" is standard input; or dataset
    input_format: str | None = None  # of standard input and of files whose names tell nothing; None: jsonl
    txt_documents: Literal["file", "blank-line"] = "file"  # a document of plain text, or where it ends
    dataset: str | None = None  # a Hugging Face dataset, hub name or local folder, whose data files to read
    split: str | None = None  # split of dataset
    streaming: bool = False  # read the dataset's files from where they are, without downloading them first
    output_prefix: str | None = None  # one shard an output: OUTPUT_PREFIX_text_document; or output_dir
    output_dir: str | None = None  # many shards an output, listed in OUTPUT_DIR/text_document.shards
    inputs_per_shard: int = 1  # input files that make one shard; with output_dir only
    json_keys: Sequence[str] = ("text",)  # each key makes its own output
    max_uncut_bytes: int = MAX_UNCUT_BYTES  # of a text that the tokenizer cannot take in parts
    text_template: str | None = None  # makes the text of the output "text" of several keys: {title}\\n{text}
    max_document_bytes: int | None = None  # a longer row is defective; None: what the memory can hold
    append_eod: bool = False  # put the tokenizer's end-of-document id behind every document
    eod_token: str | None = None  # the token that this must be; None: whichever the tokenizer's file names
    split_by: str | None = None  # dotted key of the name of a row's source; each source makes its own output
    sample_tokens: int | None = None  # keep a uniform sample of documents of about this many tokens
    corpus_tokens: int | None = None  # tokens of the whole corpus, for the sample's rate; None: estimated
    seed: int = 1234  # another seed gives another sample
    holdout_validation: float = 0.0  # fraction of documents for the outputs of split validation
    holdout_test: float = 0.0  # fraction of documents for the outputs of split test
    min_characters: int = 0  # documents of fewer characters are left out
    max_characters: int | None = None  # documents of more characters are left out
    language: Sequence[str] = ()  # documents in others are left out; codes of fastText's lid.176: en, de
    language_score: float = LANGUAGE_SCORE  # what the model has to give the language, of 1
    deduplicate: bool = False  # drop documents whose text is exactly that of an earlier one
    bad_rows: Literal["error", "skip"] = "error"  # a defective row fails its shard, or is left out
    bad_inputs: Literal["fail", "skip"] = (
        "fail"  # an input that cannot be read as asked fails its shard, or is left out
    )
    shuffle: int | None = None  # seed of the order of the documents; None: that of the inputs
    overwrite: bool = False  # remove what an earlier run wrote to this output first
    workers: int = 1  # tokenizing processes; 1 works in this process
    num_jobs: int = 1  # jobs that share the work; all are started with the same options
    job: int = 0  # number of this job, from 0
    chunk_bytes: int = 1 << 20  # text handed to a worker at a time
    progress: bool = True  # show progress on stderr

    def __post_init__(self) -> None:
        for problems in (_problems_of_inputs(self), _problems_of_work(self), _problems_of_filters(self)):
            for problem, applies in problems.items():
                if applies:
                    raise ValueError(problem)
        _ = self.reading  # a bad template is told at once

    @property
    def chooses(self) -> bool:
        """Whether documents are left out or held out."""
        held_out = self.holdout_validation or self.holdout_test
        by_length = self.min_characters or self.max_characters is not None
        return bool(self.deduplicate or held_out or by_length or self.language or self.sample_tokens)

    @cached_property
    def reading(self) -> Reading:
        """How rows are read."""
        return Reading(
            keys=self.json_keys,
            source_key=self.split_by,
            template=parse_template(self.text_template) if self.text_template is not None else (),
            input_format=self.input_format,
            txt_documents=self.txt_documents,
            max_document_bytes=self.max_document_bytes or fitting_document_bytes(),
        )


def _problems_of_inputs(options: PreprocessOptions) -> dict[str, bool]:
    unfit = next((key for key in options.json_keys if "/" in key or "\0" in key), None)
    return {
        "Give either --input or --dataset.": bool(options.inputs) == (options.dataset is not None),
        "--dataset and --split go together, as in --dataset NAME --split train.": (
            (options.dataset is not None) != (options.split is not None)
        ),
        f"--max-uncut-bytes is {options.max_uncut_bytes}; give at least 1.": options.max_uncut_bytes < 1,
        f"--input-format is {options.input_format!r}; give {' or '.join(sorted({*FORMATS.values()}))}.": (
            options.input_format not in (None, *FORMATS.values())
        ),
        f"--txt-documents is {options.txt_documents!r}; give file or blank-line.": (
            options.txt_documents not in ("file", "blank-line")
        ),
        f"--max-document-bytes is {options.max_document_bytes}; give at least 1.": (
            options.max_document_bytes is not None and options.max_document_bytes < 1
        ),
        f"--text-template makes the only text, but --json-keys are {list(options.json_keys)}; give one "
        "of the two.": options.text_template is not None and tuple(options.json_keys) != ("text",),
        "--eod-token goes with --append-eod.": options.eod_token is not None and not options.append_eod,
        "--streaming goes with --dataset.": options.streaming and options.dataset is None,
        f"--json-keys are {list(options.json_keys)}; give one or more, each once.": (
            not options.json_keys or len(set(options.json_keys)) != len(options.json_keys)
        ),
        f"--json-keys has {unfit!r}, which cannot be part of a file name; rename the key.": unfit is not None,
    }


def _problems_of_work(options: PreprocessOptions) -> dict[str, bool]:
    jobs, one_shard = options.num_jobs, options.output_prefix is not None
    return {
        f"--workers is {options.workers}; give at least 1.": options.workers < 1,
        f"--num-jobs is {jobs}; give at least 1.": jobs < 1,
        f"--inputs-per-shard is {options.inputs_per_shard}; give at least 1.": options.inputs_per_shard < 1,
        f"--job is {options.job}; with --num-jobs {jobs} give 0 to {jobs - 1}.": (
            not 0 <= options.job < jobs
        ),
        "Give either --output-prefix (one shard) or --output-dir (many).": (
            one_shard == (options.output_dir is not None)
        ),
        f"--output-prefix makes a single shard, which {jobs} jobs cannot share; use --output-dir.": (
            one_shard and jobs > 1
        ),
        "--inputs-per-shard goes with --output-dir; --output-prefix puts all in one shard.": (
            one_shard and options.inputs_per_shard != 1
        ),
        f"--overwrite would let {jobs} jobs remove each other's work; remove {options.output_dir} first, "
        "then start the jobs without it.": options.overwrite and jobs > 1,
    }


def _problems_of_filters(options: PreprocessOptions) -> dict[str, bool]:
    sample, corpus = options.sample_tokens, options.corpus_tokens
    validation, test = options.holdout_validation, options.holdout_test
    score = options.language_score
    return {
        "--corpus-tokens goes with --sample-tokens.": corpus is not None and sample is None,
        f"--sample-tokens is {sample}; give at least 1.": sample is not None and sample < 1,
        f"--corpus-tokens is {corpus}; give at least 1.": corpus is not None and corpus < 1,
        f"--holdout-validation is {validation}; give a fraction of at least 0, below 1.": (
            not 0 <= validation < 1
        ),
        f"--holdout-test is {test}; give a fraction of at least 0, below 1.": not 0 <= test < 1,
        f"--holdout-validation {validation} and --holdout-test {test} leave nothing to train on; together "
        "they must stay below 1.": validation + test >= 1,
        f"--shuffle is {options.shuffle}; give a seed of 64 bits.": (
            options.shuffle is not None and not -(2**63) <= options.shuffle < 2**63
        ),
        f"--min-characters is {options.min_characters}; give at least 0.": options.min_characters < 0,
        f"--max-characters is {options.max_characters}; give at least 1 and --min-characters.": (
            options.max_characters is not None and options.max_characters < max(1, options.min_characters)
        ),
        f"--language-score is {score}; give more than 0, at most 1.": not 0 < score <= 1,
        "--language-score goes with --language.": score != LANGUAGE_SCORE and not options.language,
        f"--bad-rows is {options.bad_rows!r}; give error or skip.": options.bad_rows not in ("error", "skip"),
        f"--bad-inputs is {options.bad_inputs!r}; give fail or skip.": (
            options.bad_inputs not in ("fail", "skip")
        ),
    }


def parse_count(text: str) -> int:
    """``16B``, ``1.5T``, ``300M``, ``20K`` or ``4000`` as a number; the factors are decimal.

    Raises:
        ValueError: anything else.
    """
    match = _COUNT.fullmatch(text.strip().replace("_", "").upper())
    if match is None:
        raise ValueError(f"{text!r} is not a count; write 4000, 300M, 16B or 1.5T.")
    integer, _, fraction = match[1].partition(".")
    digits, factor = int(integer + fraction), _FACTORS[match[2]]
    count, rest = divmod(digits * factor, 10 ** len(fraction))
    if rest:
        raise ValueError(f"{text!r} is not a whole number; write 4000, 300M, 16B or 1.5T.")
    return count


def share_of_work(
    environment: Mapping[str, str], num_jobs: int | None = None, job: int | None = None
) -> tuple[int, int]:
    """Number of jobs and number of this job: as given, else as SLURM says, else one.

    Under SLURM a job is a task (``srun``) of an element of a job array; either may be missing.

    Raises:
        ValueError: one of the two is given alone, or the variables contradict each other.
    """
    if (num_jobs is None) != (job is None):
        given, missing = ("--job", "--num-jobs") if num_jobs is None else ("--num-jobs", "--job")
        raise ValueError(f"{given} is given without {missing}; give both or neither.")
    if num_jobs is not None and job is not None:
        return num_jobs, job
    elements, element = _array_element(environment)
    tasks = _number(environment, "SLURM_NTASKS", 1) if "SLURM_PROCID" in environment else 1
    task = _number(environment, "SLURM_PROCID", 0)
    if tasks == 1:
        task = 0
    if not task < tasks:
        raise ValueError(f"SLURM_PROCID is {task} with SLURM_NTASKS {tasks}; give --num-jobs and --job.")
    return elements * tasks, element * tasks + task


def _array_element(environment: Mapping[str, str]) -> tuple[int, int]:
    """Elements of the SLURM job array and the place of this one."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 1, 0
    number = _number(environment, "SLURM_ARRAY_TASK_ID", 0)
    if "SLURM_ARRAY_TASK_COUNT" not in environment:
        raise ValueError(
            "SLURM_ARRAY_TASK_ID is set without SLURM_ARRAY_TASK_COUNT; give --num-jobs and --job."
        )
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", 1)
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
    element, rest = divmod(number - first, step)
    if rest or not 0 <= element < count:
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID {number} does not count the {count} elements of an array that starts at "
            f"{first} with step {step}; use an array without gaps, or give --num-jobs and --job."
        )
    return count, element


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "") or str(default)
    if not value.isascii() or not value.isdigit():
        raise ValueError(f"{name} is {value!r}, not a number; give --num-jobs and --job.")
    return int(value)
