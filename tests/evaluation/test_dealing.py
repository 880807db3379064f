"""How sequences become batches of replicas, and how their tokens are compared over a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_iiet.evaluation import harness
from megatron_iiet.evaluation.harness import HarnessModel, TextCodec
from megatron_iiet.evaluation.scoring import Scorer, TokenScores, score_tokens
from megatron_iiet.parallel.group import Group
from megatron_iiet.serving.continuation import Order, Update

END = 0


class Noting:
    """A scorer that notes the batches it is given; the score of a token is minus its id."""

    multiple = 1
    has_fixed_shape = False

    def __init__(self, replica: int, replicas: int, batch_size: int, max_length: int) -> None:
        data = SimpleNamespace(rank=replica, size=replicas)
        self.context = SimpleNamespace(data=data, world=SimpleNamespace(gather_objects=self._gather))
        self.batch_size, self.max_length = batch_size, max_length
        self.batches: list[Tensor] = []
        self.answers: list[dict[int, Any]] = []
        """Of all replicas, for whoever gathers them."""

    def score(self, batches: Sequence[Tensor]) -> Iterator[TokenScores]:
        self.batches = list(batches)
        for tokens in batches:
            targets = tokens[:, 1:]
            yield TokenScores(-targets.float(), targets > 0)

    def _gather(self, answers: dict[int, Any]) -> list[dict[int, Any]]:
        self.answers.append(dict(answers))
        return self.answers


def ask(lengths: Sequence[int], replicas: int, batch_size: int, max_length: int) -> list[Noting]:
    """Every replica is asked for continuations of one token behind contexts, together so many tokens; what
    the last one answers is checked, for by then it knows all others' answers."""
    requests = [(None, [row + 1] * (length - 1), [row + 1]) for row, length in enumerate(lengths)]
    scorers, answers = [], []
    for replica in range(replicas):
        scorer = Noting(replica, replicas, batch_size, max_length)
        for earlier in scorers:
            scorer.answers += earlier.answers[-1:]
        if replica < replicas - 1:  # the others' answers are not there yet
            scorer.answers.append(dict.fromkeys(range(len(lengths))))
        codec = TextCodec(lambda text: [], END, END)
        found = HarnessModel(cast(Scorer, scorer), codec)._loglikelihood_tokens(requests)
        scorers.append(scorer)
        answers.append(found)
    assert answers[-1] == [(-float(row + 1), True) for row in range(len(lengths))]
    return scorers


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all replicas together, twice in a minute, and what cannot be made ends it."""
    now, said = 0.0, list[str]()
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: now))
    scorer = Noting(0, 2, 1, 4)

    def passing(batches: Sequence[Tensor]) -> Iterator[TokenScores]:
        nonlocal now
        for scores in Noting.score(scorer, batches):
            now += 20.0
            yield scores

    scorer.score = passing  # type: ignore[method-assign]
    scorer.answers.append(dict.fromkeys(range(8)))
    codec = TextCodec(lambda text: [3], END, END)
    model = HarnessModel(cast(Scorer, scorer), codec, said.append)
    model._loglikelihood_tokens([(None, [1] * 3, [1])] * 8)
    assert said == ["  4 of about 8 sequences", "  8 of about 8 sequences"]

    def write(orders: Sequence[Order], tell: Callable[[Update], None]) -> list[str]:
        nonlocal now
        for _ in orders:
            now += 16.0
            tell(Update("te"))
            tell(Update("xt", finish="stop"))
        return ["text"] * len(orders)

    said.clear()
    scorer.max_length = 999
    scorer.continued = write  # type: ignore[attr-defined]
    scorer.answers[:] = [dict.fromkeys(range(8), "theirs")]
    assert model.generate_until([SimpleNamespace(args=("a", {"until": ["x"]}))] * 8) == ["te", "theirs"] * 4
    assert said == ["  2 of about 8 texts", "  6 of about 8 texts"]
    scorer.continued = lambda orders, tell: tell(Update(error="no room"))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"^a text could not be made: no room$"):
        model.generate_until([SimpleNamespace(args=("a", {"until": ["x"]}))] * 8)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 11])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_replicas_do_equally_many_forward_passes(rows: int, replicas: int) -> None:
    """Under ZeRO-3 each is a collective: one replica fewer would leave the others waiting."""
    scorers = ask([16 - row for row in range(rows)], replicas, 1, 4)
    counts = [len(scorer.batches) for scorer in scorers]
    assert counts == [-(-rows // replicas)] * replicas
    assert all(batch.numel() for scorer in scorers for batch in scorer.batches)


def test_no_batch_is_larger_than_one_of_the_longest() -> None:
    """Rows x the longest input of each, in tokens; short ones come in larger batches, up to the most rows."""
    lengths = [2] * 2000 + [3, 5, 9, 17, 33, 65] * 5
    (scorer,) = ask(lengths, 1, 4, 64)
    sizes = [(len(batch), batch.shape[1] - 1) for batch in scorer.batches]
    assert max(rows * length for rows, length in sizes) <= 4 * 64
    assert sizes[0] == (4, 64)
    assert max(rows for rows, _ in sizes) == harness.MAX_ROWS
    assert sum(rows for rows, _ in sizes) == len(lengths)


def test_the_likeliest_of_many_columns() -> None:
    """5,000: more than the integers that half precision holds, and logits closer than it tells apart."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 300, 5000, generator=generator)
    best = torch.randint(2049, 5000, (2, 300), generator=generator)
    logits.scatter_(-1, best.unsqueeze(-1), 8.0)
    close = best.clone()
    close[:, ::2] -= 1
    logits[:, ::2].scatter_(-1, close[:, ::2].unsqueeze(-1), 8.0 - 1e-4)
    scores = score_tokens(logits, best, 5000, Group())
    assert scores.greedy.all()
    expected = torch.log_softmax(logits.double(), -1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores.log_probs.double(), expected, atol=1e-5, rtol=1e-6)
    assert not score_tokens(logits, close, 5000, Group()).greedy[:, ::2].any()
