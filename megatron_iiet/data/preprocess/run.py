"""Text files to token shards, from options to shard lists."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from math import inf

from megatron_iiet.data.preprocess.dedup import DigestFiles, find_duplicates
from megatron_iiet.data.preprocess.language import language_model
from megatron_iiet.data.preprocess.layout import Layout
from megatron_iiet.data.preprocess.lists import (
    PreprocessReport,
    Summary,
    clear_up,
    list_info,
    refuse_empty,
    summarize,
    write_lists,
)
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.ownership import Claims
from megatron_iiet.data.preprocess.plan import Wanted, first_inputs, share
from megatron_iiet.data.preprocess.records import JobRecords, Unit, UnitRecord, exclusive
from megatron_iiet.data.preprocess.settle import Settled, check_place, remove_everything, settle
from megatron_iiet.data.preprocess.shuffle import shuffle
from megatron_iiet.data.preprocess.tasks import DigestUnit, EncodeUnit, Filters, Recipe, Task
from megatron_iiet.data.preprocess.work import (
    Failure,
    Finish,
    Progress,
    Workers,
    in_a_process_of_its_own,
    run_units,
    work_on,
)
from megatron_iiet.data.reading.kinds import TABLES, Reading
from megatron_iiet.data.reading.long_text import parts_of
from megatron_iiet.data.reading.sources import Found, InputFile, find_inputs, list_dataset
from megatron_iiet.data.reading.text import LONG_LINE_BYTES, parse_rows, read_chunks
from megatron_iiet.data.tokenizers.base import Tokenizer
from megatron_iiet.data.tokenizers.loading import check_eod_token, load_encoder, tokenizer_digest

_SAMPLE_INPUTS = 16
_SAMPLE_CHUNKS = 8  # of each, as long as more text is asked for
_SAMPLE_CHUNK_BYTES = 1 << 18

Log = Callable[[str], None]
Run = Callable[[Sequence[Task], Finish, Progress], list[Failure]]


def preprocess(options: PreprocessOptions, log: Log = print) -> PreprocessReport:
    """Do what is missing of this job's part of a run.

    Args:
        log: is given a line now and then.

    Raises:
        ValueError: bad inputs or tokenizer, another plan for the same output, another process at the same
            job, or no documents at all. Defects of single inputs are in the report instead.
        OSError: records cannot be written.
    """
    start, start_cpu = time.monotonic(), _cpu_seconds()
    layout = Layout(options.output_prefix, options.output_dir, options.shuffle is not None)
    layout.check()
    wanted = Wanted(
        options=options,
        layout=layout,
        inputs=_list_inputs(options, log),
        tokenizer_digest=tokenizer_digest(options.tokenizer_model),
        encoder=cache(lambda: _load_encoder(wanted, log)),
        language_model=language_model(options.language) if options.language else None,
    )
    check_place(wanted)
    if options.chooses and len(options.json_keys) > 1:
        log(
            "note: what is left out or held out is decided for a whole row, by its first text of "
            f"{', '.join(options.json_keys)} that is not empty"
        )
    if options.eod_token is not None:
        in_a_process_of_its_own(check_eod_token, options.tokenizer_model, options.eod_token)
    if not layout.plan.exists():
        wanted.encoder()  # a tokenizer that cannot be loaded leaves nothing behind
    layout.records.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with exclusive(layout.records / "lock"):
            records = stack.enter_context(closing(JobRecords(layout.records, options.job, options.num_jobs)))
            if options.overwrite:
                remove_everything(wanted, records)
            settled = settle(wanted, records)
        report = _Job(wanted, records, settled, log).run()
    return replace(report, seconds=time.monotonic() - start, cpu_seconds=_cpu_seconds() - start_cpu)


@dataclass
class _Job:
    """The work of one job, once it is settled what that is."""

    wanted: Wanted
    records: JobRecords
    settled: Settled
    log: Log
    this_run: Summary = field(default_factory=Summary)

    def run(self) -> PreprocessReport:
        options, wanted = self.wanted.options, self.wanted
        failures: list[Failure] = []
        waiting = ""
        due = self.settled.marks_due(wanted)
        self._announce(due)
        if due or self._pending():
            filters = Filters(
                self.settled.plan.rate,
                options.seed,
                options.holdout_validation,
                options.holdout_test,
                options.min_characters,
                inf if options.max_characters is None else options.max_characters,
                options.language,
                options.language_score,
            )
            recipe = Recipe(options, wanted.encoder(), wanted.layout, filters)
            with Workers(options.workers, recipe) if options.workers > 1 else nullcontext() as workers:
                run = partial(run_units, recipe, workers)
                if due:
                    failures, waiting = self._find_duplicates(run)
                if not failures and not waiting:
                    tasks = self._tasks()
                    with Progress("tokenizing", "tokens", len(tasks), options.progress) as progress:
                        failures = run(tasks, self._finish, progress)
        units = self.settled.units
        summary = summarize(wanted, units)
        missing = len(units) - summary.units
        if not missing and not failures and not waiting:
            failures = self._list(summary)
        return PreprocessReport(
            all_units=summary,
            this_run=self.this_run,
            missing=missing,
            mine_missing=len(self._pending()),
            failures=failures,
            waiting=waiting,
            wanted_tokens=options.sample_tokens,
            rate=self.settled.plan.rate,
        )

    def _list(self, summary: Summary) -> list[Failure]:
        """Write the lists, after the shuffle where one is wanted, and remove what they do not name."""
        layout, plan = self.wanted.layout, self.settled.plan
        places = [(layout.units, write_lists(self.wanted, plan, self.settled.units, summary))]
        if (seed := self.wanted.options.shuffle) is not None:
            failures, numbers = shuffle(
                layout,
                seed,
                plan.tokenizer["vocab_size"],
                list_info(plan, summary),
                sorted(summary.outputs),
                self._run_shuffle,
            )
            if failures:
                return failures
            places.append((layout, dict(numbers)))
        clear_up(layout, plan, self.settled.units, places)
        refuse_empty(layout, plan, summary)
        return []

    def _run_shuffle(self, tasks: Sequence[Task], records: JobRecords) -> list[Failure]:
        if not tasks:
            return []
        options, layout = self.wanted.options, self.wanted.layout
        claims = Claims(layout)
        self.log(f"shuffling: {len(tasks):,} shards to make")

        def finish(record: UnitRecord | None) -> None:
            assert record is not None
            records.append(record)
            claims.recorded(layout, record)

        with (
            Workers(options.workers, None) if options.workers > 1 else nullcontext() as workers,
            Progress("shuffling", "documents", len(tasks), options.progress) as progress,
        ):
            return run_units(None, workers, tasks, finish, progress)

    def _mine(self) -> list[Unit]:
        """Units of this job.

        Shares go by the sizes in the plan, which are the same for jobs that start before and after a broken
        input was replaced; what is read are the inputs as they are now.
        """
        shares = share(
            [unit.inputs for unit in self.settled.plan.units],
            self.wanted.options.num_jobs,
            self.wanted.options.job,
        )
        return [self.settled.units[number] for number in shares]

    def _pending(self) -> list[Unit]:
        return [unit for unit in self._mine() if unit.id not in self.settled.finished]

    def _announce(self, due: bool) -> None:
        options, mine, pending = self.wanted.options, len(self._mine()), len(self._pending())
        for line in self.settled.told:
            self.log(line)
        job = f"job {options.job} of {options.num_jobs}: " if options.num_jobs > 1 else ""
        if not pending and not due:
            self.log(f"{job}nothing to do: all {mine:,} shards are finished")
            return
        if (sampling := self.settled.plan.sampling) is not None:
            known = f" (estimated by {sampling['measured_on']})" if sampling["measured_on"] else ""
            self.log(f"sample: {sampling['rate']:.4g} of {sampling['corpus_tokens']:,} tokens{known}")
            if sampling["rate"] > 1:
                self.log("warning: the corpus is smaller than the sample wanted: all of it is kept")
        done = f", {mine - pending:,} of {mine:,} are finished" if pending < mine else ""
        self.log(f"{job}{pending:,} shards to make{done}")

    def _tasks(self) -> list[EncodeUnit]:
        starts, digests = first_inputs(self.settled.units), DigestFiles(self.wanted.layout.records)
        skips = self.wanted.options.deduplicate and self.wanted.options.bad_inputs == "skip"
        return [
            EncodeUnit(
                unit.id,
                unit.inputs,
                digests.left_out(unit.inputs) if skips else {},
                starts[unit.id],
            )
            for unit in self._pending()
        ]

    def _find_duplicates(self, run: Run) -> tuple[list[Failure], str]:
        """Digests of this job's units and, when all are there, duplicates, by which more units may have to be
        made; failures, what is awaited."""
        wanted, units = self.wanted, self.settled.units
        digests, whole = DigestFiles(wanted.layout.records), wanted.options.bad_inputs == "fail"
        tasks = [
            DigestUnit(unit.id, unit.inputs) for unit in self._mine() if not digests.has(unit.inputs, whole)
        ]
        with Progress("reading", "rows", len(tasks), wanted.options.progress) as progress:
            failures = run(tasks, lambda _: None, progress)
        if failures:
            return failures, ""
        missing = sum(not digests.has(unit.inputs, whole) for unit in units)
        if missing:
            return [], (
                f"pass 1 is done; {missing:,} units of other jobs are missing: start the same jobs again "
                "when all have finished."
            )
        find_duplicates(wanted.layout.records, units)
        with exclusive(wanted.layout.records / "lock"):
            self.settled = settle(wanted, self.records)
        for line in self.settled.told:
            self.log(line)
        return [], ""

    def _finish(self, record: UnitRecord | None) -> None:
        assert record is not None
        self.records.append(record)
        Claims(self.wanted.layout).recorded(self.wanted.layout.units, record)
        self.settled.finished.add(record.unit)
        self.this_run.add(record)


def _list_inputs(options: PreprocessOptions, log: Log) -> list[InputFile]:
    """The inputs, under paths that mean the same wherever a job is started.

    Raises:
        ValueError: what is wanted has to read an input that can be read once several times.
    """
    if options.dataset is not None:
        # Importing datasets takes 100 MB.
        files = in_a_process_of_its_own(
            list_dataset, options.dataset, options.split or "train", options.streaming
        )
        found = Found(files)
    else:
        found = find_inputs(options.inputs, options.input_format)
    log(str(found))
    for file in found.files:
        if file.is_stream:
            _check_stream(file, options)
    return [
        file if "://" in file.path else replace(file, path=os.path.abspath(file.path)) for file in found.files
    ]


def _check_stream(file: InputFile, options: PreprocessOptions) -> None:
    problems = {
        "--deduplicate reads it twice": options.deduplicate,
        "--num-jobs share files, not what one process reads": options.num_jobs > 1,
        "the size of its sample cannot be estimated: give --corpus-tokens": (
            options.sample_tokens is not None and options.corpus_tokens is None
        ),
        "parquet and arrow are read from several places": options.reading.format_of(file.path) in TABLES,
    }
    for problem, applies in problems.items():
        if applies:
            raise ValueError(
                f"The input {file.path} can be read only once, but {problem}; or write it to a file."
            )


def _load_encoder(wanted: Wanted, log: Log) -> Tokenizer:
    path = wanted.options.tokenizer_model
    inputs = [file for file in wanted.inputs[:_SAMPLE_INPUTS] if not file.is_stream]
    places = [path, *(file.path for file in inputs)]
    encoder = in_a_process_of_its_own(_checked_encoder, path, inputs, wanted.options.reading, places=places)
    encoder.max_uncut_bytes = wanted.options.max_uncut_bytes
    log(f"tokenizer: {path}, {encoder.vocab_size} ids, by {encoder.name}")
    return encoder


def _checked_encoder(path: str, inputs: Sequence[InputFile], how: Reading) -> Tokenizer:
    return load_encoder(path, _first_documents(inputs, how))


def _first_documents(inputs: Sequence[InputFile], how: Reading) -> Iterator[str]:
    """Texts from the start of the corpus; what is wrong with it is told later."""
    for place, file in enumerate(inputs, start=1):
        work_on(place)
        try:
            for chunk in islice(read_chunks(file, how, _SAMPLE_CHUNK_BYTES), _SAMPLE_CHUNKS):
                for row in parse_rows(chunk, how)[0]:
                    for text in row.texts:
                        yield next(parts_of(text))
                if len(chunk.data) > LONG_LINE_BYTES:
                    break  # what is behind a giant document would be read beside it
        except (ValueError, OSError):
            continue


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
