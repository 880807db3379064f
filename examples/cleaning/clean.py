#!/usr/bin/env python
"""Quality filters and removal of near duplicates, by datatrove, for tools/preprocess_data.py to read next.

    pip install 'megatron-iiet[cleaning]'
    python examples/cleaning/clean.py --input corpus/ --output cleaned
    python tools/preprocess_data.py --input cleaned/documents --output-dir shards --tokenizer-model t.model

Reads what the preprocessor reads. First FineWeb's four filters with its thresholds; then MinHash (5 words, 14
buckets of 8 hashes) keeps one of each group of near duplicates. The same command goes on where it was
stopped. datatrove's own messages and statistics are in OUTPUT/logs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_iiet.data.reading.kinds import Reading
from megatron_iiet.data.reading.long_text import parts_of, strings_of
from megatron_iiet.data.reading.sources import InputFile, find_inputs
from megatron_iiet.data.reading.text import parse_rows, raise_first, read_chunks

FILTERS = ("gopher-repetition", "gopher-quality", "c4", "fineweb")
_HANDED_ON = (
    "filtered/*.jsonl.zst",
    "signatures/bucket_*/*.minhash.sig",
    "buckets/*.dups",
    "groups/*.remove",
)
Stages = dict[str, tuple[int, list[Any]]]  # by name: number of tasks, and steps


def read_rows(
    _: object, rank: int, tasks: int, files: Sequence[InputFile], options: argparse.Namespace
) -> Iterator[Any]:
    """Documents of a task: those of its files or, where there are fewer than tasks, of its chunks of all."""
    from datatrove.data import Document

    columns, how = Reading(keys=(options.json_key, *options.keep)), Reading(keys=(options.json_key,))
    by_chunk = len(files) < tasks
    for file in files if by_chunk else files[rank::tasks]:
        for number, chunk in enumerate(read_chunks(file, columns)):
            if by_chunk and number % tasks != rank:
                continue
            rows, rejects = parse_rows(chunk, how)
            if options.bad_rows == "error":
                raise_first(rejects)
            for reject in rejects:
                yield Document("", f"{file.path}:{reject.line}", metadata={"defect": reject.reason})
            lines = chunk.data.split(b"\n")
            for row in rows:
                text = "\n".join("".join(parts_of(string)) for string in strings_of(row.texts[0]))
                fields = json.loads(lines[row.line - chunk.first_line]) if options.keep else {}
                # In one entry: datatrove takes others for parts of a file's name.
                about = {"kept": {key: fields[key] for key in options.keep if key in fields}}
                yield Document(
                    text, f"{file.path}:{row.line}", metadata=about if text else {"defect": "empty"}
                )


def is_proper(document: Any) -> bool | tuple[bool, str]:
    """Whether a row has a text, or why not."""
    return True if document.text else (False, document.metadata["defect"])


def as_row(_: object, document: Any, key: str) -> dict[str, Any]:
    """What is written of a document; of one that a filter removed also why."""
    why = {name: value for name, value in document.metadata.items() if name == "filter_reason"}
    return {key: document.text, **document.metadata["kept"], **why}


def stages_of(files: Sequence[InputFile], options: argparse.Namespace) -> Stages:
    """Everything that datatrove is to do, in order."""
    from datatrove.pipeline import dedup, filters
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    folder = {
        name: f"{options.output}/work/{name}" for name in ("filtered", "signatures", "buckets", "groups")
    }
    rows = partial(JsonlWriter, compression="zstd", adapter=partial(as_row, key=options.json_key))
    write = rows(f"{options.output}/work/documents")

    def removed(step: str) -> Any:
        return rows(f"{options.output}/removed/{step}") if options.keep_removed else None

    stop_words = 2 if options.language in ("en", "eng") else None  # datatrove's are English
    makers: dict[str, Callable[..., Any]] = {
        "gopher-repetition": filters.GopherRepetitionFilter,
        "gopher-quality": partial(filters.GopherQualityFilter, min_stop_words=stop_words),
        "c4": partial(filters.C4QualityFilter, filter_no_terminal_punct=False),  # as FineWeb does
        "fineweb": filters.FineWebQualityFilter,
    }
    chosen = [
        makers[name](exclusion_writer=removed(name), language=options.language) for name in options.filters
    ]
    steps = [partial(read_rows, files=files, options=options), filters.LambdaFilter(is_proper), *chosen]
    if not options.minhash:
        return {"filter": (options.tasks, [*steps, write])}
    config = dedup.MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # its other needs xxhash < 4
    again = JsonlReader(folder["filtered"], add_file_path=False)
    signature = dedup.MinhashDedupSignature(folder["signatures"], config, options.language)
    buckets = dedup.MinhashDedupBuckets(folder["signatures"], folder["buckets"], config=config)
    groups = dedup.MinhashDedupCluster(folder["buckets"], folder["groups"], config)
    unique = dedup.MinhashDedupFilter(folder["groups"], removed("minhash"))
    return {
        "filter": (options.tasks, [*steps, JsonlWriter(folder["filtered"], compression="zstd")]),
        "signatures": (options.tasks, [again, signature]),
        "buckets": (config.num_buckets, [buckets]),
        "groups": (1, [groups]),
        "minhash": (options.tasks, [again, unique, write]),
    }


def claim(files: Sequence[InputFile], options: argparse.Namespace) -> None:
    """Take the output's folder, or find that the same command began it.

    Raises:
        ValueError: it holds something else, or a finished result.
    """
    output, settings = options.output, options.output / "settings.json"
    decides = {
        name: value for name, value in vars(options).items() if name not in ("input", "output", "workers")
    }
    decides |= {"datatrove": metadata.version("datatrove"), "inputs": [file.identity for file in files]}
    text = json.dumps(decides, indent=1)
    if (output / "documents").exists():
        raise ValueError(
            f"{output}/documents is finished already; give another --output, or remove {output}."
        )
    if not settings.exists() and output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} holds other things; give an --output that is empty or not there yet.")
    if settings.exists() and settings.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{settings} tells of other inputs, options or datatrove; give the same, or another --output."
        )
    (output / "logs").mkdir(parents=True, exist_ok=True)
    settings.write_text(text, encoding="utf-8")


def clear_up(work: Path) -> None:
    """Remove what the stages handed on, by the names that datatrove gives; what else is there stays."""
    for pattern in _HANDED_ON:
        for path in work.glob(pattern):
            path.unlink()
    for folder in sorted((path for path in work.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):  # something is left in it
            folder.rmdir()
    with suppress(OSError):
        work.rmdir()


def counts_of(logs: Path) -> list[Counter[str]]:
    """What each step of a stage counted, over all its tasks."""
    tasks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((logs / "stats").glob("*.json"))]
    counts: list[Counter[str]] = [Counter() for _ in tasks[0]]
    for task in tasks:
        for count, step in zip(counts, task, strict=True):
            for name, value in step["stats"].items():
                count[name] += int(value["total"] if isinstance(value, dict) else value)
    return counts


def tell(step: str, count: Counter[str]) -> None:
    """A line on what a step removed, with the reasons."""
    found = [(key.removeprefix("dropped_"), number) for key, number in count.most_common()]
    reasons = ", ".join(f"{key} {number:,}" for key, number in found if f"dropped_{key}" in count)
    print(f"removed by {step}: {count['dropped']:,}" + (f" ({reasons})" if reasons else ""), flush=True)


def clean(options: argparse.Namespace) -> None:
    """Do what is missing, and tell what each step removed.

    Raises:
        ValueError: bad inputs or output, datatrove is not installed, or nothing is left.
    """
    if min(options.tasks, options.workers) < 1:
        raise ValueError("--tasks and --workers have to be at least 1.")
    found = find_inputs(options.input)
    print(found, flush=True)
    if not sum(file.size for file in found.files):
        raise ValueError(f"{' '.join(options.input)} holds no byte, or is a pipe; give files with text.")
    try:
        from datatrove.executor import LocalPipelineExecutor
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; run pip install 'megatron-iiet[cleaning]'."
        ) from None
    files = [replace(f, path=f.path if "://" in f.path else os.path.abspath(f.path)) for f in found.files]
    stages, logs = stages_of(files, options), options.output / "logs"
    claim(files, options)
    with (logs / "messages.txt").open("ab") as file:
        os.dup2(file.fileno(), 2)  # what this process, its children and datatrove say
    for name, (tasks, steps) in stages.items():
        LocalPipelineExecutor(steps, tasks, options.workers, str(logs / name)).run()
        counts = counts_of(logs / name)
        if name == "filter":
            rows, kept = counts[0]["total"], counts[-1]["total"]
            print(f"read: {rows:,} rows")
            for step, count in zip(["defects", *options.filters], counts, strict=False):
                tell(step, count)
            if not kept:
                raise ValueError(f"nothing is left of {rows:,} rows; give other --filters, or other inputs.")
        elif name == "minhash":
            tell("minhash", counts[1])
    (options.output / "work" / "documents").rename(options.output / "documents")
    clear_up(options.output / "work")
    print(f"left: {counts[-1]['total']:,} documents in {options.output}/documents")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders, globs, as of the preprocessor",
    )
    add("--output", type=Path, required=True, metavar="FOLDER", help="new; documents/ in it is the result")
    add("--json-key", default="text", metavar="KEY", help="of the text (default: text)")
    add(
        "--keep",
        nargs="+",
        default=[],
        metavar="KEY",
        help="other keys of a row to write again, such as meta",
    )
    add("--bad-rows", choices=["error", "skip"], default="error", help="fail, or count and leave out")
    add(
        "--filters",
        nargs="*",
        choices=FILTERS,
        default=FILTERS,
        help="some of them, or none; always in this order (default: all four)",
    )
    add("--minhash", action=argparse.BooleanOptionalAction, default=True, help="remove near duplicates")
    add("--language", default="eng", help="of the texts, for cutting them into words (default: eng)")
    add("--keep-removed", action="store_true", help="write what a step removes to FOLDER/removed/STEP")
    add(
        "--tasks",
        type=int,
        default=16,
        metavar="N",
        help="parts of the work; what is done of them stays done",
    )
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="tasks at a time")
    options = parser.parse_args()
    options.filters = [name for name in FILTERS if name in options.filters]
    errors = os.fdopen(os.dup(2), "w")
    try:
        clean(options)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on with what is missing.", file=errors)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=errors)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
