"""The inference benchmark on tiny models: what it says of them without a clock is right, all caches give one
text, and what goes wrong is told. Its way on CUDA is followed as far as that goes without a GPU."""

from __future__ import annotations

import importlib
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerationMixin

from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.models import Transformer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CPU = ["--toy", "--device", "cpu"]
LAYERS, WIDTH, FFN, VOCABULARY = 2, 64, 160, 512
BATCH, PROMPT, NEW = 2, 8, 4
EVALUATIONS = {
    "LlamaForCausalLM of transformers": 2,
    "Transformer++": 2,
    "ODE Transformer, RK2": 4,
    "PCformer": 6,
    "IIET r = 3": 8,
    "IIET r = 2": 6,
    "IIET r = 0 (Lower Bound)": 2,
    "E-IIET, 1 of 6": 3,
    "E-IIET by plan.json, 2 of 6": 4,
}


def module(name: str) -> Any:
    """A module of the benchmark, as the running script would have it."""
    return importlib.import_module(name)


@pytest.fixture(scope="module", autouse=True)
def _on_the_path() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything once: exit status, rows by (system, cache), what the JSON says besides, the folder."""
    folder = tmp_path_factory.mktemp("inference")
    IterationPlan((0, 2), full=3, method="budget").write(folder / "plan.json")
    words = [*CPU, "--caches", "dynamic", "static", "--iterations", "0", "2", "3", "--batch", str(BATCH)]
    words += ["--plan", str(folder / "plan.json"), "--output", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        status = module("inference").main(words)
    content = json.loads((folder / "out/inference.json").read_text())
    rows = {(row["system"], row["cache"]): row for row in content.pop("rows")}
    text = "\n".join(printed)
    return SimpleNamespace(status=status, rows=rows, content=content, folder=folder / "out", text=text)


@pytest.mark.slow
def test_every_system_with_every_cache(run: Any) -> None:
    assert run.status == 0
    assert set(run.rows) == {(name, cache) for name in EVALUATIONS for cache in ("dynamic", "static")}
    for (name, _), row in run.rows.items():
        assert row["evaluations"] == EVALUATIONS[name]
        assert row["refused"] is None
        for key in ("tokens_per_second", "prompt_tokens_per_second", "seconds_a_token"):
            assert row[key] > 0
        for key in ("time_ratio_to_transformer_pp", "time_ratio_to_llama", "speedup_over_full_iiet"):
            assert row[key] > 0
        assert row["tokens_per_second"] == pytest.approx(BATCH / row["seconds_a_token"])
        of_baseline = run.rows["Transformer++", row["cache"]]["seconds_a_token"]
        assert row["time_ratio_to_transformer_pp"] == pytest.approx(row["seconds_a_token"] / of_baseline)
        of_full = run.rows["IIET r = 3", row["cache"]]["seconds_a_token"]
        assert row["speedup_over_full_iiet"] == pytest.approx(of_full / row["seconds_a_token"])
    assert run.rows["E-IIET by plan.json, 2 of 6", "static"]["iterations"] == [0, 2]
    assert run.rows["IIET r = 2", "static"]["iterations"] == [2, 2]
    assert run.rows["PCformer", "static"]["iterations"] is None


@pytest.mark.slow
def test_flops_by_formula_and_as_counted(run: Any) -> None:
    """The paper's: E (2 (4 d² + 3 d ffn) + 4 d T) T + 2 d V T, at T = 512."""
    length = 512
    for row in run.rows.values():
        layer = (2 * (4 * WIDTH**2 + 3 * WIDTH * FFN) + 4 * WIDTH * length) * length
        expected = row["evaluations"] * layer + 2 * WIDTH * VOCABULARY * length
        assert row["flops_formula"] == row["flops_counted"] == expected
    by_name = {name: row["flops_counted"] for (name, _), row in run.rows.items()}
    assert by_name["IIET r = 0 (Lower Bound)"] == by_name["Transformer++"]


@pytest.mark.slow
def test_bytes_of_weights_and_caches(run: Any) -> None:
    for (name, _), row in run.rows.items():
        per_token = 2 * WIDTH * 4 * EVALUATIONS[name]
        assert row["cache_bytes_per_token"] == row["cache_bytes_per_token_formula"] == per_token
        held = row["weights_bytes"] + BATCH * (PROMPT + NEW - 1) * per_token
        assert row["weights_and_cache_bytes"] == held
        assert row["peak_bytes"] is None, "torch measures none on a CPU"
    layer = 4 * WIDTH**2 + 3 * WIDTH * FFN + 2 * WIDTH
    weights = 4 * (2 * VOCABULARY * WIDTH + LAYERS * layer + WIDTH)
    assert run.rows["LlamaForCausalLM of transformers", "dynamic"]["weights_bytes"] == weights
    assert run.rows["IIET r = 3", "dynamic"]["weights_bytes"] == weights + 4 * 3  # coefficients of 2 layers
    assert "weights + cache, MB (computed)" in run.text


@pytest.mark.slow
def test_static_caches_give_the_text_of_dynamic_ones(run: Any) -> None:
    for (_, cache), row in run.rows.items():
        if cache == "static":
            assert row["tokens_equal_to_dynamic"] is True
            assert row["logits_difference_to_dynamic"] < 1e-5
            assert row["comparison"] == "equal"
        else:
            assert row["comparison"] is None


@pytest.mark.slow
def test_what_is_written_and_printed(run: Any) -> None:
    assert run.content["toy"] is True
    assert run.content["device"]["type"] == "cpu"
    assert run.content["device"]["name"]
    assert run.content["versions"]["torch"] == torch.__version__
    assert run.content["arguments"]["iterations"] == [0, 2, 3]
    assert run.content["paper_time_ratios"] == {"IIET r = 3": 4.5, "E-IIET": 1.9}
    assert (run.folder / "inference.png").read_bytes()[:4] == b"\x89PNG"
    assert "no size of the paper" in run.text
    table = [line for line in run.text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(run.rows)
    assert len({line.count("|") for line in table}) == 1


# --- what goes wrong is told ---


@pytest.fixture
def two_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer++ and IIET r = 1 only."""
    script, real = module("inference"), module("inference_systems").systems
    kept = ("Transformer++", "IIET r = 1")
    monkeypatch.setattr(script, "systems", lambda *of: [s for s in real(*of) if s.name in kept])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_text_ends_in_status_1(
    two_systems: None, precision: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a static cache that loses what it was told of the prompt."""
    real = StaticLayer.update

    def forgetful(layer: Any, keys: Any, values: Any, *rest: Any, **more: Any) -> Any:
        found = real(layer, keys, values, *rest, **more)
        layer.values[:, :, :4] = 0
        return found

    monkeypatch.setattr(StaticLayer, "update", forgetful)
    words = [*CPU, "--caches", "static", "--iterations", "1", "--precision", precision]
    assert module("inference").main(words) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if "| static |" in line]
    assert len(rows) == 2
    assert all("UNEQUAL: " in line for line in rows)


@pytest.mark.slow
def test_what_fails_is_refused_and_the_rest_measured(
    two_systems: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory | left\nat all")

    monkeypatch.setattr(StaticLayer, "update", full)
    words = [*CPU, "--caches", "dynamic", "static", "--iterations", "1"]
    assert module("inference").main(words) == 1
    printed = capsys.readouterr()
    assert printed.out.count("| static | refused: OutOfMemoryError: no memory / left at all | – |") == 2
    assert printed.out.count("| dynamic | refused") == 0
    assert "IIET r = 1, static cache, refused:" in printed.err


@pytest.mark.slow
def test_compiled(two_systems: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the compiler refuses is a row that says so; what it takes gives the same text. (A backend that
    runs what it is given: inductor takes a minute.)"""
    timing, words = module("inference_timing"), [*CPU, "--compile", "--iterations", "1"]

    def rows() -> list[dict[str, Any]]:
        found = json.loads((tmp_path / "inference.json").read_text())["rows"]
        return [row for row in found if row["cache"] == "static, compiled"]

    monkeypatch.setattr(timing, "BACKEND", refusing_backend)
    assert module("inference").main([*words, "--output", str(tmp_path)]) == 0
    assert ["not today" in row["refused"] for row in rows()] == [True, True]
    monkeypatch.setattr(timing, "BACKEND", "eager")
    assert module("inference").main([*words, "--output", str(tmp_path)]) == 0
    for row in rows():
        assert row["refused"] is None
        assert row["compiled"]["graphs"] == 1
        assert row["comparison"] == "equal"


def refusing_backend(*_: Any, **__: Any) -> Any:
    raise RuntimeError("not today")


def test_nothing_compiled_is_refused(two_systems: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure called compiled that was not would be worse than none."""
    timing = module("inference_timing")
    real = timing._compile_config

    def on_cuda_only() -> Any:
        config = real()
        config._compile_all_devices = None
        return config

    monkeypatch.setattr(timing, "_compile_config", on_cuda_only)
    (found,) = toy_subjects(timing.COMPILED)
    timing.measure([found], torch.zeros(1, 4, dtype=torch.long), 2, 1)
    assert found.decodings[timing.COMPILED].refused == ("RuntimeError: transformers ran the pass uncompiled")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--plan", "missing.json"], "cannot read the iteration plan missing.json"),
        (["--new-tokens", "1"], "1 is no whole number of at least 2"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_wrong_arguments(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        module("inference").main(["--toy", *words])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_plan_for_another_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IterationPlan((0, 2, 1), full=3, method="budget").write(tmp_path / "plan.json")
    with pytest.raises(SystemExit):
        module("inference").main([*CPU, "--plan", str(tmp_path / "plan.json")])
    assert "is an iteration plan for 3 layers, but the model has 2" in capsys.readouterr().err


# --- texts, side by side ---


def logits(*best: int, by: float = 1.0) -> list[torch.Tensor]:
    """Of one sequence, for each token the likeliest of 4."""
    return [torch.eye(4)[[token]] * by + 1.0 for token in best]


def test_texts_are_compared_up_to_where_they_part() -> None:
    compared = module("inference_timing").compared
    one, other = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[1, 3, 3, 0]])
    near = [logits(1), [torch.tensor([[1.0, 1.0, 2.0, 1.99]])], logits(3, 0)]
    far = [logits(1), [torch.tensor([[1.0, 1.0, 2.0, 2.01]])], logits(3, 0, by=50.0)]
    expected, found = ([step for steps in text for step in steps] for text in (near, far))
    result = compared(one, other, expected, found, "bf16")
    assert (result.tokens_equal, result.parts_at, result.passed) == (False, 2, True)
    assert result.difference == pytest.approx(0.02 / (7 + 1 + 1 + 4 + 1.99**2) ** 0.5, rel=1e-3)
    assert result.verdict.startswith("equal up to rounding: tokens part at 2, logits ")
    assert compared(one, other, expected, found, "fp32").verdict.startswith("UNEQUAL: tokens part at 2")
    assert compared(one, one, expected, expected, "fp32").verdict == "equal"
    same_text = compared(one, one, logits(1, 2, 3, 0), logits(1, 2, 3, 0, by=2.0), "bf16")
    assert same_text.verdict.startswith("UNEQUAL: tokens equal, logits ")
    nothing = [step * float("nan") for step in expected]
    assert not compared(one, one, expected, nothing, "bf16").passed


# --- systems by size ---


def test_what_e_iiet_keeps_and_what_has_no_file() -> None:
    systems = module("inference_systems").systems
    kept = {"55m": (8, 36), "340m": (16, 72), "740m": (23, 72), "1.3b": (16, 72)}
    for size, (some, all_of_them) in kept.items():
        found = {system.name: system for system in systems(size, [0, 3])}
        e_iiet = found[f"E-IIET, {some} of {all_of_them}"]
        assert sum(e_iiet.iterations) == some
        assert max(e_iiet.iterations) == 1
        printed = {"340m": "0.60", "740m": "1.52"}.get(size)  # Table 3, TFLOPs of 512 tokens
        assert printed in (None, f"{Transformer.on_meta(e_iiet.config).forward_flops(512) / 1e12:.2f}")
        assert len({system.config.model.hidden_size for system in found.values()}) == 1
    assert found["PCformer"].note == (
        "PCformer: from iiet-1.3b.yaml with --solver.kind pcformer --solver.predictor_order 2"
    )
    assert found["PCformer"].config.solver.kind == "pcformer"
    assert found["ODE Transformer, RK2"].config.solver.stage_coefficients == "learned"
    assert [name for name, system in found.items() if system.note] == ["ODE Transformer, RK2", "PCformer"]


# --- CUDA, as far as that goes without a GPU ---


def toy_subjects(*caches: str) -> list[Any]:
    timing, found = module("inference_timing"), module("inference_systems").systems("toy", [1])
    return [
        timing.Subject(
            system,
            system.build("fp32", torch.device("cpu")),
            {cache: timing.Decoding() for cache in caches},
        )
        for system in found[1:2]
    ]


@pytest.mark.slow
def test_everything_is_made_on_the_models_device() -> None:
    """Meta stands for CUDA: torch refuses to compute with a tensor there and one on the CPU."""
    meta, systems = torch.device("meta"), module("inference_systems")
    for system in systems.systems("toy", [3]):
        model = system.build("bf16", meta)
        assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {meta}
        tokens: set[torch.device] = set()  # an embedding takes those of the CPU
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, given, tokens=tokens: tokens.add(given[0].device)
        )
        assert systems.cache_bytes(model) == systems.cache_formula(system.config, "bf16")
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
            with torch.no_grad():
                model(torch.zeros(2, 8, dtype=torch.long, device=meta), past_key_values=cache)
                out = model(torch.zeros(2, 1, dtype=torch.long, device=meta), past_key_values=cache)
            assert out.logits.device == meta
        assert tokens == {meta}


def test_only_what_is_called_compiled_is_compiled_on_cuda() -> None:
    """transformers compiles a static cache's passes there unless it is told not to."""
    timing, (subject,) = module("inference_timing"), toy_subjects("dynamic")
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda"), config=subject.model.config)
    static = StaticCache(config=subject.model.config, max_cache_len=12)
    for cache, compiled in (("static", False), (timing.COMPILED, True)):
        config = timing.settings(cache, 4)
        decided = GenerationMixin._valid_auto_compile_criteria(on_cuda, {"past_key_values": static}, config)
        assert decided is compiled
    assert config.compile_config.mode == "reduce-overhead"


def test_counting_flops_leaves_the_model_as_it_is() -> None:
    (subject,) = toy_subjects("dynamic")
    before = subject.model.config._attn_implementation
    module("inference_systems").flops_counted(subject.model)
    assert subject.model.config._attn_implementation == before == "sdpa"


def test_a_gpus_clock_is_read_behind_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    timing, seen = module("inference_timing"), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(str(device)))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(len(seen)))
    clock = timing.Clock(torch.device("cuda"))
    for token in range(3):
        clock.put(torch.tensor([token]))
    assert seen == ["cuda"] * 3
    assert clock.times == [1.0, 2.0, 3.0]
    timing.Clock(torch.device("cpu")).put(torch.tensor([0]))
    assert len(seen) == 3


def test_peak_on_a_gpu_is_of_one_kind_of_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    timing, seen = module("inference_timing"), []
    real, peaks = timing.decode, iter((50, 70, 60, 40, 20, 30))

    def decode(model: Any, prompt: Any, config: Any, clock: Any) -> Any:
        seen.append(config.cache_implementation or "dynamic")
        return real(model, prompt, config, clock)

    def highest(_: Any) -> int:
        seen.append("read")
        return next(peaks)

    monkeypatch.setattr(timing, "decode", decode)
    monkeypatch.setattr(timing.Subject, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", highest)
    (subject,) = toy_subjects("dynamic", "static")
    timing.measure([subject], torch.zeros(1, 4, dtype=torch.long), 2, 2)
    once = [["reset", cache, "read"] * 3 for cache in ("dynamic", "static")]
    assert seen == [*once[0], *once[1]]
    assert {name: found.peak_bytes for name, found in subject.decodings.items()} == {
        "dynamic": 70,
        "static": 40,
    }


@pytest.mark.slow
def test_alone_means_alone(two_systems: None, monkeypatch: pytest.MonkeyPatch) -> None:
    system, built = module("inference_systems").System, []
    real = system.build

    def build(self: Any, precision: str, device: torch.device) -> Any:
        left.append(sum(model() is not None for model in built))
        model = real(self, precision, device)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(system, "build", build)
    for words, expected in (["--alone"], [0, 0]), ([], [0, 1]):
        left: list[int] = []
        built.clear()
        assert module("inference").main([*CPU, "--iterations", "1", *words]) == 0
        assert left == expected
