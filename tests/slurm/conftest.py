"""The cluster that the tests here share, and the run that theirs are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, Cluster, missing
from tests.slurm.training import Training
from tests.tiny import make_data


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """All nodes of it are up, and no job is left from another test."""
    for name in NODES:
        _cluster.start_node(name)
    yield _cluster
    _cluster.call("scancel", "--user", _cluster.user)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(
    _cluster: Cluster, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Training:
    training = Training(_cluster, tmp_path_factory.mktemp("undisturbed"), data)
    assert training.submit().wait() == "COMPLETED", training.said
    return training


@pytest.fixture
def training(cluster: Cluster, data: dict[str, str], tmp_path: Path) -> Training:
    return Training(cluster, tmp_path, data)
