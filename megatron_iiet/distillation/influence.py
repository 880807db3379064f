"""How much each iteration and each layer changes the stream, and what the loss loses without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_iiet.data.loader.inputs import Inputs, inputs_of
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.evaluation.forward import ForwardModel
from megatron_iiet.models.diagnostics import InfluenceSums

Values = dict[tuple[int, int], float]
"""By (layer, iterate)."""


@dataclass(frozen=True)
class Measurement:
    """Means over all tokens that count, the same on every rank."""

    influence: Values
    """1 − mean cos(y^{i−1}, y^i); iterate 0: 1 − mean cos(y_n, y^0) (IIET paper, section 4)."""
    block_influence: list[float]
    """1 − mean cos(y_n, y_{n+1}) of every layer (ShortGPT, Men et al. 2024)."""
    sequences: int
    tokens: int
    """That count: those with a target."""
    loss: float | None
    """Cross-entropy in nats per token, if it was asked for."""


@dataclass(frozen=True)
class Ablation:
    """What the loss rises by as a layer loses its iterations one by one, the others keeping all of theirs."""

    loss: float
    """With all iterations, nats per token."""
    losses: Values
    """Where the layer has one iteration less than the iterate's number."""

    @property
    def increase(self) -> Values:
        """What each iteration is worth: the loss without it and those after it, less the loss without those
        after it. Below 0: the model is better off without it."""
        return {(n, i): loss - self.losses.get((n, i + 1), self.loss) for (n, i), loss in self.losses.items()}


def measure_influence(
    model: ForwardModel, batches: ValidationBatches, *, with_loss: bool = False
) -> Measurement:
    """One forward pass over this rank's batches; every rank of the grid calls it.

    Raises:
        ValueError: no token counts.
    """
    sums: InfluenceSums = {}
    tokens = torch.zeros((), dtype=torch.int64, device=model.context.device)
    losses = torch.zeros(2, dtype=torch.float64, device=model.context.device)
    for inputs in _inputs(model, batches):
        part, loss = model.observe(inputs, with_loss=with_loss)
        _add(sums, part)
        tokens += inputs.counted
        if loss is not None:
            losses += torch.stack((loss, inputs.counted))
    model.context.data.all_reduce(tokens)
    if not tokens:
        raise ValueError("no token of the text has another to predict; give longer text")
    # Ranks that see the same tokens count several times, all equally often.
    total: InfluenceSums = {}
    for part in model.context.world.gather_objects({key: value.cpu() for key, value in sums.items()}):
        _add(total, part)
    means = {key: (value[0] / value[1]).item() for key, value in total.items()}
    return Measurement(
        dict(sorted(((n, i), value) for (n, i), value in means.items() if i is not None)),
        [means[n, None] for n in range(model.config.model.num_layers)],
        batches.samples,
        int(tokens.item()),
        model.mean_over_ranks(losses) if with_loss else None,
    )


def _add(sums: InfluenceSums, part: InfluenceSums) -> None:
    for key, value in part.items():
        sums[key] = sums.get(key, 0) + value


def ablate(
    model: ForwardModel, batches: ValidationBatches, full: int, loss: float, say: Callable[[str], None]
) -> Ablation:
    """Drop the last iteration of one layer, then the one before it and so on, and measure the loss each time;
    then the same in the next layer. Every rank of the grid calls it.

    ``full``: iterations of every layer, to which the model returns; ``loss``: with them; ``say``: told of
    each layer as it is done.
    """
    losses: Values = {}
    for layer in range(model.config.model.num_layers):
        for kept in reversed(range(full)):
            counts = [full] * model.config.model.num_layers
            counts[layer] = kept
            model.set_iterations(counts)
            losses[layer, kept + 1] = model.mean_loss(_inputs(model, batches))
        changes = " ".join(f"{losses[layer, kept + 1] - loss:+.5f}" for kept in reversed(range(full)))
        say(f"ablation: layer {layer}: loss {changes} with {full - 1} to 0 iterations")
    model.set_iterations([full] * model.config.model.num_layers)
    return Ablation(loss, dict(sorted(losses.items())))


def _inputs(model: ForwardModel, batches: ValidationBatches) -> Iterator[Inputs]:
    return (inputs_of(batch, model.context.device) for batch in batches)
