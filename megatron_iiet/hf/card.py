"""The model card of an exported folder, ``README.md``: what the model is, what a token costs, how to load."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_iiet.config import RunConfig
from megatron_iiet.models import Transformer

CARD_FILE = "README.md"


def model_card(config: RunConfig, name: str, facts: Mapping[str, str], *, own_code: bool) -> bytes:
    """The card, in Markdown with the header that the Hub reads.

    Args:
        name: what the model is called there.
        facts: what is known of its training, as rows of the table.
        own_code: whether the folder brings ``modeling_iiet.py``.
    """
    model, length = Transformer.on_meta(config), config.model.max_position_embeddings
    layers = config.model.num_layers
    counts = config.solver.iterations_per_layer(layers)
    rows = {
        "parameters": f"{model.num_parameters():,}",
        "layers, width, heads": f"{layers}, {config.model.hidden_size}, {config.model.num_attention_heads}",
        "solver": config.solver.describe(counts),
        "evaluations of the layers": f"{sum(config.solver.evaluations(n) for n in counts)} for each token",
        "forward FLOPs": f"{model.forward_flops(length) / length:.3g} a token, of a sequence of {length:,}",
        **facts,
    }
    tags = ["iiet", config.solver.kind] if own_code else [config.solver.kind]
    trusted = ", trust_remote_code=True" if own_code else ""
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(dict.fromkeys(tags))}]
---
# {name}

| | |
|---|---|
{table}

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained("{name}"{trusted})
    inputs = tokenizer("The solver", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
""".encode()
