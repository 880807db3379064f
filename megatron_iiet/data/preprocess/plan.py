"""What a run is made of: options, inputs, units; written to ``plan.json``, compared ever after, or removed.

What is to be done meets what was begun while the output's lock is held, so jobs that start together agree on
one plan.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_iiet.data.corpora.mmididx import bin_path, idx_path, shards_path
from megatron_iiet.data.preprocess.dedup import DigestFiles, duplicates_path
from megatron_iiet.data.preprocess.layout import Layout, output_name
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.records import JobRecords, UnitRecord, read_records
from megatron_iiet.data.reading.long_text import parts_of
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.reading.tables import parquet_row_count
from megatron_iiet.data.reading.text import chunks_of, parse_rows
from megatron_iiet.data.tokenizers.base import Tokenizer, UncuttableError
from megatron_iiet.durable import replacing

_FORMAT = 1
_LOOKED_AT_INPUTS = 16
_LOOKED_AT_BYTES = 2 << 20  # of the text of each
_LOOKED_AT_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the outputs."""

    options: dict[str, Any]  # options, the tokenizer by its digest
    tokenizer: dict[str, Any]  # file, digest, vocab_size, eod_id
    sampling: dict[str, Any] | None  # rate, corpus_tokens, and how they are known; None without a sample
    inputs: list[InputFile]  # in the order of the documents, as they were when the plan was made

    @property
    def rate(self) -> float | None:
        """Fraction of the documents to keep; None keeps all."""
        return None if self.sampling is None else float(self.sampling["rate"])

    def units(self) -> list[list[InputFile]]:
        """Input files of every unit."""
        size = self.options["inputs_per_shard"] or len(self.inputs)
        return [self.inputs[start : start + size] for start in range(0, len(self.inputs), size)]

    def to_json(self) -> bytes:
        """Content of plan.json."""
        content = {
            "format": _FORMAT,
            **vars(self),
            "inputs": [file.identity for file in self.inputs],
        }
        return json.dumps(content, indent=0).encode()

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']}, only {_FORMAT} is known")
            inputs = [InputFile(*entry) for entry in content["inputs"]]
            return cls(content["options"], content["tokenizer"], content["sampling"], inputs)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no plan ({error}); use another output or --overwrite.") from None


def deciding_options(options: PreprocessOptions, tokenizer_digest: str) -> dict[str, Any]:
    """The options that decide bytes: not how the work is shared, nor where things lie."""
    return {
        "tokenizer": tokenizer_digest,
        "json_keys": list(options.json_keys),
        "text_template": options.text_template,
        "input_format": options.input_format,
        "txt_documents": None if options.txt_documents == "file" else options.txt_documents,
        "max_document_bytes": options.max_document_bytes,
        "min_characters": options.min_characters or None,
        "max_characters": options.max_characters,
        "append_eod": options.append_eod,
        "split_by": options.split_by,
        "sample_tokens": options.sample_tokens,
        "corpus_tokens": options.corpus_tokens,
        "seed": None if options.sample_tokens is None else options.seed,
        "holdout_validation": options.holdout_validation,
        "holdout_test": options.holdout_test,
        "deduplicate": options.deduplicate,
        "bad_rows": options.bad_rows,
        # One shard holds all inputs of a prefix.
        "inputs_per_shard": options.inputs_per_shard if options.output_dir is not None else None,
    }


def differences(plan: Plan, options: dict[str, Any], inputs: Sequence[InputFile]) -> list[str]:
    """What differs from a plan, a phrase each; sizes and times of inputs are compared with the records."""
    found = []
    for name in sorted(plan.options.keys() | options.keys()):
        before, now = plan.options.get(name), options.get(name)
        if before != now:
            found.append(f"{name}: {json.dumps(before)} -> {json.dumps(now)}")
    before_paths, now_paths = ([file.path for file in files] for files in (plan.inputs, inputs))
    if before_paths != now_paths:
        added = [path for path in now_paths if path not in set(before_paths)]
        removed = [path for path in before_paths if path not in set(now_paths)]
        changes = [
            f"{len(paths)} {verb} (first {paths[0]})"
            for verb, paths in (("added", added), ("removed", removed))
            if paths
        ]
        found.append("inputs: " + (", ".join(changes) or "the same files in another order"))
    return found


def share(units: Sequence[Sequence[InputFile]], num_jobs: int, job: int) -> list[int]:
    """Units of a job, largest first: each unit goes to the job that has least to read so far."""
    sizes = [sum(file.size for file in unit) for unit in units]
    loads = [(0, number) for number in range(num_jobs)]
    mine = []
    for unit in sorted(range(len(units)), key=lambda unit: (-sizes[unit], unit)):
        load, number = heapq.heappop(loads)
        if number == job:
            mine.append(unit)
        heapq.heappush(loads, (load + sizes[unit], number))
    return mine


@dataclass(frozen=True)
class Wanted:
    """What this run was asked for."""

    options: PreprocessOptions
    layout: Layout
    inputs: Sequence[InputFile]  # as they are now
    tokenizer_digest: str
    encoder: Callable[[], Tokenizer]  # loads it; called only for a new plan

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the bytes of the outputs."""
        return deciding_options(self.options, self.tokenizer_digest)


def settle(wanted: Wanted, records: JobRecords) -> tuple[Plan, set[int]]:
    """The plan, and the units that are finished: the plan that is there if it fits, else a new one.

    While no unit is finished a plan may still change. An input may change until its unit is finished: a
    truncated file can be fetched again.

    Raises:
        ValueError: units were made by another plan or from inputs that have changed since.
    """
    path = wanted.layout.plan
    if not path.exists():
        if not wanted.options.overwrite:
            _refuse_foreign_outputs(wanted)
        return _new_plan(wanted), set()
    plan = Plan.read(path)
    finished: set[int] = set()
    found = differences(plan, wanted.deciding, wanted.inputs)
    if found and next(read_records(wanted.layout.records), None) is None and not records.others_running():
        remove_everything(wanted, records)
        return _new_plan(wanted), finished
    if not found:
        found = _look_at_records(wanted, plan, finished)
    if found:
        raise ValueError(
            f"{path} was made with other settings: {'; '.join(found)}; use another output or --overwrite."
        )
    return plan, finished


def remove_everything(wanted: Wanted, records: JobRecords) -> None:
    """Remove what earlier runs wrote: lists first, so that nothing names what is no longer there.

    Raises:
        ValueError: other jobs are writing.
    """
    layout = wanted.layout
    if records.others_running():
        raise ValueError(f"Other jobs of {layout.records} are running; stop them before --overwrite.")
    outputs = set(_expected_outputs(wanted.deciding))
    is_ours = layout.plan.exists()
    if is_ours:
        with suppress(ValueError):  # a damaged plan is no reason not to replace it
            outputs.update(_expected_outputs(Plan.read(layout.plan).options))
    for record in read_records(layout.records):
        outputs.update(record.outputs)
    files = layout.files(outputs, discover=is_ours)
    lists = {shards_path(layout.list_prefix(output)) for output in outputs | {output for output, _ in files}}
    for path in [*sorted(lists), *(path for _, path in files)]:
        path.unlink(missing_ok=True)
    duplicates_path(layout.records).unlink(missing_ok=True)
    for path in DigestFiles(layout.records).folder.glob("*.bin"):
        path.unlink(missing_ok=True)
    records.remove_all()
    layout.plan.unlink(missing_ok=True)


def _new_plan(wanted: Wanted) -> Plan:
    encoder = wanted.encoder()
    plan = Plan(
        options=wanted.deciding,
        tokenizer={
            "file": os.path.basename(wanted.options.tokenizer_model),
            "digest": wanted.tokenizer_digest,
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
        sampling=_sampling(wanted.options, wanted.inputs, encoder),
        inputs=list(wanted.inputs),
    )
    with replacing(wanted.layout.plan) as file:
        file.write(plan.to_json())
    return plan


def _sampling(
    options: PreprocessOptions, inputs: Sequence[InputFile], encoder: Tokenizer
) -> dict[str, Any] | None:
    """What a plan says about its sample: rate, corpus_tokens, measured_on; None where none is wanted.

    Raises:
        ValueError: nothing could be measured.
    """
    if options.sample_tokens is None:
        return None
    corpus_tokens, measured_on = options.corpus_tokens, None
    if corpus_tokens is None:
        corpus_tokens, measured_on = _estimate(options, inputs, encoder)
    rate = options.sample_tokens / corpus_tokens
    return {"rate": rate, "corpus_tokens": corpus_tokens, "measured_on": measured_on}


def _estimate(options: PreprocessOptions, inputs: Sequence[InputFile], encoder: Tokenizer) -> tuple[int, str]:
    """Tokens of the corpus, and what was looked at: the starts of up to 16 inputs spread evenly, scaled by
    the bytes of all; deterministic.

    Defective rows are left out, damaged files used as far as they can be read.
    """
    count = min(_LOOKED_AT_INPUTS, len(inputs))
    looks = [
        _look_at(inputs[number * (len(inputs) - 1) // max(1, count - 1)], options, encoder)
        for number in range(count)
    ]
    tokens = sum(found for found, _ in looks)
    if not tokens:
        raise ValueError(
            f"No text was found in {count} of the inputs to estimate the corpus by; give --corpus-tokens."
        )
    stored_bytes = sum(stored for found, stored in looks if found)
    all_bytes = sum(file.size for file in inputs)
    corpus_tokens = max(1, round(tokens * all_bytes / stored_bytes))
    return corpus_tokens, f"{tokens:,} tokens of {sum(found > 0 for found, _ in looks):,} inputs"


def _look_at(file: InputFile, options: PreprocessOptions, encoder: Tokenizer) -> tuple[int, float]:
    """Tokens in the first megabytes of a file, and the bytes that these take as stored."""
    read, tokens, stored = 0, 0, 0.0
    kind = options.reading.format_of(file.path)
    with suppress(ValueError), open_input(file) as opened:  # whoever makes the shard will complain
        rows = parquet_row_count(opened, file.path) if kind == "parquet" and file.size else 0
        for chunk in chunks_of(opened, file.path, options.reading, _LOOKED_AT_CHUNK_BYTES):
            read += len(chunk.data) + 1
            for row in parse_rows(chunk, options.reading)[0]:
                for content in row.texts:
                    with suppress(UncuttableError):
                        ids = encoder.encode_parts(parts_of(content))
                        tokens += ids.size + (options.append_eod and ids.size > 0)
            if rows:
                stored = file.size * (chunk.first_line + chunk.data.count(b"\n")) / rows
            else:  # a plain file's block reaches beyond the chunk
                stored = min(read, opened.tell()) if kind == "jsonl" else opened.tell()
            if read >= _LOOKED_AT_BYTES:
                break
        else:
            stored = file.size
    return tokens, stored


def _refuse_foreign_outputs(wanted: Wanted) -> None:
    """An output without a plan was made by something else, which may still need it."""
    endings = (".shards",) if wanted.options.output_dir is not None else (".shards", ".idx", ".bin")
    for output in _expected_outputs(wanted.deciding):
        prefix = wanted.layout.list_prefix(output)
        for path in (prefix + ending for ending in endings):
            if os.path.exists(path):
                raise ValueError(
                    f"{path} is there already, but no {wanted.layout.plan}; use another output or "
                    "--overwrite."
                )


def _expected_outputs(options: Mapping[str, Any]) -> list[str]:
    """Names of outputs that are known before any text is read, by a plan's options."""
    if options["split_by"] is not None:
        return []
    held_out = options["holdout_validation"] > 0 or options["holdout_test"] > 0
    splits = ["train", "validation", "test"] if held_out else [None]
    return [output_name(None, split, key) for split in splits for key in options["json_keys"]]


def _look_at_records(wanted: Wanted, plan: Plan, finished: set[int]) -> list[str]:
    """Add the finished units; returns what changed of their inputs since, as phrases."""
    units = replace(plan, inputs=list(wanted.inputs)).units()
    changed: list[str] = []
    for record in read_records(wanted.layout.records):
        if record.unit not in finished and shards_exist(wanted.layout, record):
            finished.add(record.unit)
            for before, now in zip(record.inputs, units[record.unit], strict=True):
                if before.size != now.size:
                    changed.append(f"{now.path}: {before.size:,} -> {now.size:,} bytes")
                elif before.stamp != now.stamp:
                    changed.append(f"{now.path}: written to since")
    if wanted.options.deduplicate and duplicates_path(wanted.layout.records).exists():
        digests = DigestFiles(wanted.layout.records)
        changed += [
            f"{inputs[0].path} or what follows, since the first pass of --deduplicate"
            for unit, inputs in enumerate(units)
            if unit not in finished and not digests.has(unit, inputs)
        ]
    return [f"inputs: {len(changed)} changed ({changed[0]})"] if changed else []


def shards_exist(layout: Layout, record: UnitRecord) -> bool:
    """Whether the shards of a unit are there in full size."""
    for output, shard in record.outputs.items():
        prefix = layout.shard_prefix(output, record.unit)
        for path, size in ((bin_path(prefix), shard.bin_bytes), (idx_path(prefix), shard.idx_bytes)):
            if not path.exists() or path.stat().st_size != size:
                return False
    return True
