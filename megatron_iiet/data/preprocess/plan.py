"""What a run is made of: options, and units of inputs; written to ``plan.json`` and followed ever after.

What is to be done meets what was begun while the output's lock is held, so jobs that start together agree on
one plan. Other options than the plan's are refused; other inputs change it, by :func:`follow`.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_iiet.data.corpora.mmididx import bin_path, idx_path, shards_path
from megatron_iiet.data.preprocess.dedup import DigestFiles, Duplicates, duplicates_path
from megatron_iiet.data.preprocess.layout import Layout, known_outputs
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.ownership import Claims, parse_name
from megatron_iiet.data.preprocess.records import (
    JobRecords,
    Total,
    Unit,
    UnitRecord,
    identities,
    read_records,
)
from megatron_iiet.data.reading.long_text import parts_of
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.reading.tables import parquet_row_count
from megatron_iiet.data.reading.text import chunks_of, parse_rows
from megatron_iiet.data.tokenizers.base import Tokenizer, UncuttableError
from megatron_iiet.durable import replacing

_FORMAT = 2  # 1 had a list of inputs, whose units were numbered through
_RECORD = re.compile(
    r"lock|job-\d{5,}-of-\d{5,}\.jsonl|outputs|digests|duplicates\.(bin|lock)|partitions-.{8}|.*\.tmp"
)
_LOOKED_AT_INPUTS = 16
_LOOKED_AT_BYTES = 2 << 20  # of the text of each
_LOOKED_AT_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the outputs."""

    options: dict[str, Any]  # options, the tokenizer by its digest
    tokenizer: dict[str, Any]  # file, digest, vocab_size, eod_id
    sampling: dict[str, Any] | None  # rate, corpus_tokens, and how they are known; None without a sample
    units: list[Unit]  # in the order of the lists; inputs as they were when the plan was made
    next_unit: int  # id of the next new unit
    format: int = _FORMAT

    @property
    def rate(self) -> float | None:
        """Fraction of the documents to keep; None keeps all."""
        return None if self.sampling is None else float(self.sampling["rate"])

    @property
    def inputs(self) -> list[InputFile]:
        """Of all units."""
        return [file for unit in self.units for file in unit.inputs]

    def shape(self) -> list[tuple[int, list[str]]]:
        """Ids and paths of the units."""
        return [(unit.id, [file.path for file in unit.inputs]) for unit in self.units]

    def to_json(self) -> bytes:
        """Content of plan.json."""
        units = [[unit.id, identities(unit.inputs)] for unit in self.units]
        return json.dumps({**vars(self), "format": _FORMAT, "units": units}, indent=0).encode()

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["format"] not in (1, _FORMAT):
                raise ValueError(f"its format is {content['format']}, only {_FORMAT} is known")
            fixed = content["options"], content["tokenizer"], content["sampling"]
            if content["format"] == 1:
                units = grouped([InputFile(*entry) for entry in content["inputs"]], fixed[0])
                return cls(*fixed, units, len(units), 1)
            units = [
                Unit(number, [InputFile(*entry) for entry in entries]) for number, entries in content["units"]
            ]
            return cls(*fixed, units, content["next_unit"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no plan ({error}); use another output or --overwrite.") from None


def grouped(inputs: Sequence[InputFile], options: Mapping[str, Any], first: int = 0) -> list[Unit]:
    """New units of inputs, by a plan's options."""
    size = options["inputs_per_shard"] or max(1, len(inputs))
    starts = range(0, len(inputs), size)
    return [Unit(first + number, list(inputs[at : at + size])) for number, at in enumerate(starts)]


def deciding_options(
    options: PreprocessOptions, tokenizer_digest: str, language_model: str | None = None
) -> dict[str, Any]:
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
        "languages": {
            "kept": sorted(set(options.language)),
            "score": options.language_score,
            "model": language_model,
        }
        if options.language
        else None,
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


def differences(plan: Plan, options: Mapping[str, Any]) -> list[str]:
    """The options that differ from a plan's, a phrase each."""
    values = (
        (name, plan.options.get(name), options.get(name))
        for name in sorted(plan.options.keys() | options.keys())
    )
    return [
        f"{name}: {json.dumps(before)} -> {json.dumps(now)}" for name, before, now in values if before != now
    ]


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
    language_model: str | None = None  # what tells languages, and its version, where it is asked

    @property
    def deciding(self) -> dict[str, Any]:
        """The options that decide the bytes of the outputs."""
        return deciding_options(self.options, self.tokenizer_digest, self.language_model)


@dataclass(frozen=True)
class Settled:
    """What is to be done."""

    plan: Plan
    units: list[Unit]  # the plan's, with the inputs as they are now
    finished: set[int]  # ids of units
    told: list[str] = field(default_factory=list)  # how the plan had to change

    def marks_due(self, wanted: Wanted) -> bool:
        """Whether duplicates are to be looked for before anything is listed."""
        if not wanted.options.deduplicate or Duplicates.are_of(wanted.layout.records, self._inputs()):
            return False
        return self.plan.format > 1 or len(self.finished) < len(self.units)

    def _inputs(self) -> list[InputFile]:
        return [file for unit in self.units for file in unit.inputs]


def check_place(wanted: Wanted) -> None:
    """Refuse a place with files of somebody else's, before anything is written.

    Raises:
        ValueError: an output that is wanted is there and not this place's, or the folder of the records is
            something else's.
    """
    layout, claims = wanted.layout, Claims(wanted.layout)
    if layout.plan.exists():
        if not _looks_like_plan(layout.plan):
            raise ValueError(
                f"{layout.plan} was not written by this tool; choose another output, or remove it yourself."
            )
        if not wanted.options.overwrite:
            return
    elif not wanted.options.overwrite:
        for name in claims.names():
            if (path := claims.found(name)) is not None:
                raise ValueError(
                    f"{path} is there already, but no {layout.plan}; use another output or --overwrite."
                )
    if not layout.plan.exists() and layout.records.is_dir():
        for path in sorted(layout.records.iterdir()):
            if not _RECORD.fullmatch(path.name):
                raise ValueError(
                    f"{path} is not of this tool, whose records belong in {layout.records}; choose another "
                    "output, or move it away."
                )
    ours = claims.names() | _outputs_of_old(layout)
    for output in known_outputs(wanted.deciding):
        if output.name not in ours:
            claims.refuse_foreign(output.name)


def _looks_like_plan(path: Path) -> bool:
    try:
        return "format" in json.loads(path.read_bytes())
    except (ValueError, TypeError):
        return False


def settle(wanted: Wanted, records: JobRecords) -> Settled:
    """What is to be done: by the plan that is there, as changed inputs change it, else by a new one.

    While no unit was ever finished and nobody is at work, a plan makes room for another.

    Raises:
        ValueError: the plan is of other options, or the inputs changed while other jobs run.
    """
    layout = wanted.layout
    if not layout.plan.exists():
        return _start(wanted, records)
    plan, others = Plan.read(layout.plan), records.others_running()
    found = differences(plan, wanted.deciding)
    other_inputs = [file.path for file in plan.inputs] != [file.path for file in wanted.inputs]
    if (found or other_inputs) and not others and next(read_records(layout.records), None) is None:
        remove_everything(wanted, records)
        return _start(wanted, records)
    if found:
        raise ValueError(
            f"{layout.plan} was made with other settings: {'; '.join(found)}; give the former ones, or use "
            f"another output: --overwrite would remove {_finished_work(wanted, plan)}."
        )
    _refuse_streams(wanted, plan)
    if plan.format == 1:
        for name in _outputs_of_old(layout):
            if (output := parse_name(name, plan.options)) is not None:
                Claims(layout).take(output, found_is_ours=True)
    return follow(wanted, plan, others)


def follow(wanted: Wanted, plan: Plan, others: bool) -> Settled:
    """Change a plan as its inputs changed; what is finished of unchanged inputs stays.

    An input may change until a unit of it is finished: a truncated file can be fetched again. Then, or when
    one of several is gone, the unit is replaced by a new one with shards of its own; those of the old stay
    until there are new lists.

    Raises:
        ValueError: other jobs work by the plan as it is.
    """
    layout = wanted.layout
    changes = _changes(wanted, plan)
    after = _renewed(plan, wanted.inputs, changes.stale)
    told = []
    if after.shape() != plan.shape():
        told.append(changes.describe(plan, after))
        if others:
            raise ValueError(
                f"{told[0]}; other jobs of {layout.records} are running: wait for them or stop them, then "
                "start again."
            )
        _write(layout, after)
    elif stale := _with_other_marks(wanted, plan):
        # Other jobs look as well before they tokenize, so none works by the plan as it was.
        after = _renewed(plan, wanted.inputs, stale)
        _write(layout, after)
        DigestFiles(layout.records).rename(
            {old.id: new.id for old, new in zip(plan.units, after.units, strict=True) if old.id != new.id}
        )
        told.append(
            f"duplicates: {len(stale):,} finished units are made again, as other lines of theirs repeat "
            "earlier ones now"
        )
    else:
        after = plan
    settled = _settled(wanted, after, told)
    if settled.marks_due(wanted) and duplicates_path(layout.records).exists():
        if others:
            raise ValueError(
                f"The inputs changed since other jobs of {layout.records}, which are running, looked for "
                "duplicates; wait for them or stop them, then start again."
            )
        duplicates_path(layout.records).unlink()
    return settled


def _settled(wanted: Wanted, plan: Plan, told: list[str]) -> Settled:
    units = _as_now(plan, wanted.inputs)
    finished = {record.unit for record in finished_records(wanted, units)}
    return Settled(plan, units, finished, told)


def _as_now(plan: Plan, inputs: Sequence[InputFile]) -> list[Unit]:
    """A plan's units with their inputs as they are now, those that are gone left out."""
    now = {file.path: file for file in inputs}
    return [
        Unit(unit.id, [now[file.path] for file in unit.inputs if file.path in now]) for unit in plan.units
    ]


def finished_records(wanted: Wanted, units: Sequence[Unit], seen: bool = False) -> Iterator[UnitRecord]:
    """The record of each unit that is finished, of these very inputs, in no order.

    Args:
        seen: the shards were looked at a moment ago; a file system of many servers takes long to do so.
    """
    missing = {unit.id: unit for unit in units}
    for record in read_records(wanted.layout.records):
        unit = missing.get(record.unit)
        if unit is None or not _is_of(wanted, record, unit):
            continue
        if seen or shards_exist(wanted.layout, record):
            del missing[record.unit]
            yield record


def _is_of(wanted: Wanted, record: UnitRecord, unit: Unit) -> bool:
    """Whether a record is of a unit's inputs as they are now, none left out that must not be."""
    accepted = not record.skipped or wanted.options.bad_inputs == "skip"
    return accepted and identities(record.inputs) == identities(unit.inputs)


@dataclass
class _Changes:
    """What happened to inputs since a plan was made."""

    stale: set[int] = field(default_factory=set)  # units that were finished of other inputs
    paths: dict[str, set[str]] = field(default_factory=dict)  # by what happened

    def describe(self, plan: Plan, after: Plan) -> str:
        """One line."""
        kept = {unit.id for unit in plan.units} & {unit.id for unit in after.units}
        what = ", ".join(f"{len(paths):,} {verb}" for verb, paths in self.paths.items() if paths)
        rate = "" if plan.rate is None else f"; the sample's rate stays {plan.rate:.4g}"
        return (
            f"inputs: {what or 'in another order'}; {len(after.units) - len(kept):,} units to make, "
            f"{len(kept):,} kept{rate}"
        )


def _changes(wanted: Wanted, plan: Plan) -> _Changes:
    now = {file.path for file in wanted.inputs}
    before = {file.path for file in plan.inputs}
    changes = _Changes(paths={"added": now - before, "removed": before - now})
    changed, left_out = (changes.paths.setdefault(verb, set()) for verb in ("changed", "left out before"))
    units = {unit.id: unit for unit in _as_now(plan, wanted.inputs)}
    good = set()
    for record in read_records(wanted.layout.records):
        unit = units.get(record.unit)
        if unit is None or len(unit.inputs) < len(record.inputs):
            continue
        if _is_of(wanted, record, unit):
            good.add(unit.id)
            continue
        changes.stale.add(unit.id)
        pairs = zip(record.inputs, unit.inputs, strict=True)
        changed |= {now.path for then, now in pairs if then.identity != now.identity}
        left_out |= record.skipped.keys() - changed
    changes.stale -= good
    return changes


def _renewed(plan: Plan, inputs: Sequence[InputFile], stale: set[int]) -> Plan:
    """A plan for the inputs as they are now; units whose inputs are all there stay, if they are not stale."""
    place = {file.path: number for number, file in enumerate(inputs)}
    next_unit, units = plan.next_unit, []
    for unit in plan.units:
        rest = [inputs[place[file.path]] for file in unit.inputs if file.path in place]
        if rest and (len(rest) < len(unit.inputs) or unit.id in stale):
            units.append(Unit(next_unit, rest))
            next_unit += 1
        elif rest:
            units.append(Unit(unit.id, rest))
    known = {file.path for file in plan.inputs}
    new = [file for file in inputs if file.path not in known]
    if plan.options["inputs_per_shard"] is not None:
        units += grouped(new, plan.options, next_unit)
    elif [file for unit in units for file in unit.inputs] != list(inputs):
        units = grouped(inputs, plan.options, next_unit)
    units.sort(key=lambda unit: min(place[file.path] for file in unit.inputs))
    next_unit = max([next_unit, *(unit.id + 1 for unit in units)])
    return replace(plan, units=units, next_unit=next_unit, format=_FORMAT)


def _with_other_marks(wanted: Wanted, plan: Plan) -> set[int]:
    """Units that were finished when other lines of theirs were duplicates than are by what is known now."""
    units, records = _as_now(plan, wanted.inputs), wanted.layout.records
    inputs = [file for unit in units for file in unit.inputs]
    if not wanted.options.deduplicate or not Duplicates.are_of(records, inputs):
        return set()
    if plan.format == 1 and identities(plan.inputs) == identities(inputs):
        return set()  # records of that time do not say, but nothing has changed
    marks = Duplicates(records)
    starts = first_inputs(units)
    counts = {unit.id: len(unit.inputs) for unit in units}
    return {
        record.unit
        for record in finished_records(wanted, units)
        if record.marks != marks.digest(starts[record.unit], counts[record.unit])
    }


def first_inputs(units: Sequence[Unit]) -> dict[int, int]:
    """How many inputs come before each unit's, by its id."""
    starts, at = {}, 0
    for unit in units:
        starts[unit.id] = at
        at += len(unit.inputs)
    return starts


def _refuse_streams(wanted: Wanted, plan: Plan) -> None:
    for record in read_records(wanted.layout.records):
        streams = [file.path for file in record.inputs if file.is_stream]
        if streams and shards_exist(wanted.layout, record):
            raise ValueError(
                f"{wanted.layout.plan} is of shards that were made of {streams[0]}, which can be read only "
                "once, so there is nothing to compare; use another output: --overwrite would remove "
                f"{_finished_work(wanted, plan)}."
            )


def _finished_work(wanted: Wanted, plan: Plan) -> str:
    """What would be lost with a plan's shards."""
    ids, total = {unit.id for unit in plan.units}, Total()
    count = 0
    for record in read_records(wanted.layout.records):
        if record.unit in ids and shards_exist(wanted.layout, record):
            ids.remove(record.unit)
            count += 1
            for shard in record.outputs.values():
                total.add(shard)
    return f"{count:,} finished shards of {total.documents:,} documents, {total.tokens:,} tokens"


def remove_everything(wanted: Wanted, records: JobRecords) -> None:
    """Remove what earlier runs wrote: lists first, so that nothing names what is no longer there.

    Raises:
        ValueError: other jobs are writing.
    """
    layout, claims = wanted.layout, Claims(wanted.layout)
    if records.others_running():
        raise ValueError(f"Other jobs of {layout.records} are running; stop them before --overwrite.")
    outputs = claims.names() | _outputs_of_old(layout)
    units = {record.unit for record in read_records(layout.records)}
    with suppress(ValueError, FileNotFoundError):  # a damaged plan is no reason not to replace it
        units.update(range(Plan.read(layout.plan).next_unit))
    for output in outputs:
        shards_path(layout.list_prefix(output)).unlink(missing_ok=True)
    for output in outputs:
        for unit, path in layout.files(output):
            if unit is None or unit in units:
                path.unlink(missing_ok=True)
    duplicates_path(layout.records).unlink(missing_ok=True)
    DigestFiles(layout.records).remove_all()
    records.remove_all()
    for output in outputs:
        claims.release(output)
    layout.plan.unlink(missing_ok=True)


def _outputs_of_old(layout: Layout) -> set[str]:
    """Outputs that a plan of the first format and its records name; claims came later."""
    try:
        plan = Plan.read(layout.plan)
    except (ValueError, FileNotFoundError):
        return set()
    if plan.format > 1:
        return set()
    names = {output.name for output in known_outputs(plan.options)}
    return names.union(*(record.outputs for record in read_records(layout.records)))


def _start(wanted: Wanted, records: JobRecords) -> Settled:
    """A new plan; what a start that was killed left in the records says nothing."""
    if records.others_running():
        raise ValueError(
            f"{wanted.layout.plan} is gone while other jobs work by it; stop them, then start again."
        )
    records.remove_all()
    encoder, claims = wanted.encoder(), Claims(wanted.layout)
    units = grouped(wanted.inputs, wanted.deciding)
    plan = Plan(
        options=wanted.deciding,
        tokenizer={
            "file": os.path.basename(wanted.options.tokenizer_model),
            "digest": wanted.tokenizer_digest,
            "vocab_size": encoder.vocab_size,
            "eod_id": encoder.eod_id,
        },
        sampling=_sampling(wanted.options, wanted.inputs, encoder),
        units=units,
        next_unit=len(units),
    )
    for name in claims.names():
        claims.release(name)
    for output in known_outputs(plan.options):
        claims.take(output)
    _write(wanted.layout, plan)
    return Settled(plan, units, set())


def _write(layout: Layout, plan: Plan) -> None:
    with replacing(layout.plan) as file:
        file.write(plan.to_json())


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


def shards_exist(layout: Layout, record: UnitRecord) -> bool:
    """Whether the shards of a unit are there in full size."""
    for output, shard in record.outputs.items():
        prefix = layout.shard_prefix(output, record.unit)
        for path, size in ((bin_path(prefix), shard.bin_bytes), (idx_path(prefix), shard.idx_bytes)):
            if not path.exists() or path.stat().st_size != size:
                return False
    return True
