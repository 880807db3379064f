"""Fine-tuning our models by transformers' and PEFT's own means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from megatron_iiet.hf.modeling_iiet import IIETForCausalLM
from tests.hf.solvers_under_test import SOLVERS, hf_model, our_model, tokens


def gradients(model: IIETForCausalLM, ids_BT: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["euler", "dlcl-rms", "iiet-plan", "released", "pcformer-2", "iiet-first"])
def test_gradient_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    assert name in SOLVERS
    hf = hf_model(our_model(name)).train()
    ids = tokens(2, 9)
    expected = gradients(hf, ids)
    hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert hf.is_gradient_checkpointing
    evaluations: list[int] = []
    hook = hf.model.layers[2].mlp.register_forward_pre_hook(lambda *_: evaluations.append(1))
    found = gradients(hf, ids)
    hook.remove()
    assert len(evaluations) == 2 * hf.config.evaluations[2]  # once more in the backward pass
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


class Walks(torch.utils.data.Dataset):
    """Sequences in which each token is the one before plus two: learnable in a few steps."""

    def __len__(self) -> int:
        return 160

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = 3 + (7 * index + 2 * torch.arange(16)) % 50
        return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iiet-plan", "released"])
def test_trainer_fine_tunes_lora(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf = hf_model(our_model(name))
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(hf, lora)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=4e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Walks())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    ids = Walks()[0]["input_ids"][None]
    with torch.no_grad():
        adapted = model.eval()(ids, use_cache=False).logits
        draft = model.base_model.model.with_iterations(0)  # a view of the adapted model
        assert (draft(ids, use_cache=False).logits - adapted).abs().max() > 1e-3
        merged = model.merge_and_unload()
        assert (merged(ids, use_cache=False).logits - adapted).abs().max() < 1e-4
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[-2] for key in changed} == {"q_proj", "v_proj", "down_proj"}


@pytest.mark.slow
def test_trainer_trains_every_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf = hf_model(our_model("iiet-plan")).train()
    before = hf.model.layers[4].solver.coefficients.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=hf, args=arguments, train_dataset=Walks())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert (hf.model.layers[4].solver.coefficients - before).abs().min() > 1e-4
