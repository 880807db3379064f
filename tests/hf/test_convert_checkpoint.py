"""tools/convert_checkpoint.py as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_iiet import models
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.hf import folders
from megatron_iiet.models import Transformer
from megatron_iiet.storage import portable
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.tiny import make_data, tiny_config, validation_loss
from tests.tool_runs import Ended, run_here

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
STAGES = [
    ("fp32", 0),
    ("bf16", 3),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (("fp32", 1), ("bf16", 1), ("bf16", 2))),
]


Convert = Callable[..., Ended]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Runs the tool in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return partial(run_here, "tools/convert_checkpoint.py")


@pytest.fixture
def llama(tmp_path: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_text("{}")
    return model


def test_from_hf(tmp_path: Path, llama: LlamaForCausalLM, convert: Convert) -> None:
    result = convert("--from-hf", "hf", "--to", "plain")
    assert result.code == 0, result.err
    wrote, note = result.out.splitlines()
    assert wrote == (
        f"wrote plain: {llama.num_parameters():,} parameters from hf, solver euler, "
        "tokenizer.model, tokenizer_config.json"
    )
    assert note.startswith("note: the tokenizer is copied, but cannot be used: hf/tokenizer.model is not")
    tokens = torch.arange(40)[None]
    plain = models.load(tmp_path / "plain")
    with torch.no_grad():
        assert (plain(tokens) - llama(tokens).logits).abs().max() < 1e-5
    assert plain.config.data.tokenizer == "tokenizer.model"
    assert (tmp_path / "plain" / "tokenizer_config.json").is_file()

    options = ["--solver.kind", "iiet", "--solver.iterations", "[0,2,1]", "--solver.predictor", "euler"]
    result = convert("--from-hf", "hf", "--to", "iiet", *options)
    assert result.code == 0, result.err
    iiet = models.load(tmp_path / "iiet")
    assert (iiet.config.solver.iterations, iiet.config.solver.predictor) == ([0, 2, 1], "euler")
    assert iiet.get_parameter("layers.2.solver.coefficients").tolist() == [0, 0, 1]
    iiet.set_iterations([0, 0, 0])
    assert torch.equal(iiet(tokens), plain(tokens))
    given = "--solver.kind iiet --solver.iterations '[0,2,1]' --solver.predictor euler"
    assert result.out.splitlines()[2:] == [
        "note: with solver iiet, variant paper, r = [0, 2, 1] these weights compute another function than "
        "hf, which was trained as explicit Euler. Train it before use: pretrain_iiet.py --model.from hf "
        f"--training.initial_weights hf {given}, with a solver.schedule that lets the iterations come in "
        "(docs/regimes.md)."
    ]


@pytest.mark.parametrize(
    "options",
    [
        "--solver.iterations 1",  # of the default kind
        "--solver.output_norm layer",
        "--solver.kind rk2",
        "--solver.kind dlcl --solver.coefficient_init average",
        "--solver.kind dlcl",
        "--solver.kind weight-sharing --solver.repeats 1",
        "--solver.iterations 0 --solver.predictor euler --solver.coefficient_init average",
        "--solver.iterations 0 --solver.coefficient_init average",
        "--solver.iterations 0 --solver.merge false",
        "--solver.iterations 0",
        "--solver.output_norm none",
    ],
)
def test_another_function_is_told(
    tmp_path: Path, llama: LlamaForCausalLM, convert: Convert, options: str
) -> None:
    result = convert("--from-hf", "hf", "--to", "m", *options.split())
    assert result.code == 0, result.err
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        difference = (models.load(tmp_path / "m")(tokens) - llama(tokens).logits).abs().max()
    assert ("\nnote: with solver " in result.out) == bool(difference > 1e-5)


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        (["--solver.kind", "weight-sharing", "--solver.repeats", "2"], 2),
        (["--solver.kind", "rk2", "--solver.stage_coefficients", "gated"], 2),
        (["--solver.kind", "rk4"], 4),
        (["--solver.kind", "pcformer", "--solver.predictor_order", "4"], 5),
    ],
    ids=str,
)
@pytest.mark.usefixtures("llama")
def test_explicit_solvers(tmp_path: Path, convert: Convert, options: list[str], evaluations: int) -> None:
    result = convert("--from-hf", "hf", "--to", "m", *options)
    assert result.code == 0, result.err
    model = models.load(tmp_path / "m")
    assert {solver.evaluations for solver in model.solvers.values()} == {evaluations}
    assert model(torch.arange(40)[None]).isfinite().all()


def test_errors_are_one_line(tmp_path: Path, llama: LlamaForCausalLM, convert: Convert) -> None:
    assert convert("--to", "x").error == (
        "one of the arguments --from-hf --from-run --from-model --refresh is required"
    )
    assert convert("--from-hf", "hf").error == "one of the arguments --to --to-hf is required"
    assert convert("--from-hf", "", "--to", "x").error == "--from-hf is empty; give it a value"
    step = convert("--refresh", "hf", "--step", "0")
    assert step.error == "--step is given with --refresh, which changes no weights; leave it out"
    both = convert("--from-hf", "hf", "--from-run", "r", "--to", "x")
    assert both.error == "argument --from-run: not allowed with argument --from-hf"
    solver = convert("--from-run", "r", "--to", "x", "--solver.kind", "iiet")
    assert solver.error == "--solver.kind is given with --from-run; a checkpoint keeps its run's solver"
    solver = convert("--from-model", "m", "--to", "x", "--solver.kind", "iiet")
    assert solver.error == "--solver.kind is given with --from-model; a folder keeps its model's solver"
    step = convert("--from-hf", "hf", "--to", "x", "--step", "3")
    assert step.error == "--step is given with --from-hf; only the checkpoints of a run have steps"
    there = convert("--from-hf", "hf", "--to", "hf")
    assert there.error == "hf exists already; choose another folder or remove it"
    kind = convert("--from-hf", "hf", "--to", "x", "--solver.kind", "heun")
    assert kind.error.startswith(
        "solver.kind is 'heun' in hf/config.json and the solver options, but must be"
    )
    gone = convert("--from-hf", "gone", "--to", "x")
    families = "LLaMA, Mistral, Qwen2, Qwen3 or IIET"
    assert gone.error == f"gone is not a folder; give the folder of a Hugging Face {families} checkpoint"
    assert convert("--from-run", "hf", "--to", "x").error == (
        "hf holds no complete checkpoint; give the output_dir of a training run"
    )
    assert convert("--from-model", "hf", "--to-hf", "x").error.startswith("hf has no config.yaml, so it is")
    for option in (["--dtype", "bf16"], ["--max-shard-size", "5GB"], ["--as-llama"]):
        assert convert("--from-hf", "hf", "--to", "x", *option).error == (
            f"{option[0]} is given with --to, whose folder has one form; use --to-hf"
        )
    size = convert("--from-hf", "hf", "--to-hf", "x", "--max-shard-size", "5 apples")
    assert size.error == "'5 apples' is no size of a file; give a number and a unit, such as 5GB or 500MB"
    dtype = convert("--from-hf", "hf", "--to-hf", "x", "--dtype", "fp8")
    assert dtype.error.startswith("argument --dtype: invalid choice: 'fp8'")
    none = convert("--from-hf", "hf", "--to-hf", "x", "--as-llama", "--solver.kind", "dlcl")
    assert none.error.startswith("the model is no plain LLaMA: solver.kind is 'dlcl'")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers_are_not_handed_on(
    tmp_path: Path, llama: LlamaForCausalLM, convert: Convert, value: float
) -> None:
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, tmp_path / "hf/model.safetensors")
    for target in ("--to", "--to-hf"):
        result = convert("--from-hf", "hf", target, "x")
        assert (result.code, result.error.partition(" with")[0]) == (
            2,
            "layers.1.increment.mlp.gate_up.weight holds NaN or infinity,",
        )
        assert not list(tmp_path.glob("x*"))


def test_as_a_process(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, TOOL, "--to", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "error: one of the arguments --from-hf --from-run --from-model --refresh is required\n"
    )


def test_around_the_circle(tmp_path: Path, llama: LlamaForCausalLM, convert: Convert) -> None:
    """Hugging Face → ours → an IIET of transformers → ours, and a plain LLaMA at the end of every way."""
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [2, 7], "do_sample": true}')
    options = ["--solver.kind", "iiet", "--solver.iterations", "[0,2,1]"]
    assert convert("--from-hf", "hf", "--to", "ours", *options).code == 0
    (tmp_path / "ours" / "tokenizer.model").unlink()  # it was no real one
    there = convert("--from-model", "ours", "--to-hf", "iiet", "--max-shard-size", "5KB")
    assert there.code == 0, there.err
    assert there.out.startswith(
        f"wrote iiet: {llama.num_parameters() + 6:,} parameters from ours, solver iiet, "
    )
    assert "fp32 in 16 files, README.md, modeling_iiet.py" in there.out
    assert there.out.endswith("\nnote: no tokenizer came with the model, so the folder has none\n")
    assert convert("--from-hf", "iiet", "--to", "again").code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert models.load(tmp_path / "again").config.solver == models.load(tmp_path / "ours").config.solver

    assert convert("--from-hf", "hf", "--to", "plain").code == 0
    for source in (["--from-hf", "hf"], ["--from-model", "plain"]):
        if source[0] == "--from-model":
            (tmp_path / "plain" / "tokenizer.model").unlink()
        result = convert(*source, "--to-hf", source[1] + "-llama", "--as-llama", "--dtype", "bf16")
        assert result.code == 0, result.err
        assert "a plain LLaMA, bf16 in 1 file" in result.out
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / (source[1] + "-llama"))
        for name, parameter in llama.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], parameter.bfloat16()), name
    copied = tmp_path / "hf-llama"
    assert (copied / "tokenizer.model").read_text() == "{}"
    assert json.loads((copied / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    solver = convert("--from-hf", "iiet", "--to", "x", "--solver.kind", "euler")
    assert solver.error == "iiet/config.json: the model has a solver of its own; leave out solver.kind"


_ELSEWHERE = """
import json, sys
class Refuse:  # this package is not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron_iiet":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("hf", trust_remote_code=False)  # it needs none
inputs = tokenizer("the solver  merges" + tokenizer.eos_token, return_tensors="pt")
said = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes"}]
said = tokenizer.apply_chat_template(said, tokenize=False) + "|" + tokenizer.apply_chat_template(
    said[:1], tokenize=False, add_generation_prompt=True)
out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
print(json.dumps([inputs["input_ids"].tolist(), out.tolist(), model.generation_config.eos_token_id, said]))
"""


@pytest.mark.slow
def test_a_run_for_transformers_alone(tmp_path: Path, convert: Convert, data: dict[str, str]) -> None:
    """Trained on two ranks, exported, and decoded where this package is not installed."""
    config = tiny_config(
        data, tmp_path / "run", parallel={"tensor": 2}, solver={"kind": "iiet", "iterations": 2}
    )
    run_ranks(pretrain_rank, 2, as_data(config), ds_json(tmp_path, 1))
    result = convert("--from-run", "run", "--to-hf", "hf", "--chat-template", "turns")
    assert result.code == 0, result.err
    files = (
        "README.md, chat_template.jinja, modeling_iiet.py, tokenizer.json, tokenizer.model, "
        "tokenizer_config.json"
    )
    assert result.out.endswith(f"run/checkpoints/step_00000008, solver iiet, fp32 in 1 file, {files}\n")
    command = [sys.executable, "-c", _ELSEWHERE]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    elsewhere = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert elsewhere.returncode == 0, elsewhere.stderr
    prompt, decoded, eos, said = json.loads(elsewhere.stdout.splitlines()[-1])
    tokenizer = load_tokenizer(data["tokenizer"])
    assert prompt == [[*tokenizer.encode("the solver  merges").tolist(), tokenizer.eod_id]]
    assert eos == tokenizer.eod_id
    answered, asked = said.split("|")
    assert answered == "### User:\nhi\n### Assistant:\nyes</s>"
    assert asked == "### User:\nhi\n### Assistant:\n"
    card = (tmp_path / "hf" / "README.md").read_text()
    losses = read_log(tmp_path / "run")
    last = max(step for step, values in losses.items() if "validation_loss" in values)
    rows = [
        "| solver | iiet, variant paper, r = 2 |",
        "| evaluations of the layers | 9 for each token |",
        f"| data | {Path(data['prefix']).name} |",
        "| trained | 8 steps, 1,024 tokens in sequences of 16 |",
        f"| validation loss | {losses[last]['validation_loss']:.4f} nats a token at step {last} "
        "(windows: rule spread) |",
    ]
    assert [row for row in rows if row not in card] == []
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert convert("--from-run", "run", "--to", "ours").code == 0
    model, tokens = models.load(tmp_path / "ours"), torch.tensor(prompt)
    while tokens.shape[1] < len(decoded[0]):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    assert tokens.tolist() == decoded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero_stage"), STAGES)
def test_from_run(
    tmp_path: Path, convert: Convert, data: dict[str, str], precision: str, zero_stage: int
) -> None:
    """A two-stage run: its validation loss comes back from the exported folder, in both stages."""
    config = tiny_config(
        data,
        tmp_path / "run",
        solver={"kind": "iiet", "iterations": 2, "schedule": [[0.5, 0], [0.5, 2]]},
        training={"steps": 4, "precision": precision},
        evaluation={"interval": 2},
        checkpoint={"interval": 2, "keep": 0},
        logging={"tensorboard": False},
    )
    run_ranks(pretrain_rank, 1, as_data(config), ds_json(tmp_path, zero_stage))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}

    for step, kind in ((2, "euler"), (4, "iiet")):
        chosen = ["--step", "2"] if step == 2 else []
        result = convert("--from-run", "run", "--to", f"m{step}", *chosen)
        assert result.code == 0, result.err
        assert f"solver {kind}, tokenizer.model" in result.out
        model = models.load(tmp_path / f"m{step}")
        assert model.config.solver.kind == kind
        assert getattr(model.config.solver, "schedule", None) is None
        assert validation_loss(model) == pytest.approx(
            logged[step], abs=1e-5 if precision == "fp32" else 5e-3
        )
    wrong = convert("--from-run", "run", "--to", "x", "--step", "3").error
    assert wrong == "run has no checkpoint step_00000003; there are step_00000002, step_00000004"

    shard = tmp_path / "run" / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    damaged = convert("--from-run", "run", "--to", "x").error
    assert "step_00000004/rank_00000.safetensors has 100 bytes, but index.json says" in damaged
    shard.unlink()
    missing = convert("--from-run", "run", "--to", "x").error
    assert "step_00000004/rank_00000.safetensors is missing" in missing
    assert not (tmp_path / "x").exists()


def test_refresh_renews_what_an_older_version_wrote(
    tmp_path: Path, llama: LlamaForCausalLM, convert: Convert
) -> None:
    options = ["--solver.kind", "iiet", "--solver.iterations", "1"]
    (tmp_path / "hf" / "tokenizer.model").unlink()
    assert convert("--from-hf", "hf", "--to-hf", "export", *options).code == 0
    assert convert("--refresh", "export").out == "export: nothing to renew\n"
    export = tmp_path / "export"
    weights = (export / "model.safetensors").read_bytes()
    code = (export / "modeling_iiet.py").read_bytes()
    (export / "modeling_iiet.py").write_text("raise ImportError")
    fields = json.loads((export / "config.json").read_text())
    auto_map = fields.pop("auto_map")
    (export / "config.json").write_text(json.dumps(fields | {"auto_map": {"AutoConfig": "other"}}))
    (export / "tokenizer_config.json").write_text('{"eos_token": "</s>", "split_special_tokens": true}')
    assert convert("--refresh", "export").out == (
        "export: renewed modeling_iiet.py, config.json (auto_map), tokenizer_config.json "
        "(split_special_tokens, with which no fine-tuning learns to stop)\n"
    )
    assert (export / "modeling_iiet.py").read_bytes() == code
    assert (export / "model.safetensors").read_bytes() == weights
    assert json.loads((export / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    renewed = json.loads((export / "config.json").read_text())
    assert (renewed["auto_map"], renewed["solver"]) == (auto_map, fields["solver"])
    assert convert("--refresh", "export").out == "export: nothing to renew\n"
    assert convert("--refresh", "hf").error.startswith("hf is no export of an IIET")
    wrong = convert("--refresh", "export", "--dtype", "bf16")
    assert wrong.error == "--dtype is given with --refresh, which changes no weights; leave it out"
    assert convert("--from-hf", "hf").error == "one of the arguments --to --to-hf is required"


def test_an_export_with_other_code_is_told(
    tmp_path: Path, llama: LlamaForCausalLM, convert: Convert, capsys: pytest.CaptureFixture[str]
) -> None:
    convert("--from-hf", "hf", "--to-hf", "export", "--solver.kind", "iiet")
    folders.load_model(tmp_path / "export", torch.float32)
    assert "note" not in capsys.readouterr().err
    (tmp_path / "export" / "modeling_iiet.py").write_text("raise ImportError")
    folders.load_model(tmp_path / "export", torch.float32)
    assert "modeling_iiet.py is not this version's, which is used here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[9].content }}", "cannot write a conversation"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what was said"),
        (None, "is neither a file nor turns"),
    ],
)
def test_a_chat_template_that_does_not_work_leaves_nothing_behind(
    tmp_path: Path, convert: Convert, data: dict[str, str], template: str | None, words: str
) -> None:
    config = tiny_config(data, tmp_path / "run")
    model = Transformer(config)
    model.initialise(seed=0)
    portable.save(config, model.state_dict(), "ours", extra_files=[Path(data["tokenizer"])])
    if template is not None:
        (tmp_path / "mine.jinja").write_text(template)
    wrong = convert("--from-model", "ours", "--to-hf", "hf", "--chat-template", "mine.jinja")
    assert words in wrong.error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("hf")] == []
