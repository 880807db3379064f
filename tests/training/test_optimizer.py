"""What optimizers are given: which parameters decay, and their settings; and what cannot run here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_iiet.config import config_from_dict
from megatron_iiet.config.optimizers import AdamW
from megatron_iiet.models import Transformer
from megatron_iiet.training.optimizers import check_optimizer, prepare_optimizer

MATRICES = ("embedding.weight", "head.weight", "qkv.weight", "output.weight", "gate_up.weight", "down.weight")


@pytest.mark.parametrize(
    "solver",
    [
        {"kind": "iiet", "iterations": 1},
        {"kind": "iiet", "variant": "released", "iterations": 1},
        {"kind": "rk2", "stage_coefficients": "gated"},
        {"kind": "pcformer"},
    ],
    ids=lambda solver: solver.get("variant", solver["kind"]),
)
@pytest.mark.parametrize(("tied", "kind"), [(True, "adamw"), (False, "adamw"), (False, "muon")])
def test_matrices_decay_and_nothing_else(solver: dict[str, Any], tied: bool, kind: str) -> None:
    sizes = {"hidden_size": 16, "ffn_hidden_size": 24, "num_layers": 2, "num_attention_heads": 2}
    family = {"attention_bias": "qkvo", "qk_norm": True}
    config = config_from_dict(
        {
            "model": {**sizes, "vocab_size": 60, "tie_embeddings": tied, **family},
            "solver": solver,
            "optimizer": {
                "kind": kind,
                "lr": 3e-3,
                "weight_decay": 0.25,
                "beta1": 0.8,
                "beta2": 0.99,
                "eps": 1e-7,
            },
        }
    )
    model = Transformer(config)
    prepared = prepare_optimizer(model, config.optimizer)
    assert set(prepared.moments) == set(model.parameters())
    optimizer = prepared.build(prepared.groups)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {name: 0.25 if name.endswith(MATRICES) else 0.0 for name in names.values()}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.99), 1e-7)
        assert len({getattr(p, "keep_fp32", False) for p in group["params"]}) == 1, "a group has one type"
        assert len({prepared.moments[p] for p in group["params"]}) == 1, (
            "DeepSpeed makes one tensor of a group"
        )
    hidden = {names[p] for p, moments in prepared.moments.items() if "momentum_buffer" in moments}
    ends = MATRICES[2:] if kind == "muon" else ()
    assert hidden == {name for name in names.values() if name.endswith(ends)}


def test_an_apex_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's needs a GPU, which tests do not have; a folder of its shape stands for it."""
    config, cpu = AdamW(implementation="apex"), torch.device("cpu")

    def refusal() -> str:
        importlib.invalidate_caches()
        with pytest.raises(
            ValueError, match=r"^optimizer\.implementation is 'apex', .*; set it to 'auto', or"
        ) as e:
            check_optimizer(config, cpu)
        return str(e.value).partition("but ")[2].partition(";")[0]

    check_optimizer(AdamW(), cpu)
    assert refusal() == "there is no apex"
    monkeypatch.syspath_prepend(str(tmp_path))
    for file, expected in (
        ("apex/__init__.py", "the apex installed is another project of that name, as PyPI has one"),
        ("apex/optimizers/fused_adam.py", "it was built without its CUDA extensions"),
        ("amp_C.py", "it steps on NVIDIA GPUs only, and this run is on cpu"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("print 'of Python 2'")
        assert refusal() == expected


def test_apex_is_given_what_torch_is_and_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of its interface: NVIDIA's needs a GPU."""
    given: list[Any] = []
    stand_in = SimpleNamespace(FusedAdam=lambda groups, **settings: given.append((groups, settings)))
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(optimizers=stand_in))
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    config = AdamW(implementation="apex", lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.25)
    model = torch.nn.Linear(2, 3)
    prepared = prepare_optimizer(model, config)
    prepared.build(prepared.groups)
    ((groups, settings),) = given
    assert settings == {"lr": 0.5, "betas": (0.8, 0.7), "eps": 1e-3}
    assert [group["step"] for group in groups] == [0] * len(prepared.groups)
    assert [{**group, "step": None} for group in groups] == [{**g, "step": None} for g in prepared.groups]
    assert {p.shape for group in groups for p in group["params"]} == {(3, 2), (3,)}
    assert all("step" not in group for group in prepared.groups)
