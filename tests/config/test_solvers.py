"""The declarations of the solvers: what a configuration makes of them, and that nothing says them twice."""

from __future__ import annotations

import ast
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

import megatron_iiet
from megatron_iiet.config import ConfigError, config_from_file, config_to_yaml, load_config
from megatron_iiet.config.kinds import name_fields, own_keys
from megatron_iiet.config.solvers import (
    IIET,
    SOLVERS,
    Euler,
    Iterating,
    Merging,
    PCformer,
    ReleasedIIET,
    SolverConfig,
)
from megatron_iiet.hf import modeling_iiet
from megatron_iiet.models import Transformer
from megatron_iiet.models.solvers import _MODULES

PACKAGE = Path(megatron_iiet.__file__).parent
SYSTEMS = [pytest.param(solver, id=solver().system) for solver in SOLVERS]
# A value of each key that is not its default.
OTHER: dict[str, Any] = {
    "coefficient_init": "average",
    "damping": 0.5,
    "history_norm": "none",
    "iterations": 1,
    "key_values": "first",
    "merge": False,
    "output_norm": "layer",
    "predictor": "euler",
    "predictor_order": 4,
    "readout": "shared",
    "repeats": 2,
    "schedule": [[0.5, 0], [0.5, 3]],
    "stage_coefficients": "fixed",
}


def write(path: Path, solver: dict[str, Any], **keys: Any) -> str:
    path.write_text(yaml.safe_dump({"solver": solver, **keys}))
    return str(path)


def words(solver: dict[str, Any]) -> list[str]:
    return [word for key, value in solver.items() for word in (f"--solver.{key}", yaml_word(value))]


def yaml_word(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def foreign_keys(solver: type[SolverConfig]) -> list[str]:
    return sorted(OTHER.keys() - own_keys(solver).keys())


def test_the_table_of_this_test_is_complete() -> None:
    assert OTHER.keys() == SOLVERS.types.keys() - {"kind", "variant"}
    assert _MODULES.keys() == set(SOLVERS)


@pytest.mark.parametrize("solver", SYSTEMS)
def test_own_keys_are_taken(solver: type[SolverConfig], tmp_path: Path) -> None:
    own = {key: OTHER[key] for key in own_keys(solver)}
    if "schedule" in own:
        own |= {"iterations": 3}
    if "merge" in own:
        own |= {"merge": True}  # without it three of the other keys have no effect
    given = name_fields(solver) | own
    by_flag = load_config(words(given))
    by_file = load_config(["--config", write(tmp_path / "run.yaml", given)])
    assert by_flag == by_file
    assert type(by_flag.config.solver) is solver
    for key, value in own.items():
        found = getattr(by_flag.config.solver, key)
        assert ([list(stage) for stage in found] if key == "schedule" else found) == value
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config_to_yaml(by_flag.config))
    assert config_from_file(resolved) == by_flag.config
    assert set(yaml.safe_load(resolved.read_text())["solver"]) == set(given)


@pytest.mark.parametrize("solver", SYSTEMS)
def test_a_key_of_another_kind_is_refused(solver: type[SolverConfig], tmp_path: Path) -> None:
    """On the command line, and in the file that names the kind; with the kinds it belongs to."""
    named = name_fields(solver)
    plain = write(tmp_path / "plain.yaml", named)
    for key in foreign_keys(solver):
        mixed = write(tmp_path / "mixed.yaml", named | {key: OTHER[key]})
        later = write(tmp_path / "later.yaml", {key: OTHER[key]}, base="plain.yaml")
        for arguments in (
            words(named | {key: OTHER[key]}),
            ["--config", plain, *words({key: OTHER[key]})],
            ["--config", mixed],
            ["--config", later],
        ):
            with pytest.raises(ConfigError) as caught:
                load_config(arguments)
            message = str(caught.value)
            assert message.startswith(f"solver.{key} is ")
            assert f"but the solver is of {solver().system}, which has no such key; leave it out" in message


def test_the_refusal_names_the_kinds_that_have_the_key() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(words({"kind": "pcformer", "damping": 0.5}))
    assert str(caught.value) == (
        "solver.damping is 0.5 on the command line, but the solver is of kind pcformer, which has no such "
        "key; leave it out, or take a solver of kind iiet, variant paper"
    )
    with pytest.raises(ConfigError, match=r"take a solver of kind dlcl, kind pcformer or kind iiet$"):
        load_config(words({"kind": "euler", "coefficient_init": "average"}))
    with pytest.raises(ConfigError, match=r"solver.variant is 'released' .* take a solver of kind iiet$"):
        load_config(words({"kind": "euler", "variant": "released"}))


@pytest.mark.parametrize("solver", SYSTEMS)
def test_a_key_that_was_inherited_is_told(solver: type[SolverConfig], tmp_path: Path) -> None:
    """From a base file whose kind a later file, or the command line, changes."""
    every = {key: value for key, value in OTHER.items() if key not in own_keys(solver)}
    write(tmp_path / "base.yaml", every)
    named = name_fields(solver)
    for arguments in (
        ["--config", write(tmp_path / "run.yaml", named, base="base.yaml")],
        ["--config", str(tmp_path / "base.yaml"), *words(named)],
    ):
        loaded = load_config(arguments)
        assert loaded.config.solver == solver()
        listed = ", ".join(f"solver.{key}" for key in SOLVERS.types if key in every)
        assert loaded.notes == (f"without effect for {solver().system}: {listed}",)


def test_another_variant_drops_what_only_the_first_has(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"kind": "iiet", "iterations": 2, "damping": 0.5})
    loaded = load_config(["--config", str(tmp_path / "base.yaml"), "--solver.variant", "released"])
    assert loaded.config.solver == ReleasedIIET(iterations=2)
    assert loaded.notes == ("without effect for kind iiet, variant released: solver.damping",)


@pytest.mark.parametrize("key", ["predictor", "coefficient_init", "history_norm"])
def test_a_key_of_the_merge_without_one(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(words({"merge": False, key: OTHER[key]}))
    assert str(caught.value) == (
        f"solver.{key} is {OTHER[key]!r}, which has no effect with solver.merge false; leave it out, or set "
        "solver.merge to true"
    )


def test_a_note_is_printed_by_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_iiet.config import load_config_or_exit

    write(tmp_path / "base.yaml", {"kind": "iiet", "iterations": 2})
    load_config_or_exit(["--config", str(tmp_path / "base.yaml"), "--solver.kind", "euler"])
    assert capsys.readouterr().out == "without effect for kind euler: solver.iterations\n"


def test_a_note_is_a_warning_where_no_script_prints_it(tmp_path: Path) -> None:
    path = write(tmp_path / "base.yaml", {"kind": "iiet", "iterations": 2})
    with pytest.warns(UserWarning, match="without effect") as told:
        assert config_from_file(path, ["--solver.kind", "euler"]).solver == Euler()
    assert [str(one.message) for one in told] == [f"{path}: without effect for kind euler: solver.iterations"]
    assert told[0].filename == __file__, "whoever reads it learns which call it is of"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_file(path)


def test_a_choice_that_only_another_kind_has() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(words({"kind": "rk4", "stage_coefficients": "gated"}))
    assert str(caught.value) == (
        "solver.stage_coefficients is 'gated' on the command line, which a solver of kind rk4 does not have; "
        "set it to 'fixed', 'learned' or 'full', or take a solver of kind rk2"
    )


FLAT = {
    "kind": "euler",
    "variant": "paper",
    "iterations": 3,
    "predictor": "merged",
    "coefficient_init": None,
    "history_norm": "rms",
    "damping": 1.0,
    "readout": "separate",
    "output_norm": "none",
    "stage_coefficients": "learned",
    "predictor_order": 2,
    "repeats": 4,
    "key_values": "every",
    "schedule": None,
}
"""What a version before kinds had keys of their own wrote of a resolved configuration."""


@pytest.mark.parametrize("solver", SYSTEMS)
def test_resolved_configurations_of_earlier_versions_are_read(
    solver: type[SolverConfig], tmp_path: Path
) -> None:
    path = write(tmp_path / "config.yaml", FLAT | name_fields(solver))
    with pytest.warns(UserWarning, match=rf"{path}: without effect for {solver().system}: solver\."):
        config = config_from_file(path)
    assert config.solver == solver()


def test_before_there_was_a_choice_increments_were_as_they_are(tmp_path: Path) -> None:
    first = {key: FLAT[key] for key in ("variant", "iterations", "predictor", "coefficient_init", "schedule")}
    for kind in ("iiet", "dlcl"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of keys that kind dlcl does not have
            config = config_from_file(write(tmp_path / "config.yaml", first | {"kind": kind}))
        assert config.solver.history_norm == "none"  # type: ignore[attr-defined]


def exported_defaults(solver: type[SolverConfig]) -> dict[str, Any]:
    """The keys that say something of a trained model, with their defaults, null resolved."""
    found = {f.name: f.default for f in fields(solver) if f.init and f.name != "schedule"}
    if issubclass(solver, Merging):
        found["coefficient_init"] = solver().resolved_coefficient_init
    return found


def choices_of(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (True, False)
    parts = [hint] if get_origin(hint) is Literal else get_args(hint)
    return tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))


@pytest.mark.parametrize("solver", SYSTEMS)
def test_the_file_that_travels_says_the_same(solver: type[SolverConfig]) -> None:
    """Key by key and value by value: defaults, choices, numbers of evaluations."""
    names = name_fields(solver)
    table = modeling_iiet._SOLVER_KEYS[names.get("variant", names["kind"])]
    assert table == exported_defaults(solver)
    for key, hint in own_keys(solver).items():
        if key == "schedule":
            continue
        lacking = modeling_iiet._NOT_OF_KIND.get((names["kind"], key), ())
        found = tuple(choice for choice in modeling_iiet._CHOICES.get(key, ()) if choice not in lacking)
        assert sorted(map(str, found)) == sorted(map(str, choices_of(hint))), key
    counts = [2, 0, 1] if issubclass(solver, Iterating) else [0, 0, 0]
    given = names | ({"iterations": counts} if issubclass(solver, Iterating) else {})
    config = modeling_iiet.IIETConfig(num_hidden_layers=3, solver=given)
    assert config.evaluations == [solver().evaluations(r) for r in counts]
    assert config.iterations == counts


def test_the_file_that_travels_knows_no_others() -> None:
    kinds = {name_fields(solver)["kind"] for solver in SOLVERS}
    variants = {"iiet": tuple(name_fields(s)["variant"] for s in SOLVERS if name_fields(s)["kind"] == "iiet")}
    assert set(modeling_iiet._KINDS) == kinds
    assert variants == modeling_iiet._VARIANTS
    assert set(modeling_iiet._SOLVER_KEYS) == kinds - {"iiet"} | set(variants["iiet"])
    assert set(modeling_iiet._KNOWN_KEYS) == SOLVERS.types.keys() - {"schedule"}


@pytest.mark.parametrize("solver", SYSTEMS)
def test_modules_evaluate_as_often_as_declared(solver: type[SolverConfig]) -> None:
    """Counted while they run, not read off."""
    from megatron_iiet.config import RunConfig
    from megatron_iiet.config.schema import ModelConfig

    config = RunConfig(model=ModelConfig(32, 48, 2, 2, vocab_size=64), solver=solver())
    model = Transformer(config)
    model.initialise(0)
    calls = []
    for layer in model.layers.values():
        layer.increment.register_forward_hook(lambda *_: calls.append(1))
    import torch

    model(torch.zeros(1, 4, dtype=torch.int64))
    assert len(calls) == 2 * solver().evaluations(config.solver.iterations_per_layer(2)[0])


def test_what_corrects_is_observed() -> None:
    assert [solver for solver in SOLVERS if solver.corrects] == [PCformer, IIET, ReleasedIIET]
    assert Euler().is_llama


@pytest.mark.slow
def test_nobody_asks_for_a_kind_by_name() -> None:
    """Outside the declarations, their modules and the file that travels alone."""
    names = {name for solver in SOLVERS for name in name_fields(solver).values()}
    apart = {PACKAGE / "config" / "solvers.py", PACKAGE / "hf" / "modeling_iiet.py"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path in apart or path.is_relative_to(PACKAGE / "models" / "solvers"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare) or "model_type" in ast.unparse(node):
                continue
            constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
            if constants & names:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
