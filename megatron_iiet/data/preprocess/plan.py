"""What a run is made of: options, and units of inputs; written to ``plan.json`` and followed ever after."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iiet.data.preprocess.layout import Layout
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.records import Unit, identities
from megatron_iiet.data.reading.sources import InputFile
from megatron_iiet.data.tokenizers.base import Tokenizer

FORMAT = 2
_AS_GIVEN = (
    *("text_template", "input_format", "max_document_bytes", "max_characters", "append_eod", "split_by"),
    *("sample_tokens", "corpus_tokens", "holdout_validation", "holdout_test", "deduplicate", "bad_rows"),
    "shuffle",
)


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the outputs."""

    options: dict[str, Any]  # options, the tokenizer by its digest
    tokenizer: dict[str, Any]  # file, digest, vocab_size, eod_id
    sampling: dict[str, Any] | None  # rate, corpus_tokens, and how they are known; None without a sample
    units: list[Unit]  # in the order of the lists; inputs as they were when the plan was made
    next_unit: int  # id of the next new unit

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
        return json.dumps({**vars(self), "format": FORMAT, "units": units}, indent=0).encode()

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        try:
            content = json.loads(path.read_bytes())
            if (number := content.pop("format")) != FORMAT:
                raise ValueError(f"its format is {number}, only {FORMAT} is known")
            content["units"] = [
                Unit(unit, [InputFile(*entry) for entry in entries]) for unit, entries in content["units"]
            ]
            return cls(**content)
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
        **{name: getattr(options, name) for name in _AS_GIVEN},
        "txt_documents": None if options.txt_documents == "file" else options.txt_documents,
        "min_characters": options.min_characters or None,
        "languages": {
            "kept": sorted(set(options.language)),
            "score": options.language_score,
            "model": language_model,
        }
        if options.language
        else None,
        "seed": None if options.sample_tokens is None else options.seed,
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


def first_inputs(units: Sequence[Unit]) -> dict[int, int]:
    """How many inputs come before each unit's, by its id."""
    starts, at = {}, 0
    for unit in units:
        starts[unit.id] = at
        at += len(unit.inputs)
    return starts


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
