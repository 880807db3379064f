"""What the extension's operators refuse when they are called directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.inputs import EPS, needs_extension

torch.set_num_threads(1)
pytestmark = needs_extension

# ------------------------------------------------------------------------------------ what is refused

X, W, C = torch.zeros(3, 8), torch.zeros(8), torch.zeros(2)
XS, R3 = [X, X], torch.zeros(3)
X2, R23 = torch.zeros(2, 3, 8), torch.zeros(2, 3)
SCALAR = torch.zeros(())


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


BAD_MERGES: list[tuple[str, tuple[Any, ...]]] = [
    ("residual", (SCALAR, [], None, None)),
    ("residual", (X.double(), [], None, W)),
    ("residual", (X.int(), [X.int()], None, W)),
    ("residual", (X.to(torch.complex64), [], None, None)),
    (r"increments\[0\]", (None, [SCALAR], None, None)),
    (r"increments\[0\]", (X, [X.bfloat16()], None, None)),
    (r"increments\[0\]", (X, [X[:1]], None, None)),  # nothing is broadcast
    (r"increments\[1\]", (X, [X, X[:, :7]], C, W)),
    (r"increments\[1\]", (None, [X, SCALAR], C, None)),
    (r"increments\[1\]", (X, [X, meta(X)], C, None)),
    ("coefficients", (X, XS, R3, None)),
    ("coefficients", (X, XS, SCALAR, None)),
    ("coefficients", (X, XS, C.double(), None)),
    ("coefficients", (X, XS, C.bfloat16(), None)),
    ("coefficients", (X, XS, C.long(), None)),
    ("coefficients", (X, XS, C.view(1, 1, 2), None)),
    ("coefficients", (X, XS, C.view(2, 1), None)),
    ("coefficients", (X, XS, meta(C), None)),
    ("coefficients", (X, [], torch.zeros(2, 0), W)),
    ("coefficients", (X, [], torch.zeros(0, 0), W)),
    ("coefficients", (X, [], C, W)),
    ("norm_weight", (X, XS, C, SCALAR)),
    ("norm_weight", (X, XS, C, W[:7])),
    ("norm_weight", (X, XS, C, X)),
    ("coefficients", (X, XS, torch.zeros(2, 2), W)),
    ("coefficients", (X, XS, C.view(1, 2), W)),
    ("norm_weight", (X, XS, C, W.double())),
    ("norm_weight", (X, XS, C, W.bfloat16())),
    ("norm_weight", (X, XS, C, meta(W))),
]
NORM = (X, X, R3, W)  # grad_normed, merged, rstd, norm_weight
NO_NORM = (None, None, None, None)
BAD_BACKWARDS: list[tuple[str, tuple[Any, ...]]] = [
    ("grad_merged and grad_normed", (None, None, X, R3, W, XS, C)),
    ("grad", (SCALAR, *NO_NORM, [], None)),
    ("grad", (SCALAR, *NO_NORM, [SCALAR], torch.zeros(1))),
    ("grad", (SCALAR, *NO_NORM, [SCALAR], torch.zeros(1, 1))),
    ("grad", (None, SCALAR, SCALAR, SCALAR, SCALAR, [], None)),
    ("grad", (X.double(), *NO_NORM, [X.double()], torch.zeros(1))),
    ("grad", (X, *NORM, XS, torch.zeros(2, 2))),  # no rows in the gradient
    ("grad_normed", (X, X[:, :7], X, R3, W, XS, C)),
    ("grad_normed", (X, X.half(), X, R3, W, XS, C)),
    ("grad_normed", (X, meta(X), X, R3, W, XS, C)),
    ("merged", (X, X, None, R3, W, XS, C)),
    ("merged", (X, X, X[:2], R3, W, XS, C)),
    ("merged", (X, X, X.bfloat16(), R3, W, XS, C)),
    ("merged", (X, X, meta(X), R3, W, XS, C)),
    ("rstd", (X, X, X, None, W, XS, C)),
    ("rstd", (X, X, X, R3[:2], W, XS, C)),
    ("rstd", (X, X, X, R3.view(3, 1), W, XS, C)),
    ("rstd", (X, X, X, SCALAR, W, XS, C)),
    ("rstd", (X, X, X, R3.double(), W, XS, C)),
    ("rstd", (X, X, X, meta(R3), W, XS, C)),
    ("norm_weight", (X, X, X, R3, None, XS, C)),
    ("norm_weight", (X, X, X, R3, W[:7], XS, C)),
    ("norm_weight", (X, X, X, R3, SCALAR, XS, C)),
    ("norm_weight", (X, X, X, R3, X, XS, C)),
    ("coefficients", (X2, X2, X2, R23, W, XS, torch.zeros(2, 2))),
    ("norm_weight", (X, X, X, R3, meta(W), XS, C)),
    (r"increments\[1\]", (X, *NORM, [X, X[:2]], C)),
    (r"increments\[1\]", (X, *NORM, [X, SCALAR], C)),
    (r"increments\[0\]", (X2, *NO_NORM, [X2, X2], torch.zeros(2, 2))),
    (r"increments\[1\]", (X, *NO_NORM, [X, meta(X)], C)),
    ("coefficients", (X, *NORM, XS, R3)),
    ("coefficients", (X, *NORM, XS, SCALAR)),
    ("coefficients", (X, *NORM, XS, C.double())),
    ("coefficients", (X, *NORM, XS, meta(C))),
    ("coefficients", (X, *NORM, [], C)),
]
BAD_TRANSPOSED: list[tuple[str, tuple[Any, ...]]] = [
    ("increment", (None, SCALAR, [SCALAR], torch.zeros(1))),
    ("increment", (None, X.double(), [X.double()], torch.zeros(1))),
    ("direct", (X[:2], X, XS, C)),
    ("direct", (X.half(), X, XS, C)),
    ("direct", (meta(X), X, XS, C)),
    (r"gradients\[1\]", (X, X, [X, X[:2]], C)),
    (r"gradients\[0\]", (X, X, [X.half(), X], C)),
    (r"gradients\[1\]", (X, X, [X, meta(X)], C)),
    ("gradients", (X, X, [], torch.zeros(0))),
    ("gradients", (None, X, [], torch.zeros(0))),
    ("coefficients", (X, X, XS, R3)),
    ("coefficients", (X, X, [X], SCALAR)),
    ("coefficients", (X, X, XS, C.view(1, 2))),
    ("coefficients", (X, X, XS, C.double())),
    ("coefficients", (X, X, XS, meta(C))),
]


@pytest.mark.parametrize(("argument", "arguments"), BAD_MERGES)
def test_merge_norm_names_what_it_refuses(ops: Any, argument: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^(\w+: )?{argument} "):
        ops.merge_norm(*arguments, EPS)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("argument", "arguments"), BAD_BACKWARDS)
def test_backward_names_what_it_refuses(
    ops: Any, argument: str, arguments: tuple[Any, ...], wanted: bool
) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}"):
        ops.merge_norm_backward(*arguments, wanted, wanted)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("argument", "arguments"), BAD_TRANSPOSED)
def test_transposed_merge_names_what_it_refuses(
    ops: Any, argument: str, arguments: tuple[Any, ...], wanted: bool
) -> None:
    with pytest.raises(ValueError, match=rf"^(\w+: )?{argument}"):
        ops.transposed_merge(*arguments, wanted)


def test_no_coefficient_rows(ops: Any) -> None:
    """R = 0 is no error; there is no merge and no gradient, and sums over no rows are zero."""
    merged, normed, rstd = ops.merge_norm(X, XS, torch.zeros(0, 2), None, EPS)
    assert (merged.shape, normed.shape, rstd.shape) == ((0, 3, 8), (0,), (0,))
    _, _, for_increments, for_row = ops.merge_norm_backward(
        merged, None, None, None, None, XS, torch.zeros(0, 2), True, True
    )
    assert torch.equal(torch.stack(for_increments), torch.zeros(2, 3, 8))
    assert for_row.shape == (0, 2)
