"""What is measured: against plain torch, in every layout, on every kind of text, through the tool."""

# ruff: noqa: E501  (a golden message is easier to compare on one line)

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard

from megatron_iiet import models
from megatron_iiet.config import RunConfig, config_from_file, load_config
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.schema import DataConfig, ParallelConfig
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.loader.inputs import Inputs, inputs_of
from megatron_iiet.data.loader.samples import KINDS, build_splits
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.distillation import figures
from megatron_iiet.distillation.analysis import Options, Result, _report, analyse, prepare, run
from megatron_iiet.distillation.influence import Ablation, Measurement
from megatron_iiet.distillation.plans import PlanRequest
from megatron_iiet.distillation.texts import open_text_set, read_text
from megatron_iiet.models import Transformer
from megatron_iiet.models.iterations import most_influential
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.vocabulary import IGNORED
from tests.distributed.harness import run_ranks
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES = 7
"""Fewer than fill micro-batches, so that there are fillers."""
SOLVERS: dict[str, dict[str, Any]] = {
    "paper": {"iterations": 2, "coefficient_init": "average"},
    "euler predictor": {"iterations": 2, "predictor": "euler", "coefficient_init": "average"},
    "released": {"iterations": 2, "variant": "released"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Short documents, so that samples are padded."""
    folder = tmp_path_factory.mktemp("data")
    paths = make_data(folder)
    rng = np.random.default_rng(5)
    with IndexedDatasetWriter(folder / "short", 96) as writer:
        for length in rng.integers(2, 14, 400):
            writer.add_document(rng.integers(1, 96, int(length)))
    return {**paths, "prefix": str(folder / "short")}


@pytest.fixture(scope="module")
def folders(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each solver, with iterations that change much."""
    made = {}
    for name, solver in SOLVERS.items():
        config = tiny_config(
            {**data, "documents": "pack"},  # type: ignore[arg-type]
            Path("never"),
            solver={"kind": "iiet", **solver},
            model={"num_layers": 4, "init_std": 0.3},
        )
        model = Transformer(config)
        model.initialise(seed=3)
        made[name] = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
        models.save(config, model.state_dict(), made[name], extra_files=[data["tokenizer"]])
    return made


def options(model: Path, output: Path, **changes: Any) -> Options:
    values = {"sequences": SEQUENCES, "micro_batch_size": 2, **changes}
    return Options(str(model), output, values.pop("request", PlanRequest(threshold="auto")), **values)


def text_of(config: RunConfig, sequences: int = SEQUENCES) -> Inputs:
    """The sequences of the validation split, one batch, read by hand."""
    parts = build_splits(
        config.data.prefix,
        config.data.sequence_length,
        config.data.split,
        "pack",
        vocab_size=config.model.vocab_size,
    )
    return inputs_of(
        next(
            iter(
                ValidationBatches(
                    [parts.validation],
                    samples=sequences,
                    micro_batch_size=sequences,
                    dp_rank=0,
                    dp_size=1,
                )
            )
        )
    )


def streams(model: Transformer, inputs: Inputs, iterations: list[int]) -> list[torch.Tensor]:
    """Embedding and every layer's output with so many iterations."""
    model.set_iterations(iterations)
    with torch.no_grad():
        y_BTD, history = model.embed(inputs.tokens)
        layout = model.layout(inputs.tokens.shape[1], y_BTD.dtype, inputs.positions)
        return [y_BTD, *model.trajectory(y_BTD, history, layout)]


def far(one: torch.Tensor, other: torch.Tensor, inputs: Inputs) -> float:
    """1 − mean cosine over tokens with a target, in fp64."""
    cosines = F.cosine_similarity(one.double(), other.double(), dim=-1)
    return 1 - cosines[inputs.targets != IGNORED].mean().item()


def losses_of(model: Transformer, inputs: Inputs, iterations: list[int]) -> float:
    model.set_iterations(iterations)
    with torch.no_grad():
        return (model(*inputs) / inputs.counted).item()


# --- against plain torch ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "euler predictor"])
def test_influence_is_that_of_shortened_layers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The i-th iterate of a layer is what the layer puts out with i iterations, everything before it the
    same; the Euler predictor alone is y + F(y), whatever is merged later."""
    found = analyse(options(folders[name], tmp_path)).measured
    model = models.load(folders[name])
    inputs = text_of(model.config)
    assert 0 < int(inputs.counted) < inputs.targets.numel(), "every document's first token counts"
    whole = streams(model, inputs, [2] * 4)
    expected = {}
    for n in range(4):
        iterates = [whole[n]]
        for kept in range(3):
            iterates.append(streams(model, inputs, [2] * n + [kept] + [2] * (3 - n))[n + 1])
            expected[n, kept] = far(iterates[-2], iterates[-1], inputs)
    assert min(expected.values()) > 1e-6
    assert found.influence == pytest.approx(expected, rel=1e-4)
    blocks = [far(whole[n], whole[n + 1], inputs) for n in range(4)]
    assert found.block_influence == pytest.approx(blocks, rel=1e-4)
    assert (found.sequences, found.tokens) == (SEQUENCES, int(inputs.counted))
    assert found.loss is None


@pytest.mark.slow
def test_ablation_is_the_loss_of_shortened_models(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = options(folders["paper"], tmp_path, ablation=True, request=PlanRequest(budget=3, ranking="loss"))
    result = analyse(asked)
    model = models.load(folders["paper"])
    inputs = text_of(model.config)
    ablation = result.ablation
    assert ablation is not None
    assert ablation.loss == pytest.approx(losses_of(model, inputs, [2] * 4), rel=1e-6)
    expected = {
        (n, kept + 1): losses_of(model, inputs, [2] * n + [kept] + [2] * (3 - n))
        for n in range(4)
        for kept in (0, 1)
    }
    assert ablation.losses == pytest.approx(expected, rel=1e-6)
    assert list(result.plan.iterations) == most_influential(ablation.increase, 4, 7)
    assert result.plan.loss_increase == ablation.increase


@pytest.mark.slow
def test_micro_batches_do_not_matter(folders: dict[str, Path], tmp_path: Path) -> None:
    found = [
        analyse(options(folders["released"], tmp_path, micro_batch_size=size)).measured for size in (3, 7)
    ]
    assert found[0].influence == pytest.approx(found[1].influence, rel=1e-4)
    assert found[0].block_influence == pytest.approx(found[1].block_influence, rel=1e-4)
    assert found[0].tokens == found[1].tokens


def test_nothing_is_observed_afterwards(folders: dict[str, Path]) -> None:
    from megatron_iiet.models.diagnostics import observe_influence

    model = models.load(folders["paper"])
    inputs = text_of(model.config)
    with observe_influence(model, inputs.targets != IGNORED) as sums:
        model(*inputs)
    assert len([n for n, iterate in sums if iterate is None]) == 4
    assert not any(layer._forward_hooks for layer in model.layers.values())
    assert not any(solver.observer for solver in model.solvers.values())


# --- in every layout ---

TWO = [
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(),
]


def measure_on_ranks(asked: list[Options]) -> list[Result]:
    """On every rank, one after the other: one process group, a grid for each."""
    results = []
    with ParallelContext.start() as world:
        for each in asked:
            prepared = prepare(each, world.world_size)
            context = ParallelContext.on_grid(
                each.parallel, world.rank, world.world_size, world.local_rank, world.device
            )
            results.append(run(each, prepared, context))
    return results


def check_layouts(
    name: str, layouts: list[ParallelConfig], ranks: int, folders: dict[str, Path], folder: Path
) -> None:
    request = PlanRequest(flops_ratio=0.7)
    one = options(folders[name], folder / "one", ablation=True, request=request)
    expected = analyse(one)
    asked = [replace(one, parallel=layout, output=folder / str(i)) for i, layout in enumerate(layouts)]
    for results in run_ranks(measure_on_ranks, ranks, asked):
        for result in results:
            assert result.plan.iterations == expected.plan.iterations
            for found, wanted in (
                (result.measured.influence, expected.measured.influence),
                (result.measured.block_influence, expected.measured.block_influence),
                (result.ablation.losses, expected.ablation.losses),
            ):
                assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
            assert result.measured.tokens == expected.measured.tokens
            assert result.ablation.loss == pytest.approx(expected.ablation.loss, rel=1e-6)


@pytest.mark.slow
def test_two_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    """Tensor, sequence, pipeline and data parallelism."""
    check_layouts("paper", TWO, 2, folders, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", SOLVERS)
def test_eight_ranks(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    layouts = [ParallelConfig(2, 2, sequence) for sequence in (False, True)]
    check_layouts(name, [*layouts, ParallelConfig(1, 4)], 8, folders, tmp_path)


# --- texts ---

TEXTS = ["A first document.", "The second one is a little longer than the first.", "", "The end, 終わり."]


def write_texts(folder: Path) -> dict[str, Path]:
    """The same documents as JSON lines, packed JSON lines and a corpus; the second as plain text."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "lines.jsonl").write_text(lines)
    (folder / "packed.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "plain.txt").write_text(TEXTS[1])
    return {path.name.partition(".")[0]: path for path in folder.iterdir()}


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("name", ["lines", "packed"])
def test_a_text_is_cut_as_a_corpus_of_it(
    name: str, documents: str, data: dict[str, str], tmp_path: Path
) -> None:
    files = write_texts(tmp_path)
    tokenizer = load_tokenizer(data["tokenizer"])
    with IndexedDatasetWriter(tmp_path / "corpus", 300) as writer:
        for text in TEXTS:
            if text:
                writer.add_document(np.append(tokenizer.encode(text), tokenizer.eod_id))
    config = DataConfig(tokenizer=data["tokenizer"], sequence_length=8, documents=documents)  # type: ignore[arg-type]
    found = open_text_set(str(files[name]), config, 384, 100).sources[0]
    expected = open_text_set(str(tmp_path / "corpus"), config, 384, 100).sources[0]
    assert len(found) == len(expected) > 3
    for index in range(len(found)):
        rows = []
        for source in (found, expected):
            tokens, positions = np.zeros(9, np.int64), np.zeros(9, np.int64)
            source.fill(index, tokens, positions)
            rows.append((tokens.tolist(), positions.tolist()))
        assert rows[0] == rows[1]
    whole = found.stream
    assert whole.document(1).tolist() == expected.stream.document(1).tolist()
    assert tokenizer.decode(whole.document(2)) == TEXTS[3]


def test_plain_text_is_one_document_and_no_more_is_read_than_needed(
    data: dict[str, str], tmp_path: Path
) -> None:
    files = write_texts(tmp_path)
    tokenizer = load_tokenizer(data["tokenizer"])
    plain = read_text(str(files["plain"]), tokenizer, 1000)
    assert plain.num_documents == 1
    assert tokenizer.decode(plain.read(0, plain.num_tokens)) == TEXTS[1]
    assert read_text(str(files["lines"]), tokenizer, 3).num_documents == 1


@pytest.mark.parametrize("documents", KINDS)
def test_as_much_of_a_text_is_read_as_the_sequences_take(
    documents: str, data: dict[str, str], tmp_path: Path
) -> None:
    """Of documents of a few tokens, which do not make up for one that is missing."""
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n' * 100)
    config = DataConfig(tokenizer=data["tokenizer"], sequence_length=8, documents=documents)  # type: ignore[arg-type]
    found = open_text_set(str(tmp_path / "short.jsonl"), config, 384, 5).sources[0]
    assert len(found) >= 5
    assert found.stream.num_tokens < 60, "all of it was read"


def test_a_corpus_of_another_tokenizer_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", 300) as writer:
        writer.add_document(np.arange(40))
    write_shards(tmp_path / "corpus", [writer.shard], writer.dtype, {"tokenizer": {"digest": "0"}})
    config = DataConfig(tokenizer=data["tokenizer"], sequence_length=8)
    with pytest.raises(
        ValueError, match=r"was made with the tokenizer .* \(digest 0\), but data.tokenizer is"
    ):
        open_text_set(str(tmp_path / "corpus"), config, 384, 100)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("none.jsonl", {}, "The input none.jsonl is missing."),
        ("none.txt", {}, "The input none.txt is missing."),
        ("bytes.txt", {}, "bytes.txt, row 1: byte b'\\xff' is not valid UTF-8; convert"),
        ("none", {}, "none.idx is missing"),
        (
            "plain.txt",
            {"sequence_length": 300},
            "plain.txt has 41 tokens, too few for a sequence of 300; give more text, or a smaller --sequence-length",
        ),
        (
            "plain.txt",
            {"tokenizer": ""},
            "the model's configuration names no tokenizer; give --tokenizer its file",
        ),
        ("", {}, "the model's configuration names no corpus; give --data one, or a file of text"),
        (
            "",
            {"prefix": "p", "split": [1.0, 0.0, 0.0]},
            "the model was validated on nothing (data.split is [1.0, 0.0, 0.0]); give --data a corpus, or a file of text",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_texts_refused(
    path: str,
    changes: dict[str, Any],
    message: str,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    config = replace(DataConfig(tokenizer=data["tokenizer"], sequence_length=8), **changes)
    with pytest.raises(ValueError) as caught:
        open_text_set(path, config, 384, 100)
    assert str(caught.value).startswith(message)


def test_a_tokenizer_that_is_too_large(data: dict[str, str], tmp_path: Path) -> None:
    files = write_texts(tmp_path)
    config = DataConfig(tokenizer=data["tokenizer"], sequence_length=8)
    with pytest.raises(ValueError, match=r"has 300 ids, but the model's vocabulary 200; give --tokenizer"):
        open_text_set(str(files["plain"]), config, 200, 100)


# --- the tool ---


def run_tool(*arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error, in this process."""
    out, error = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["iteration_influence.py", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            runpy.run_path(str(ROOT / "tools/iteration_influence.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0), out.getvalue(), error.getvalue()
    finally:
        sys.argv = argv
    return 0, out.getvalue(), error.getvalue()


@pytest.mark.slow
def test_the_tool(folders: dict[str, Path], data: dict[str, str], tmp_path: Path) -> None:
    """A portable folder finds its own tokenizer; all files are there, and training takes the plan."""
    text = Path(data["tokenizer"]).with_name("corpus.jsonl")
    status, said, error = run_tool(
        "--model", str(folders["paper"]), "--output", str(tmp_path / "new/out"), "--data", str(text),
        "--sequences", "5", "--flops-ratio", "0.7", "--ablation",
    )  # fmt: skip
    assert (status, error) == (0, "")
    out = tmp_path / "new/out"
    found = json.loads((out / "influence.json").read_text())
    assert (found["sequences"], found["sequence_length"], found["iterations"]) == (5, 16, 2)
    assert found["data"] == f"text {text}"
    assert found["model"] == f"model {folders['paper']}"
    assert [len(row) for row in found["influence"]] == [3] * 4
    assert len(found["block_influence"]) == 4
    loss, without, increase = (found["ablation"][key] for key in ("loss", "loss_without", "increase"))
    assert increase == [[one - two, two - loss] for one, two in without]
    for layer, (one, two) in enumerate(without):
        assert f"layer {layer}: loss {two - loss:+.5f} {one - loss:+.5f} with 1 to 0 iterations" in said
    plan = IterationPlan.read(out / "plan.json", layers=4)
    assert plan.influence == {(n, i): found["influence"][n][i] for n in range(4) for i in range(3)}
    assert list(plan.iterations) == found["plan"]
    assert (plan.evaluations, plan.method) == (8, "flops-ratio")  # 0.7 of 12 is 8.4
    lines = said.splitlines()
    head = lines.index("    layer  iterate 0  iterate 1  iterate 2      block       kept")
    for layer, line in enumerate(lines[head + 1 : head + 5]):
        numbers = [*found["influence"][layer], found["block_influence"][layer]]
        assert line.split() == [str(layer), *(f"{n:.3g}" for n in numbers), str(found["plan"][layer])]
    for name in ("iteration_influence.png", "block_influence.png", "iterations.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")
    # The cost comes before the work; a line for each layer after it.
    assert said.index("ablation: 8 more forward passes over the 5 sequences") < said.index(
        "ablation: layer 0"
    )
    assert f"{found['ablation']['rank_correlation']:.3f}" in said
    assert f"r = {found['plan']}, 8 of 12 evaluations" in said
    argv = ["--config", str(folders["paper"] / "config.yaml"), "--solver.iterations", str(out / "plan.json")]
    assert load_config(argv).config.solver.iterations == found["plan"]


def test_a_correlation_that_is_none_and_the_names_of_iterates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations of one influence cannot be ranked, which JSON says by null."""
    from matplotlib.figure import Figure

    influence = {(n, i): 0.5 for n in range(2) for i in range(3)}
    plan = IterationPlan((1, 2), 2, "budget", influence=influence)
    measured = Measurement(influence, [0.1, 0.2], 3, 48, 2.0)
    ablation = Ablation(2.0, {(n, i): 2.0 + n + i for n in range(2) for i in (1, 2)})
    made: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: made.append(figure))
    _report(tmp_path, measured, ablation, plan, "fp32", lambda line: None)
    written = (tmp_path / "influence.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["ablation"]["rank_correlation"] is None
    (heat_map, *_), *_ = (figure.axes for figure in made)
    assert [label.get_text() for label in heat_map.get_xticklabels()] == ["predictor", "1", "2"]


def test_the_papers_rule_is_reported_beside_another(tmp_path: Path) -> None:
    influence = {(0, 0): 0.5, (0, 1): 0.5, (0, 2): 0.6, (1, 0): 0.7, (1, 1): 0.25, (1, 2): 0.5}
    plan = IterationPlan((1, 2), 2, "budget", influence=influence)
    said: list[str] = []
    _report(tmp_path, Measurement(influence, [0.1, 0.2], 3, 48, 2.0), None, plan, "fp32", said.append)
    found = json.loads((tmp_path / "influence.json").read_text())
    assert found["plan"] == [1, 2]
    assert found["paper_rule"] == {"threshold": 0.5, "iterations": [2, 1]}
    assert "paper's rule, threshold 0.5: r = [2, 1], 3 of 4 iterations" in said


@pytest.mark.slow
def test_what_the_pictures_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number, label and line; a layer that changes nothing has a colour too."""
    from matplotlib.figure import Figure

    save = Figure.savefig
    influence = {(0, 0): 0.5, (0, 1): 0.25, (0, 2): 0.125, (1, 0): 1.0, (1, 1): 0.001, (1, 2): 0.0}
    plan = IterationPlan((2, 0), 2, "threshold", influence=influence, threshold=0.0625)
    made: list[Any] = []

    def kept_and_saved(figure: Figure, *arguments: Any, **keys: Any) -> None:
        made.append(figure)
        save(figure, *arguments, **keys)

    monkeypatch.setattr(Figure, "savefig", kept_and_saved)
    files = figures.draw(Measurement(influence, [0.1, 0.2], 3, 48, 2.0), plan, tmp_path)
    monkeypatch.undo()
    assert [path.name for path in files] == [
        "iteration_influence.png",
        "block_influence.png",
        "iterations.png",
    ]
    assert len(made) == 3
    (heat_map, bar), (blocks,), (kept,) = (figure.axes for figure in made)
    texts = [text.get_text() for text in heat_map.texts]
    assert texts == ["0.5", "0.25", "0.12", "1", "0.001", "0"]
    assert [text.get_position() for text in heat_map.texts] == [(i, n) for n in range(2) for i in range(3)]
    colors = [text.get_color() for text in heat_map.texts]
    assert colors == ["black", "black", "black", "black", "white", "white"]
    (image,) = heat_map.get_images()
    assert image.get_array().tolist() == [[0.5, 0.25, 0.125], [1.0, 0.001, 0.001]]
    assert image.get_clim() == (0.001, 1.0)
    assert [tick.get_text() for tick in heat_map.get_yticklabels()] == ["0", "1"]
    names = (heat_map.get_xlabel(), heat_map.get_ylabel(), heat_map.get_title(), bar.get_ylabel())
    title = "iteration influence, threshold 0.0625"
    assert names == ("iterate i", "layer n", title, r"$1 - \cos(y^{i-1}, y^i)$")
    for axes, heights in ((blocks, [0.1, 0.2]), (kept, [2, 0])):
        assert [patch.get_height() for patch in axes.patches] == heights
        assert [patch.get_x() + patch.get_width() / 2 for patch in axes.patches] == [0.0, 1.0]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1"]
        assert axes.get_xlabel() == "layer n"
        assert axes.yaxis.get_gridlines()[0].get_visible()
        assert not axes.xaxis.get_gridlines()[0].get_visible()
    assert blocks.get_ylabel() == "block influence\n$1 - \\cos(y_n, y_{n+1})$"
    assert (blocks.get_title(), kept.get_ylabel()) == ("", "iterations kept")
    assert kept.get_title() == "4 of 6 evaluations, by threshold"
    (full,) = kept.lines
    assert (full.get_ydata()[0], full.get_linestyle()) == (2, "--")
    assert not blocks.lines
    assert kept.get_ylim() == (0, 2.5)
    assert [tick.get_text() for tick in kept.get_yticklabels()] == ["0", "1", "2"]
    assert [tuple(figure.get_size_inches()) for figure in made] == [
        (pytest.approx(5.2), pytest.approx(2.1)),
        (4.0, pytest.approx(3.2)),
        (4.0, pytest.approx(3.2)),
    ]
    figures._draw_bars([0.0] * 20, "", tmp_path / "wide.png")
    assert (tmp_path / "wide.png").read_bytes()[16:20] == (7 * 120 + 60).to_bytes(4), (
        "7.5 inches, 120 dots each"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "2.5"], "--threshold is 2.5, but influence lies between 0 and 2; give a number "),
        (["--threshold", "low"], "argument --threshold: 'low' is neither a number nor 'auto'"),
        (["--budget", "9"], "--budget is 9, but 4 layers of 2 iterations have 8 to keep; give a number from 0 to 8"),
        (["--budget", "2", "--lower-bound"], "--budget and --lower-bound given for the plan; give exactly one of "),
        (["--budget", "2", "--rank-by", "loss"], "--rank-by is 'loss', which is not measured without --ablation; "),
        (["--sequences", "0"], "--sequences is 0, but must be at least 1"),
        (["--sequence-length", "64"], "data.sequence_length is 64, but must not exceed model.max_position_embeddings"),
        (["--sequence-length", "0"], "data.sequence_length is 0, but must be greater than 0"),
        (["--parallel.tensor", "3"], "parallel.tensor is 3, but does not divide model.num_attention_heads = 2"),
        (["--parallel.tensor", "2"], "the number of processes is 1, but must be a multiple of parallel.tensor x "),
        (["--model", "nowhere"], "--model is nowhere, which does not exist; give "),
        (["--data", "nowhere.txt"], "The input nowhere.txt is missing."),
    ],
    ids=str,
)  # fmt: skip
def test_the_tool_refuses(
    flags: list[str],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, said, error = run_tool(
        "--model", str(folders["paper"]), "--output", str(tmp_path / "out"), *flags
    )
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert (status, said) == (2, "")
    assert not (tmp_path / "out").exists()


def test_reduced_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_from_file(folders["paper"] / "config.yaml")
    state = models.load(folders["paper"]).state_dict()
    config.solver.iterations = [2, 0, 2, 1]
    models.save(config, state, tmp_path / "reduced")
    status, _, error = run_tool("--model", str(tmp_path / "reduced"), "--output", str(tmp_path / "out"))
    assert status == 2
    assert error == (
        f"error: --model is {tmp_path / 'reduced'}, which has the iterations [2, 0, 2, 1]: it is already "
        "reduced; give the full model it was made from\n"
    )
