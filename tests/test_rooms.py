"""The order of the rooms, read from the imports.

Every import counts, wherever it stands: at the top of a file, inside a function, under TYPE_CHECKING. A lazy
import or one for types only is still knowledge of the other room.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "megatron_iiet"
ROOT = Path(__file__).parents[1]

ROOMS = (
    ("caches",),
    ("__init__", "durable", "installed", "signals"),
    ("config", "ops"),
    ("doctor", "parallel"),
    ("data", "models"),
    ("storage",),
    ("hf",),
    ("serving",),
    ("evaluation",),
    ("training",),
    ("distillation",),
)
"""A room (a folder or a module of the package) imports from those above it; those of one line know nothing of
each other. tools/, benchmarks/ and the scripts at the root may import anything."""

DOORS = {("models/__init__.py", "megatron_iiet.storage.portable"): "models.load and models.save are public"}
"""Imports against the order, file and module, and why they stay."""

OUTSIDE = {
    "deepspeed": ("training/engine/",),
    "lm_eval": ("evaluation/",),
    "fastapi": ("serving/app.py",),
    "uvicorn": ("serving/app.py",),
    "vllm": ("hf/vllm_plugin/",),
    "transformers": ("hf/", "serving/", "evaluation/", "doctor.py"),
    "torch": (
        *("ops/", "parallel/", "data/loader/", "models/", "storage/", "hf/"),
        *("serving/", "evaluation/", "training/", "distillation/", "doctor.py"),
    ),
}
"""Libraries that only some rooms may import."""


class Import(NamedTuple):
    """Where a module is imported."""

    file: str
    """Within the package."""
    line: int
    module: str
    """``a.b`` of ``import a.b``; of ``from a import b`` a.b where that is a module of the package, else a."""

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.file}, line {self.line}: imports {self.module}"


def imports_of(package: Path) -> list[Import]:
    """Every import statement of a package's files."""
    files = sorted(package.rglob("*.py"))
    modules = {module_of(file.relative_to(package)) for file in files}
    return [found for file in files for found in _imports(file, package, modules)]


def _imports(file: Path, package: Path, modules: set[str]) -> Iterator[Import]:
    name = str(file.relative_to(package))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(name, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{PACKAGE}/{name}, line {node.lineno}: write out the relative import"
            source = str(node.module)
            of_modules = [f"{source}.{alias.name}" for alias in node.names]
            yield from (
                Import(name, node.lineno, module)
                for module in dict.fromkeys(m if m in modules else source for m in of_modules)
            )


def module_of(file: Path) -> str:
    """The dotted name of a file of the package."""
    parts = [PACKAGE, *file.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of a module of the package."""
    return [*module.split("."), "__init__"][1]


def against_the_order(imports: Iterable[Import]) -> list[str]:
    """Imports of a room below or beside the own one."""
    floor = {room: n for n, rooms in enumerate(ROOMS) for room in rooms}
    found = []
    for each in imports:
        here = room_of(module_of(Path(each.file)))
        if each.module.split(".")[0] != PACKAGE or room_of(each.module) == here:
            continue
        there = room_of(each.module)
        if floor[there] >= floor[here] and (each.file, each.module) not in DOORS:
            found.append(f"{each}, but {there} is not above {here}")
    return found


def cycle(imports: Iterable[Import]) -> list[str]:
    """Modules that import each other in a circle; empty if there are none."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        if each.module.split(".")[0] == PACKAGE and (each.file, each.module) not in DOORS:
            graph.setdefault(module_of(Path(each.file)), set()).add(each.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(ROOT / PACKAGE)


def test_every_room_has_its_place() -> None:
    rooms = [room for rooms in ROOMS for room in rooms]
    there = [
        path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix == ".py" or any(path.glob("*.py"))
    ]
    assert sorted(rooms) == sorted(there), "ROOMS lists every folder and module of the package once"


def test_rooms_import_from_above(imports: list[Import]) -> None:
    found = against_the_order(imports)
    assert not found, "\n".join(["imports against the order of rooms:", *found])


def test_modules_have_no_cycle(imports: list[Import]) -> None:
    found = cycle(imports)
    assert not found, f"modules import each other: {' ← '.join(found)}"


def test_doors_are_in_use(imports: list[Import]) -> None:
    assert {(each.file, each.module) for each in imports} >= DOORS.keys(), "a door nobody goes through"


@pytest.mark.parametrize("library", OUTSIDE)
def test_libraries_stay_in_their_rooms(library: str, imports: list[Import]) -> None:
    found = [each for each in imports if each.module.split(".")[0] == library]
    assert found, f"nothing imports {library}"
    strangers = [str(each) for each in found if not each.file.startswith(OUTSIDE[library])]
    assert not strangers, "\n".join([f"{library} has no place here:", *strangers])


# --- that the test can fail ---


@pytest.mark.parametrize(
    "text",
    [
        "from megatron_iiet.training import run",
        "import megatron_iiet.training.run",
        "def late():\n    from megatron_iiet.training.run import Run",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_iiet.training.run import Run",
    ],
)
def test_finds_an_import_from_below(text: str, tmp_path: Path) -> None:
    write(tmp_path, {"training/run.py": "Run = int", "storage/a.py": text})
    line = len(text.splitlines())
    assert against_the_order(imports_of(tmp_path)) == [
        f"megatron_iiet/storage/a.py, line {line}: imports megatron_iiet.training.run, "
        "but training is not above storage"
    ]


def test_finds_an_import_from_beside(tmp_path: Path) -> None:
    write(tmp_path, {"data/a.py": "from megatron_iiet.models import b", "models/b.py": "import torch"})
    assert len(against_the_order(imports_of(tmp_path))) == 1


def test_finds_a_cycle_of_modules(tmp_path: Path) -> None:
    """Of three files of one room, with an import inside a function."""
    write(
        tmp_path,
        {
            "training/a.py": "from megatron_iiet.training.engine import b",
            "training/engine/b.py": "from megatron_iiet.training.engine.c import x",
            "training/engine/c.py": "def x():\n    import megatron_iiet.training.a",
        },
    )
    assert against_the_order(imports_of(tmp_path)) == []
    assert len(set(cycle(imports_of(tmp_path)))) == 3


def write(package: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
