"""Our models against a second, independent reading of the mathematics on transformers' own LLaMA layers.

The reference keeps nothing of ours but the numbers: layers, mask and rotary positions are transformers',
merges are sums written out. Both sides run in fp32 with the same weights. An iteration
feeds rounding errors back through F, whose Jacobian grows like 1/rms(y), so the tolerance is 1e-4
where plain LLaMA is held to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_iiet import models
from megatron_iiet.models import Transformer
from megatron_iiet.storage.hugging_face import import_llama
from tests.models.conftest import randomise_solvers

Increment = Callable[[Tensor], Tensor]
LAYERS = 5
RELEASED: dict[str, Any] = {"kind": "iiet", "variant": "released"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=67,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=71,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # a stream of unit scale
    folder = tmp_path_factory.mktemp("llama") / "hf"
    model.save_pretrained(folder)
    return model, folder


class HuggingFaceLayers:
    """Embedding, increments F_n(y) = layer_n(y) − y, and head, all computed by transformers."""

    def __init__(self, llama: LlamaForCausalLM, tokens: Tensor) -> None:
        inner = self.inner = llama.model
        self.llama = llama
        self.embedded = inner.embed_tokens(tokens)
        length = tokens.shape[1]
        positions = torch.arange(length)[None]
        tables = inner.rotary_emb(self.embedded, position_ids=positions)
        mask = torch.full((length, length), float("-inf"), dtype=self.embedded.dtype).triu(1)[None, None]
        arguments = {"attention_mask": mask, "position_ids": positions, "position_embeddings": tables}

        def increment(n: int) -> Increment:
            def of(y: Tensor) -> Tensor:
                out = inner.layers[n](y, **arguments)
                return (out[0] if isinstance(out, tuple) else out) - y

            return of

        self.increments = [increment(n) for n in range(LAYERS)]

    def logits(self, y: Tensor) -> Tensor:
        return self.llama.lm_head(self.inner.norm(y))


def section_3(
    hf: HuggingFaceLayers, alpha: list[list[float]], iterations: list[int], predictor: str
) -> Tensor:
    """Algorithm 1, with rows of plain numbers as coefficients."""
    y, kept = hf.embedded, []
    for n, increment in enumerate(hf.increments):
        f = increment(y)
        if predictor == "euler" and iterations[n] == 0:
            out = y + f
        else:
            base = y + sum(alpha[n][j] * kept[j] for j in range(n))
            out = y + f if predictor == "euler" else base + alpha[n][n] * f
            for _ in range(iterations[n]):
                f = increment(out)
                out = base + alpha[n][n] * f
        kept.append(f)
        y = out
    return hf.logits(y)


def released(hf: HuggingFaceLayers, w: Tensor, wc: Tensor, norms: list[Any], iterations: list[int]) -> Tensor:
    """The authors' code: history of LayerNorm-ed outputs, layers counted from 1."""
    history, h = [hf.embedded], hf.embedded
    for n in range(1, LAYERS + 1):
        (weight_a, bias_a), (weight_b, bias_b) = norms[n - 1]
        width = weight_a.shape
        history.append(F.layer_norm(h + hf.increments[n - 1](h), width, weight_a, bias_a, 1e-5))
        for _ in range(iterations[n - 1]):
            mixed = sum(w[n, j] * history[j] for j in range(n + 1))
            assert isinstance(mixed, Tensor)
            history[n] = F.layer_norm(mixed + hf.increments[n - 1](mixed), width, weight_b, bias_b, 1e-5)
        h = sum(wc[n, j] * history[j] for j in range(n + 1))
    return hf.logits(h)


def stages_of(increment: Increment, y: Tensor, order: int) -> list[Tensor]:
    """The classic stages of order 2 (Heun) and 4."""
    f1 = increment(y)
    if order == 2:
        return [f1, increment(y + f1)]
    f2 = increment(y + f1 / 2)
    f3 = increment(y + f2 / 2)
    return [f1, f2, f3, increment(y + f3)]


def runge_kutta(hf: HuggingFaceLayers, order: int, combine: Callable[[int, list[Tensor]], Tensor]) -> Tensor:
    """The ODE Transformer; ``combine`` makes one increment of a layer's stages."""
    y = hf.embedded
    for n, increment in enumerate(hf.increments):
        y = y + combine(n, stages_of(increment, y, order))
    return hf.logits(y)


def pcformer(hf: HuggingFaceLayers, order: int, gammas: list[float], rows: list[list[float]]) -> Tensor:
    """``rows``: of every layer the β of what the layers before it kept, the oldest first, and α."""
    y, kept = hf.embedded, []
    for increment, gamma, row in zip(hf.increments, gammas, rows, strict=True):
        stages = stages_of(increment, y, order)
        moving = stages[0] * gamma  # an exponential moving average, written as one
        for stage in stages[1:]:
            moving = (1 - gamma) * moving + gamma * stage
        f = increment(y + moving)
        *betas, alpha = row
        recent = kept[-3:]
        y = y + alpha * f + sum(beta * older for beta, older in zip(betas, recent, strict=True))
        kept.append(f)
    return hf.logits(y)


def converted(folder: Path, target: Path, solver: dict[str, Any], random: bool = True) -> Transformer:
    config, state = import_llama(folder, solver)
    models.save(config, state, target)
    model = models.load(target)
    if random:
        randomise_solvers(model)
    return model


def rows_of(model: Transformer) -> list[list[float]]:
    return [model.get_parameter(f"layers.{n}.solver.coefficients").tolist() for n in range(LAYERS)]


TOKENS = torch.randint(71, (2, 33), generator=torch.Generator().manual_seed(2))
RAW: dict[str, Any] = {"history_norm": "none"}
PAPER: list[tuple[dict[str, Any], list[int], str]] = [
    *(
        (
            {**RAW, "kind": "iiet", "iterations": r, "predictor": p},
            r if isinstance(r, list) else [r] * LAYERS,
            p,
        )
        for r in (0, 1, 3, [0, 3, 1, 2, 1])
        for p in ("merged", "euler")
    ),
    ({**RAW, "kind": "dlcl"}, [0] * LAYERS, "merged"),
    ({**RAW, "kind": "dlcl", "coefficient_init": "average"}, [0] * LAYERS, "merged"),
]


@pytest.mark.parametrize(("solver", "iterations", "predictor"), PAPER)
@torch.no_grad()
def test_section_3(
    llama: tuple[LlamaForCausalLM, Path],
    tmp_path: Path,
    solver: dict[str, Any],
    iterations: list[int],
    predictor: str,
) -> None:
    model = converted(llama[1], tmp_path / "x", solver)
    wanted = section_3(HuggingFaceLayers(llama[0], TOKENS), rows_of(model), iterations, predictor)
    plain = llama[0](TOKENS).logits
    assert (model(TOKENS) - wanted).abs().max() < 1e-4
    if solver["kind"] == "dlcl" or predictor == "merged" or iterations != [0] * LAYERS:
        assert (wanted - plain).abs().max() > 0.05  # the random coefficients do something
    else:
        assert (wanted - plain).abs().max() < 1e-5


@pytest.mark.parametrize("damping", [1.0, 0.3])
@pytest.mark.parametrize("iterations", [0, 1, 3, [0, 3, 1, 2, 1]])
@torch.no_grad()
def test_implicit_euler_without_the_merge(
    llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, iterations: int | list[int], damping: float
) -> None:
    """Equation 9: y^i = y_n + F(y^{i-1}), and nothing learned but the layers."""
    solver = {"kind": "iiet", "merge": False, "iterations": iterations, "damping": damping}
    model = converted(llama[1], tmp_path / "x", solver)
    assert not [name for name, _ in model.named_parameters() if ".solver." in name]
    hf = HuggingFaceLayers(llama[0], TOKENS)
    y = hf.embedded
    for n, increment in enumerate(hf.increments):
        f = increment(y)
        for _ in range(iterations[n] if isinstance(iterations, list) else iterations):
            f = (1 - damping) * f + damping * increment(y + f)
        y = y + f
    assert (model(TOKENS) - hf.logits(y)).abs().max() < 1e-5
    assert iterations == 0 or (hf.logits(y) - llama[0](TOKENS).logits).abs().max() > 0.01


@pytest.mark.parametrize("iterations", [0, 1, 3, [0, 3, 1, 2, 1]])
@torch.no_grad()
def test_released(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, iterations: int | list[int]) -> None:
    model = converted(llama[1], tmp_path / "x", {**RELEASED, "iterations": iterations})
    parameter = model.get_parameter
    w, wc = torch.zeros(2, LAYERS + 1, LAYERS + 1)
    norms = []
    for n in range(LAYERS):
        w[n + 1] = parameter(f"layers.{n}.solver.coefficients")
        wc[n + 1] = parameter(f"layers.{n}.solver.readout_coefficients")
        norms.append(
            [
                (parameter(f"layers.{n}.solver.{name}.weight"), parameter(f"layers.{n}.solver.{name}.bias"))
                for name in ("predictor_norm", "corrector_norm")
            ]
        )
    counts = iterations if isinstance(iterations, list) else [iterations] * LAYERS
    wanted = released(HuggingFaceLayers(llama[0], TOKENS), w, wc, norms, counts)
    assert (model(TOKENS) - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_released_starts_from_row_averages(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    model = converted(llama[1], tmp_path / "x", {**RELEASED, "iterations": 2}, random=False)
    average = torch.tril(torch.ones(LAYERS + 1, LAYERS + 1)) / torch.arange(1, LAYERS + 2)[:, None]
    ones, zeros = torch.ones(48), torch.zeros(48)
    norms = [[(ones, zeros), (ones, zeros)]] * LAYERS
    wanted = released(HuggingFaceLayers(llama[0], TOKENS), average, average, norms, [2] * LAYERS)
    assert (model(TOKENS) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "coefficients"),
    [("rk2", "fixed"), ("rk2", "learned"), ("rk2", "gated"), ("rk4", "fixed"), ("rk4", "learned")],
)
@torch.no_grad()
def test_runge_kutta(
    llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, kind: str, coefficients: str
) -> None:
    model = converted(llama[1], tmp_path / "x", {"kind": kind, "stage_coefficients": coefficients})
    parameter = model.get_parameter
    order = {"rk2": 2, "rk4": 4}[kind]

    def combine(n: int, stages: list[Tensor]) -> Tensor:
        if coefficients == "gated":
            weight, bias = (parameter(f"layers.{n}.solver.gate_{part}") for part in ("weight", "bias"))
            g = torch.sigmoid(torch.cat(stages, dim=-1) @ weight.T + bias)
            return g * stages[0] + (1 - g) * stages[1]
        gammas = {2: [1 / 2, 1 / 2], 4: [1 / 6, 1 / 3, 1 / 3, 1 / 6]}[order]
        if coefficients == "learned":
            gammas = parameter(f"layers.{n}.solver.coefficients").tolist()
        return torch.stack([gamma * f for gamma, f in zip(gammas, stages, strict=True)]).sum(0)

    wanted = runge_kutta(HuggingFaceLayers(llama[0], TOKENS), order, combine)
    assert (model(TOKENS) - wanted).abs().max() < 1e-5
    assert (wanted - llama[0](TOKENS).logits).abs().max() > 0.01


CLASSIC_INNER = {2: [[1.0]], 4: [[0.5], [0.0, 0.5], [0.0, 0.0, 1.0]]}


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("order", [2, 4])
@torch.no_grad()
def test_runge_kutta_in_full(
    llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, order: int, random: bool
) -> None:
    """Equation 4 with learned β_ij: F_i = F(y + Σ_{j<i} β_ij F_j), from the classic method."""
    solver = {"kind": f"rk{order}", "stage_coefficients": "full"}
    model = converted(llama[1], tmp_path / "x", solver, random=random)
    hf = HuggingFaceLayers(llama[0], TOKENS)
    y = hf.embedded
    for n, increment in enumerate(hf.increments):
        flat = model.get_parameter(f"layers.{n}.solver.inner_coefficients").tolist()
        inner = [[flat.pop(0) for _ in range(i)] for i in range(1, order)]
        assert (inner == CLASSIC_INNER[order]) == (not random)
        stages = [increment(y)]
        for row in inner:
            stages.append(increment(y + sum(b * f for b, f in zip(row, stages, strict=True))))
        gammas = model.get_parameter(f"layers.{n}.solver.coefficients").tolist()
        y = y + sum(gamma * f for gamma, f in zip(gammas, stages, strict=True))
    assert (model(TOKENS) - hf.logits(y)).abs().max() < 1e-5
    learned = converted(llama[1], tmp_path / "y", {**solver, "stage_coefficients": "learned"}, random=False)
    assert ((model(TOKENS) - learned(TOKENS)).abs().max() < 1e-5) == (not random)


@pytest.mark.parametrize("repeats", [1, 3])
@torch.no_grad()
def test_weight_sharing(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, repeats: int) -> None:
    model = converted(llama[1], tmp_path / "x", {"kind": "weight-sharing", "repeats": repeats})
    hf = HuggingFaceLayers(llama[0], TOKENS)
    y = hf.embedded
    for n in range(LAYERS * repeats):
        y = y + hf.increments[n // repeats](y)
    assert (model(TOKENS) - hf.logits(y)).abs().max() < 1e-5


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("start", ["identity", "average", "random"])
@torch.no_grad()
def test_pcformer(llama: tuple[LlamaForCausalLM, Path], tmp_path: Path, order: int, start: str) -> None:
    """At its start from known numbers, and at random coefficients. The fifth layer does not read F̃_0."""
    keys = {"kind": "pcformer", "predictor_order": order}
    if start != "random":
        keys["coefficient_init"] = start
    model = converted(llama[1], tmp_path / "x", keys, random=start == "random")
    gammas, rows = [0.5] * LAYERS, rows_of(model)
    if start == "random":
        gammas = [model.get_parameter(f"layers.{n}.solver.gamma").item() for n in range(LAYERS)]
    elif start == "identity":
        assert rows == [[1.0], [0.0, 1.0], [0.0, 0.0, 1.0], [0.0] * 3 + [1.0], [0.0] * 3 + [1.0]]
    else:
        assert rows == [[1 / k] * k for k in (1, 2)] + [pytest.approx([1 / 3] * 3), [0.25] * 4, [0.25] * 4]
    wanted = pcformer(HuggingFaceLayers(llama[0], TOKENS), order, gammas, rows)
    assert (model(TOKENS) - wanted).abs().max() < 1e-5
    assert (wanted - llama[0](TOKENS).logits).abs().max() > 0.01
