"""The paper's table: what a model reached, beside the perplexity and mean accuracy that the paper (arXiv
2509.22463) reports of its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_iiet.evaluation.paper_results import TABLES, PrintedRow
from megatron_iiet.evaluation.tasks import PAPER_TASKS

_ACCURACIES = PAPER_TASKS[1:]  # the first one is measured by its perplexity
MISSING = "–"


@dataclass(frozen=True)
class PaperRow:
    """What the paper reports of one system; None: it does not."""

    system: str
    perplexity: float | None
    mean_accuracy: float | None
    """Percent, over the six accuracies."""


@dataclass(frozen=True)
class PaperSize:
    """One size of the paper."""

    name: str
    tokens: str
    """It was trained on."""
    hidden_size: int
    num_layers: int
    rows: tuple[PaperRow, ...]


def _summary(row: PrintedRow, name: str = "") -> PaperRow:
    """Perplexity and mean of a printed row, under its own name or another."""
    perplexity, mean = (None if cell is None else float(cell) for cell in (row.cells[0], row.cells[-1]))
    return PaperRow(name or row.system, perplexity, mean)


_340M, _740M = (
    [_summary(row) for row in TABLES["table1"] if row.group.startswith(size)] for size in ("340M", "740M")
)
_EQUAL_FLOPS = {row.system: row for row in TABLES["table2"]}
_TRANS_WS = _summary(_EQUAL_FLOPS["Trans WS"], "Trans WS (4×)")
_LARGE = _summary(_EQUAL_FLOPS["Transformer++ 1.3B"], "Transformer++")
PAPER_SIZES = (
    PaperSize("340M", "16 B", 1024, 24, (_340M[0], _TRANS_WS, *_340M[1:])),
    PaperSize("740M", "30 B", 1536, 24, tuple(_740M)),
    PaperSize("1.3B", "16 B", 2048, 24, (_LARGE,)),
)


def paper_size(hidden_size: int, num_layers: int) -> PaperSize | None:
    """The size of the paper that has this shape."""
    return next((s for s in PAPER_SIZES if (s.hidden_size, s.num_layers) == (hidden_size, num_layers)), None)


def mean_accuracy(metrics: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean of the paper's six accuracies, 0 to 1; None unless all were measured."""
    values = [metrics.get(task.name, {}).get(task.metric) for task in _ACCURACIES]
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if len(found) == len(values) else None


def paper_table(system: str, metrics: Mapping[str, Mapping[str, float]], size: PaperSize | None) -> str:
    """Markdown, aligned to be read as it is: the measured system's row, then the paper's of that size."""
    arrows = ["↓"] + ["↑"] * (len(PAPER_TASKS) - 1)
    head = ["", *(f"{task.label} {arrow}" for task, arrow in zip(PAPER_TASKS, arrows, strict=True)), "mean ↑"]
    values = [metrics.get(task.name, {}).get(task.metric) for task in PAPER_TASKS]
    mean = mean_accuracy(metrics)
    rows = [[system, _perplexity(values[0]), *map(_percent, values[1:]), _percent(mean)]]
    for row in size.rows if size is not None else ():
        blanks = [MISSING] * len(_ACCURACIES)
        accuracy = None if row.mean_accuracy is None else row.mean_accuracy / 100
        rows.append([f"paper: {row.system}", _perplexity(row.perplexity), *blanks, _percent(accuracy)])
    return markdown_table(head, rows)


def all_metrics_table(metrics: Mapping[str, Mapping[str, float]], rows: Mapping[str, int]) -> str:
    """Markdown of every metric of every task with its standard error."""
    lines = []
    for task, values in metrics.items():
        for metric, value in values.items():
            if "_stderr" in metric:
                continue
            name, _, of_filter = metric.partition(",")
            error = values.get(f"{name}_stderr{',' * bool(of_filter)}{of_filter}")
            lines.append(
                [task, metric, _number(value), MISSING if error is None else _number(error), f"{rows[task]}"]
            )
    return markdown_table(["task", "metric", "value", "standard error", "rows"], lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width, the first one's text at the left."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join((line(head), f"|{'|'.join(f' {dashes} ' for dashes in rule)}|", *map(line, rows)))


def _perplexity(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"  # also of what is infinite or no number


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
