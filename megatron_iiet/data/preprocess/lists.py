"""The end of a run: shard lists over the shards of all units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_iiet.data.corpora.mmididx import Shard, bin_path, idx_path, shards_path, token_dtype
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.preprocess.layout import Layout, output_name
from megatron_iiet.data.preprocess.plan import Plan
from megatron_iiet.data.preprocess.records import Counts, OutputRecord, UnitRecord, read_records


@dataclass
class Total:
    """What one output, or all, amount to."""

    documents: int = 0
    tokens: int = 0
    bin_bytes: int = 0

    def add(self, other: Total | OutputRecord) -> None:
        """Add a shard's numbers."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bin_bytes += other.bin_bytes


@dataclass
class Summary:
    """What some finished units amount to."""

    units: int = 0
    outputs: dict[str, Total] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def add(self, record: UnitRecord) -> None:
        """Add a unit."""
        self.units += 1
        self.counts.add(record.counts)
        for output, shard in record.outputs.items():
            self.outputs.setdefault(output, Total()).add(shard)

    @property
    def total(self) -> Total:
        """Over all outputs."""
        total = Total()
        for output in self.outputs.values():
            total.add(output)
        return total


def shards_exist(layout: Layout, record: UnitRecord) -> bool:
    """Whether the shards of a unit are there in full size."""
    for output, shard in record.outputs.items():
        prefix = layout.shard_prefix(output, record.unit)
        for path, size in ((bin_path(prefix), shard.bin_bytes), (idx_path(prefix), shard.idx_bytes)):
            if not path.exists() or path.stat().st_size != size:
                return False
    return True


def write_lists(layout: Layout, plan: Plan, rewrite: bool) -> tuple[Summary, int]:
    """Write the lists of all outputs if all units are finished; a summary, and how many units are missing.

    Lists that are there stay unless ``rewrite``.

    Raises:
        ValueError: an output that is not one of several sources has no document.
    """
    summary = Summary()
    seen = set()
    for record in read_records(layout.records):
        if record.unit not in seen and shards_exist(layout, record):
            seen.add(record.unit)
            summary.add(record)
    missing = len(plan.units()) - summary.units
    if missing:
        return summary, missing
    _refuse_empty(plan, summary)
    outputs = sorted(summary.outputs)
    if rewrite or not all(shards_path(layout.list_prefix(output)).exists() for output in outputs):
        dtype = token_dtype(plan.tokenizer["vocab_size"])
        for output in outputs:
            shards = dict(_shards(layout, output))
            in_order = [shards[unit] for unit in sorted(shards)]
            write_shards(layout.list_prefix(output), in_order, dtype, _info(plan))
    _remove_leftovers(layout, set(outputs))
    return summary, 0


def _shards(layout: Layout, output: str) -> Iterator[tuple[int, Shard]]:
    """Unit and shard of an output. The records are read once for each, so that memory holds one at a time."""
    for record in read_records(layout.records):
        if (shard := record.outputs.get(output)) is not None:
            yield (
                record.unit,
                Shard(
                    name=layout.shard_name(output, record.unit),
                    tokens=shard.tokens,
                    documents=shard.documents,
                    bin_digest=bytes.fromhex(shard.bin_digest),
                    idx_digest=bytes.fromhex(shard.idx_digest),
                ),
            )


def _info(plan: Plan) -> dict[str, Any]:
    return {
        "tokenizer": plan.tokenizer,
        "append_eod": plan.options["append_eod"],
        "made_by": "tools/preprocess_data.py",
        "options": plan.options,
        "sampling": plan.sampling,
    }


def _refuse_empty(plan: Plan, summary: Summary) -> None:
    if not summary.outputs:
        keys = " and ".join(map(repr, plan.options["json_keys"]))
        raise ValueError(f"The inputs hold no documents: every text under {keys} is empty or left out.")
    if plan.options["split_by"] is not None:
        return
    split = "train" if plan.options["holdout_validation"] or plan.options["holdout_test"] else None
    for key in plan.options["json_keys"]:
        if output_name(None, split, key) not in summary.outputs:
            raise ValueError(f"The inputs hold no documents: every text under {key!r} is empty or left out.")


def _remove_leftovers(layout: Layout, outputs: set[str]) -> None:
    """Temporary files of runs that were killed; nobody is at work any more."""
    for _, path in layout.files(outputs, discover=True):
        if path.suffix == ".partial":
            path.unlink(missing_ok=True)
    for path in layout.records.rglob("*.tmp"):
        path.unlink(missing_ok=True)
