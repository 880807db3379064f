"""What vLLM's plugin needs of this package is there; the plugin itself runs in ``make test-vllm``."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megatron_iiet.hf import modeling_iiet
from megatron_iiet.hf.export import config_fields
from megatron_iiet.hf.modeling_iiet import History, IIETConfig, Solver, build_solver
from megatron_iiet.hf.travelling import modeling_code
from tests.hf.solvers_under_test import EVERY_SOLVER, hf_model, our_model
from tests.vllm import check

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "megatron_iiet" / "hf" / "vllm_plugin"
SOURCES = sorted(PLUGIN.rglob("*.py"))


def constant(name: str) -> Any:
    """A literal of the plugin's checks, which cannot be imported without vLLM."""
    for node in ast.parse((PLUGIN / "vllm_iiet" / "checks.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"checks.py has no {name}")


def test_what_the_plugin_imports_of_this_file_is_there() -> None:
    names = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "vllm_iiet.modeling_iiet":
                names += [alias.name for alias in node.names]
    assert {"IIETConfig", "build_solver", "History"} <= {*names}
    assert [name for name in names if not hasattr(modeling_iiet, name)] == []


def test_every_field_of_an_export_is_computed_by_the_plugin() -> None:
    """A new field of IIETConfig has to be computed there, or be known to change nothing."""
    config = our_model("iiet-plan").config
    computed = {*LlamaConfig().to_dict(), *constant("FIELDS"), *constant("_ALSO_WRITTEN")}
    written = {*IIETConfig().to_dict(), *config_fields(config, {}, "fp32", as_llama=False)}
    assert written - computed == set()


@pytest.mark.parametrize("name", EVERY_SOLVER)
def test_solvers_take_tokens_without_a_batch(name: str) -> None:
    """The plugin's are [T, D]: the tokens of all requests in a row."""
    config = hf_model(our_model(name)).config
    generator = torch.Generator().manual_seed(0)
    y_TD = torch.randn(7, config.hidden_size, generator=generator)
    weights = torch.randn(5, config.hidden_size, generator=generator)
    results = []
    for shaped in (y_TD, y_TD.unsqueeze(0)):
        history, y = History(), shaped
        for layer in range(config.num_hidden_layers):
            solver: Solver = build_solver(config, layer)
            solver.iterations = config.iterations[layer]
            with torch.no_grad():
                for parameter_name, value in solver.initial().items():
                    solver.get_parameter(parameter_name).copy_(value)
                if layer == 0 and solver.roots:
                    history.append(y)
                y, kept = solver(y, lambda x, i: torch.tanh(x * weights[i]), history)
            if solver.keeps:
                history.append(kept)
        results.append(y.reshape(7, -1))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], y_TD)


@pytest.mark.slow
def test_the_wheel_has_the_file_that_travels(tmp_path: Path) -> None:
    plugin = tmp_path / "hf" / PLUGIN.name  # a copy, lest a build that leaves files leave them here
    shutil.copytree(PLUGIN, plugin, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "hf" / "modeling_iiet.py").write_bytes(modeling_code())
    before = sorted(plugin.rglob("*"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", tmp_path, plugin], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("vllm_iiet-*.whl"))) as wheel:
        assert wheel.read("vllm_iiet/modeling_iiet.py") == modeling_code()
        modules = {name for name in wheel.namelist() if name.endswith(".py")}
    written = {str(source.relative_to(PLUGIN)) for source in SOURCES} - {"setup.py"}
    assert modules == written | {"vllm_iiet/modeling_iiet.py"}
    assert sorted(plugin.rglob("*")) == before, "the build left files in the source tree"


def test_the_plugin_is_found_and_runs_with_the_vllm_that_is_tested() -> None:
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["iiet"].partition(":")
    defined = ast.parse((PLUGIN / module / "__init__.py").read_text()).body
    assert function in {node.name for node in defined if isinstance(node, ast.FunctionDef)}
    assert check.VLLM.partition("==")[2].startswith(f"{constant('VLLM')}.")
    assert project["name"] in (ROOT / "docs" / "vllm.md").read_text()
