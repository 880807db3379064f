"""What a run is made of: options, inputs, units; written to ``plan.json`` and compared ever after."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.reading.sources import InputFile

_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of the outputs."""

    options: dict[str, Any]
    """Options, the tokenizer by its digest."""
    tokenizer: dict[str, Any]
    """file, digest, vocab_size, eod_id."""
    sampling: dict[str, Any] | None
    """rate, corpus_tokens, and how they are known; None without a sample."""
    inputs: list[InputFile]
    """In the order of the documents, as they were when the plan was made."""

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
        return json.dumps(content, indent=0, ensure_ascii=True).encode()

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
