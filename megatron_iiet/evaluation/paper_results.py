"""What the paper (arXiv 2509.22463) prints of its models: Tables 1, 2 and 5, and what is legible of Figure 5.

Data alone; whatever shows or compares them reads them here.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = (
    ("wikitext", "word_perplexity"),
    ("lambada_openai", "perplexity"),
    ("lambada_openai", "acc"),
    ("piqa", "acc_norm"),
    ("hellaswag", "acc_norm"),
    ("sciq", "acc"),
    ("arc_challenge", "acc_norm"),
    ("winogrande", "acc"),
)
"""Task and metric of each column, as lm-evaluation-harness names them; the mean of the accuracies follows."""
ACCURACIES = COLUMNS[2:]


@dataclass(frozen=True)
class PrintedRow:
    """One system of a table."""

    group: str
    """Size, and tokens that it was trained on or distilled with."""
    system: str
    cells: tuple[str | None, ...]
    """As printed, in the order of :data:`COLUMNS`, then the mean; accuracies in percent. None: not printed,
    or not legible in the text at hand."""


def _rows(text: str) -> tuple[PrintedRow, ...]:
    rows, group = [], ""
    for line in text.strip().splitlines():
        system, _, cells = line.partition("|")
        if not cells:
            group = system.strip()
            continue
        values = tuple(None if cell == "?" else cell for cell in cells.split())
        assert len(values) == len(COLUMNS) + 1, line
        rows.append(PrintedRow(group, system.strip(), values))
    return tuple(rows)


TABLES = {
    "table1": _rows("""
        340M, 16 B tokens
        Transformer++   | 28.2 78.3 28.9 64.3 34.2 76.0 23.6 51.9 46.5
        PCformer        | 25.7 47.0 33.1 64.9 36.3 77.5 24.7 53.3 48.3
        IIET            | 25.0 30.5 37.1 65.2 36.9 79.4 23.9 51.0 48.9
        740M, 30 B tokens
        Transformer++   | 23.3 34.8 36.1 66.4 38.4 78.6 24.5 50.2 49.0
        PCformer        | 21.2 22.0 41.0 66.3 41.3 82.0 23.3 51.2 50.9
        IIET            | 20.7 21.1 41.2 68.9 42.5 82.1 23.8 53.1 51.9
        340M, distilled with 5 B tokens
        Distil PCformer | 27.2 50.4 32.2 64.6 34.9 78.0 24.7 51.3 47.6
        Lower Bound     | 27.0 34.6 36.1 64.0 35.0 80.7 23.0 51.5 48.4
        E-IIET          | 25.7 30.9 37.4 64.4 35.8 80.4 23.5 52.1 48.9
        740M, distilled with 10 B tokens
        Distil PCformer | 22.5 29.5 37.4 66.8 39.2 80.0 23.2 50.9 49.6
        Lower Bound     | 23.0 29.9 37.6 67.4 38.7 79.7 25.2 53.0 50.3
        E-IIET          | 21.2 24.2 40.1 68.5 41.0 81.0 24.6 52.4 51.3
    """),
    "table2": _rows("""
        the FLOPs of the 340M IIET, 16 B tokens
        IIET               | ? ? 37.1 65.2 36.9 79.4 23.9 51.0 48.9
        Trans WS           | ? ? 30.7 63.1 34.4 75.7 23.2 50.4 46.3
        Transformer++ 1.3B | ? ? 37.3 65.7 37.6 78.6 23.7 51.5 49.0
    """),
    "table5": _rows("""
        340M, 16 B tokens
        Transformer++ | 28.23 78.31 28.93 64.31 34.23 76.00 23.63 51.93 46.51
        PCformer      | 25.71 47.02 33.10 64.92 36.31 77.53 24.70 53.26 48.30
        IIET r = 0    | 27.07 48.52 32.43 65.07 34.80 78.30 23.46 50.36 47.40
        IIET r = 1    | 25.96 36.34 34.43 64.69 36.07 76.30 23.29 50.12 47.48
        IIET r = 2    | 25.49 35.76 34.64 ?     36.80 77.20 24.23 51.85 48.28
        IIET r = 3    | 25.02 30.51 37.05 65.23 36.93 79.40 23.89 50.99 48.92
        IIET r = 4    | 25.09 29.94 36.79 64.31 37.25 78.10 22.78 53.75 48.83
        IIET r = 5    | 25.05 30.58 36.32 64.51 37.34 78.55 23.42 53.23 48.90
        IIET r = 6    | 25.10 31.21 35.84 64.71 37.43 79.00 24.06 52.91 48.99
        IIET r = 7    | 25.09 31.62 35.50 65.16 36.98 79.20 23.34 52.98 48.86
        IIET r = 8    | ?     32.02 ?     65.61 36.52 79.40 22.61 51.14 ?
    """),
}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


FIGURE_5_INITIAL = _numbers("""
    0.29 0.19 0.11 0.23 0.21 0.18 0.21 0.17 0.18 0.18 0.22
    0.25 0.30 0.22 0.24 0.19 0.39 0.27 0.23 0.26 0.15 0.31
""")
"""Iteration influence of iterate 0: 22 of 24 layers, the other two are not legible."""
FIGURE_5_FIRST = _numbers("""
    0.20 0.06 0.03 0.02 0.07 0.07 0.04 0.05 0.05 0.06 0.08 0.11
    0.04 0.13 0.07 0.03 0.03 0.01 0.04 0.00 0.02 0.03 0.05 0.06
""")
"""Of iteration 1: 24 layers."""
FIGURE_5_LATER = _numbers("""
    0.02 0.03 0.06 0.06 0.03 0.07 0.10 0.16 0.12 0.07 0.15 0.04 0.01 0.01 0.02 0.03
    0.10 0.01 0.02 0.00 0.02 0.01 0.03 0.05 0.07 0.01 0.00 0.01 0.00 0.11 0.01 0.01 0.00 0.02 0.03
    0.02 0.02 0.01 0.00
""")
"""Of iterations 2 and 3: 39 of 48 cells, which of the two and of what layer is not legible."""
