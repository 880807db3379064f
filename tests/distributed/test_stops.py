"""Requests to stop that come while ranks start: none of them trains, and all end in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import LoadedConfig, config_from_dict
from megatron_iiet.models import Transformer
from megatron_iiet.signals import REQUEUE
from megatron_iiet.training import pretrain as module
from megatron_iiet.training.engine.plain import PlainEngine
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data
from tests.tiny import make_data, tiny_config

SEAMS: dict[str, tuple[Any, str, Any, str]] = {
    # when the second rank is asked: in this call; and the call that is not made then on either
    "while the folder is probed": (module, "check_shared", module, "check_tokenizer"),
    "while the corpora are opened": (module, "open_corpora", module, "engine_class"),
    "while weights are drawn": (Transformer, "initialise", PlainEngine, "_start"),
    "while the engine is built": (PlainEngine, "_start", module, "train_batches"),
}


def asked_in(seam: str, config: dict[str, Any]) -> tuple[int, bool]:
    """The status that a rank ends with, and whether it went on."""
    owner, name, later, not_called = SEAMS[seam]
    before, reached = getattr(owner, name), []

    def and_a_signal(*arguments: Any, **words: Any) -> Any:
        result = before(*arguments, **words)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return result

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def reach(*arguments: Any, **words: Any) -> Any:
            reached.append(not_called)
            return call(*arguments, **words)

        return reach

    setattr(later, not_called, noted(getattr(later, not_called)))
    setattr(owner, name, and_a_signal)
    return module.pretrain(LoadedConfig(config=config_from_dict(config))), bool(reached)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize("seam", SEAMS)
def test_a_rank_that_is_asked_in_the_start_ends_all(seam: str, data: dict[str, str], tmp_path: Path) -> None:
    config = as_data(tiny_config(data, tmp_path / "run"))
    assert run_ranks(asked_in, 2, seam, config) == [(REQUEUE, False)] * 2
    assert not (tmp_path / "run").exists(), "nothing is left"
