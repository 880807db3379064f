"""The corpora of a run: what is opened, refused, said and recorded; and runs on a blend of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_iiet.config import ConfigError, LoadedConfig, RunConfig, config_from_dict
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.shard_list import write_shards
from megatron_iiet.data.loader.samples import KINDS
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.data.tokenizers.loading import load_tokenizer, tokenizer_digest
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.launch import launch_environment
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.selection import find_candidates
from megatron_iiet.training import pretrain
from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.corpora import (
    contents_of,
    describe_corpora,
    describe_validation,
    doubts_about,
    open_corpora,
)
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.loop import train
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.pretrain import prepare, reconciled_ds_config
from megatron_iiet.training.record import STARTS, read_starts, start_of
from megatron_iiet.training.resume import (
    CONTENTS,
    RULE,
    Resumption,
    check_may_resume,
    check_resumable,
    with_own_split,
)
from megatron_iiet.training.run import Run
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.marks import long_but
from tests.tiny import make_data, save_of, tiny_config, write_shard
from tests.training.bare_run import alone

VOCABULARY = 384
"""Of the tiny model."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three corpora: shard (120 documents), more (60) and held_out (30)."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "more", documents=60, seed=1)
    write_shard(folder / "held_out", documents=30, seed=2)
    return make_data(folder)


@pytest.fixture
def configured(data: dict[str, str], tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on the corpora; ``blend`` is {name: weight}."""
    folder = Path(data["prefix"]).parent

    def make(blend: dict[str, float] | None = None, output: str = "run", **sections: Any) -> RunConfig:
        own = {"tokenizer": data["tokenizer"]}
        if blend is None:
            own["prefix"] = data["prefix"]
        else:
            sections["data"] = {"blend": {str(folder / k): v for k, v in blend.items()}} | sections.get(
                "data", {}
            )
        if "validation_prefix" in sections.get("data", {}):
            sections["data"]["validation_prefix"] = str(folder / sections["data"]["validation_prefix"])
        return tiny_config(own, tmp_path / output, **sections)

    return make


def test_one_prefix_is_a_blend_of_one(configured: Callable[..., RunConfig]) -> None:
    config = configured()
    corpora = open_corpora(config.data, VOCABULARY)
    assert (corpora.prefixes, corpora.names, corpora.weights) == ([config.data.prefix], ["shard"], [1.0])
    n = len(corpora.train[0])
    assert describe_corpora(config, corpora).splitlines() == [
        "data: windows of 16 tokens; 8 steps read",
        f"  {config.data.prefix}: {n} samples, {64 / n:.3g} times (1 of the batches)",
    ]


def test_a_blend_is_described(configured: Callable[..., RunConfig]) -> None:
    config = configured({"shard": 3, "more": 1}, training={"steps": 1600}, data={"documents": "pack"})
    corpora = open_corpora(config.data, VOCABULARY)
    assert corpora.names == ["shard", "more"]
    large, small = map(len, corpora.train)
    lines = describe_corpora(config, corpora).splitlines()
    assert lines[0] == "data: packed samples of 16 tokens; 1600 steps read"
    assert f"/shard: {large} samples, {9600 / large:.3g} times (0.75 of the batches)" in lines[1]
    assert f"shard is read {9600 / large:.1f} times; more than 4 cost quality" in lines[2]
    assert f"/more: {small} samples, {3200 / small:.3g} times (0.25 of the batches)" in lines[3]
    assert "more is read" in lines[4]


def test_four_times_is_not_yet_many(configured: Callable[..., RunConfig]) -> None:
    config = configured()
    corpora = open_corpora(config.data, VOCABULARY)
    config.training.global_batch_size = len(corpora.train[0])
    for steps, lines in ((4, 2), (5, 3)):
        config.training.steps = steps
        assert len(describe_corpora(config, corpora).splitlines()) == lines


def test_a_tokenizer_may_have_no_more_ids_than_the_model(configured: Callable[..., RunConfig]) -> None:
    pretrain.check_tokenizer(configured(model={"vocab_size": 300}))
    with pytest.raises(
        ConfigError, match=r"has 300 ids, but model.vocab_size is 299; set it to at least 300"
    ):
        pretrain.check_tokenizer(configured(model={"vocab_size": 299}))


def test_guidance_and_validation_have_samples_of_their_own(configured: Callable[..., RunConfig]) -> None:
    guidance = {"interval": 4, "samples": 3}
    config = configured(
        guidance=guidance, evaluation={"samples": 5}, solver={"kind": "iiet", "iterations": 1}
    )
    corpora = open_corpora(config.data, VOCABULARY)
    held_out = pretrain.validation_batches(config, corpora, alone(), 5, "first")
    chosen = pretrain.build_callbacks(config, corpora, alone(), held_out)
    assert {each.batches.rule for each in chosen if hasattr(each, "batches")} == {"first"}
    found = {type(each).__name__: each.batches.samples for each in chosen if hasattr(each, "batches")}
    assert found == {"Guidance": 3, "Validation": 5}


def test_validation_on_a_corpus_of_its_own(configured: Callable[..., RunConfig]) -> None:
    """All documents of the others train then."""
    config = configured({"shard": 3, "more": 1}, data={"validation_prefix": "held_out"})
    corpora = open_corpora(config.data, VOCABULARY)
    assert [part.num_tokens for part in corpora.train] == [part.stream.num_tokens for part in corpora.train]
    (held_out,) = corpora.validation
    assert held_out.stream.prefix == config.data.validation_prefix
    assert (held_out.num_tokens, corpora.validation_weights) == (held_out.stream.num_tokens, [1.0])
    assert describe_corpora(config, corpora).splitlines()[-1] == (
        "  all documents of these train: data.split has no effect beside data.validation_prefix"
    )


def test_validation_on_the_blend_and_on_nothing(configured: Callable[..., RunConfig]) -> None:
    corpora = open_corpora(configured({"shard": 3, "more": 1}).data, VOCABULARY)
    assert [part.num_tokens > 0 for part in corpora.validation] == [True, True]
    assert corpora.validation_weights == [3, 1]
    assert [part.start for part in corpora.validation] == [part.stop for part in corpora.train]
    for split, validated in (([1.0, 0.0, 0.0], 0), ([0.9, 0.0, 0.1], 0), ([0.9, 0.1, 0.0], 2)):
        corpora = open_corpora(configured({"shard": 3, "more": 1}, data={"split": split}).data, VOCABULARY)
        assert len(corpora.validation) == len(corpora.validation_weights) == validated


@pytest.mark.parametrize(("rule", "read"), [("spread", [31, 9]), ("first", [10, 9])])
def test_what_is_validated_on_is_described(
    rule: str, read: list[int], configured: Callable[..., RunConfig]
) -> None:
    """A small source never ends the set in silence, and what is lacking is told."""
    corpora = open_corpora(configured({"shard": 1, "more": 1}).data, VOCABULARY)
    for part, length in zip(corpora.validation, (31, 9), strict=True):
        part.stop = part.start + length * part.sequence_length + 1
    config = configured(evaluation={"samples": 64})
    held_out = pretrain.validation_batches(config, corpora, alone(), 64, rule)
    assert held_out is not None
    lines = describe_validation(held_out, 64).splitlines()
    large, small = corpora.prefixes
    assert lines[0] == (
        f"validation: {sum(read)} windows, rule {rule}: {read[0]} of 31 of {large}, {read[1]} of 9 of {small}"
    )
    assert ("the first ones, as this run began" in lines[1]) == (rule == "first")
    assert "warning: evaluation.samples asks for 64; give validation a larger share" in lines[-1]
    assert start_of(alone(), {}, None, held_out)["validation"] == {
        "rule": rule,
        "samples": {large: read[0], small: read[1]},
    }
    few = pretrain.validation_batches(config, corpora, alone(), 8, "spread")
    assert few is not None
    assert describe_validation(few, 8).endswith(f"4 of 31 of {large}, 4 of 9 of {small}")


def test_names_that_are_the_same(tmp_path: Path, data: dict[str, str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "text", documents=20)
    blend = {str(tmp_path / name / "text"): 1.0 for name in ("one", "two")}
    config = tiny_config({"tokenizer": data["tokenizer"]}, tmp_path / "run", data={"blend": blend})
    assert open_corpora(config.data, VOCABULARY).names == list(blend)


@pytest.mark.parametrize("appended", [True, False, None])
@pytest.mark.parametrize("documents", KINDS)
def test_documents_that_nothing_parts(
    documents: str, appended: bool | None, data: dict[str, str], tmp_path: Path
) -> None:
    """By what the list says, or by the last tokens of some documents of a corpus that says nothing."""
    eod = load_tokenizer(data["tokenizer"]).eod_id
    for name, end in (("ended", eod), ("open", 5)):
        with IndexedDatasetWriter(tmp_path / name, 300) as writer:
            for _ in range(100):
                writer.add_document(np.array([7] * 40 + [end]))
            shard = writer.close()
        if appended is not None:
            said = {"digest": tokenizer_digest(data["tokenizer"])}
            info = {"tokenizer": said, "append_eod": appended and name == "ended"}
            write_shards(tmp_path / name, [shard], writer.dtype, info)
    blend = {str(tmp_path / name): 1.0 for name in ("ended", "open")}
    own = {"tokenizer": data["tokenizer"]}
    config = tiny_config(own, tmp_path / "run", data={"blend": blend, "documents": documents})
    told = doubts_about(config.data, open_corpora(config.data, VOCABULARY))
    nameless = [line for line in told if "does not name its tokenizer; that" in line]
    assert len(nameless) == (2 if appended is None else 0)
    open_ended = [
        line.partition(" has ")[0] for line in told if "--append-eod, or set data.documents" in line
    ]
    expected = [str(tmp_path / "open")] if appended is not False else list(blend)
    assert open_ended == (expected if documents == "ignore" else [])
    if documents == "ignore" and appended is None:
        assert f"(32 of 32 looked at do not end with the id {eod})" in told[-1]


def test_a_corpus_of_a_blend_without_a_window_to_validate_on(data: dict[str, str], tmp_path: Path) -> None:
    """The others make up for it; without any the sentence says so."""
    of_repeated(tmp_path / "tiny", 2)
    of_repeated(tmp_path / "large", 400)
    blend = {str(tmp_path / "tiny"): 9.0, str(tmp_path / "large"): 1.0}
    own = {"blend": blend, "split": [0.9, 0.1, 0.0]}
    config = tiny_config({"tokenizer": data["tokenizer"]}, tmp_path / "run", data=own)
    corpora = open_corpora(config.data, VOCABULARY)
    assert [len(part) > 0 for part in corpora.validation] == [False, True]
    batches = ValidationBatches(
        corpora.validation, corpora.validation_weights, samples=7, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    assert batches.counts == [0, 7]
    assert "0 of 0 of" in describe_validation(batches, 7)
    less = replace(
        config.data, blend={str(tmp_path / "tiny"): 1.0, str(of_repeated(tmp_path / "other", 2)): 1.0}
    )
    with pytest.raises(ValueError, match=r"No corpus of data.blend has a window of \d+ tokens in its valid"):
        open_corpora(less, VOCABULARY)


def of_repeated(prefix: Path, documents: int) -> Path:
    """A corpus of documents of 40 tokens."""
    with IndexedDatasetWriter(prefix, 300) as writer:
        for _ in range(documents):
            writer.add_document(np.arange(40))
    return prefix


def test_a_weight_too_small_to_deal(configured: Callable[..., RunConfig]) -> None:
    with pytest.raises(ValueError, match="The weight 1e-07 of the blend is less than 1/100000"):
        open_corpora(configured({"shard": 1, "more": 1e-7}).data, VOCABULARY)


def with_tokenizer(prefix: Path, digest: str) -> Path:
    """A corpus that says which tokenizer made it."""
    with IndexedDatasetWriter(prefix, 96) as writer:
        writer.add_documents(np.arange(4000) % 96, [40] * 100)
        shard = writer.close()
        dtype = writer.dtype
    info = {"tokenizer": {"file": "other.model", "digest": digest, "vocab_size": 96, "eod_id": 2}}
    write_shards(prefix, [shard], dtype, info)
    return prefix


@pytest.mark.parametrize("place", ["prefix", "blend", "validation_prefix"])
def test_another_tokenizer(place: str, data: dict[str, str], tmp_path: Path) -> None:
    """One that made a corpus must be the one of the run; a corpus that does not say is believed."""
    right = str(with_tokenizer(tmp_path / "right", tokenizer_digest(data["tokenizer"])))
    wrong = str(with_tokenizer(tmp_path / "wrong", "ab" * 16))
    settings: dict[str, dict[str, Any]] = {
        "prefix": {"prefix": wrong},
        "blend": {"blend": {data["prefix"]: 1.0, right: 1.0, wrong: 1.0}},
        "validation_prefix": {"prefix": right, "validation_prefix": wrong},
    }
    config = tiny_config({"tokenizer": data["tokenizer"]}, tmp_path / "run", data=settings[place])
    with pytest.raises(ConfigError) as caught:
        open_corpora(config.data, VOCABULARY)
    assert str(caught.value) == (
        f"the corpus {wrong} was made with the tokenizer other.model (digest {'ab' * 16}), but "
        f"data.tokenizer is {data['tokenizer']} (digest {tokenizer_digest(data['tokenizer'])}); give the "
        "tokenizer that made the corpus, or make it again with this one"
    )
    fine = tiny_config({"tokenizer": data["tokenizer"]}, tmp_path / "run", data={"prefix": right})
    assert len(open_corpora(fine.data, VOCABULARY).train[0]) > 0


@pytest.mark.parametrize(
    ("blend", "sections", "message"),
    [
        (
            {"shard": 2, "more": 1},
            {"data": {"documents": "reset"}},
            "data.documents is ignore there and reset here",
        ),
        (
            {"shard": 2, "more": 1},
            {"data": {"sequence_length": 8}},
            "data.sequence_length is 16 there and 8 here",
        ),
        (
            {"shard": 2, "more": 1.5},
            {},
            r"data.blend is \[2.0, 1.0\] there and \[2.0, 1.5\] here",
        ),
        (
            {"more": 1, "shard": 2},
            {},
            r"data.blend is \[2.0, 1.0\] there and \[1.0, 2.0\] here; data.blend is .*/shard with [\d,]+ "
            r"tokens there and .*/more with [\d,]+ tokens here.*",
        ),
        (None, {}, r"data.blend is \[2.0, 1.0\] there and \[1.0\] here"),
        ({"shard": 4, "more": 2}, {}, None),
        (
            {"shard": 2, "held_out": 1},
            {},
            r"data.blend is .*/more with [\d,]+ tokens there and .*/held_out with [\d,]+ tokens here",
        ),
    ],
)
def test_resuming_in_another_order_of_samples(
    blend: dict[str, float] | None,
    sections: dict[str, Any],
    message: str | None,
    configured: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    (tmp_path / "step").mkdir()
    before, config = configured({"shard": 2, "more": 1}), configured(blend, **sections)
    contents = contents_of(before.data, open_corpora(before.data, VOCABULARY))
    state = checkpoint.TrainState(5, {"samples": 40, "windows": [1, 2], CONTENTS: contents}, {})
    checkpoint.write_metadata(tmp_path / "step", before, state, save_of(before, state))
    assert checkpoint.read_state(tmp_path / "step") == state
    contents = contents_of(config.data, open_corpora(config.data, VOCABULARY))
    if message is None:
        assert not check_resumable(tmp_path / "step", config, contents).changed
        return
    with pytest.raises(
        ConfigError, match=rf"samples there are others or in another order \({message}\); restore"
    ):
        check_resumable(tmp_path / "step", config, contents)


def test_another_corpus_to_validate_on_is_told_by_its_key(
    configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "step").mkdir()
    before, config = (configured(data={"validation_prefix": name}) for name in ("held_out", "more"))
    there, here = (contents_of(c.data, open_corpora(c.data, VOCABULARY)) for c in (before, config))
    state = checkpoint.TrainState(5, {"samples": 40, "windows": [1], CONTENTS: there}, {})
    checkpoint.write_metadata(tmp_path / "step", before, state, save_of(before, state))
    assert not check_resumable(tmp_path / "step", before, there).changed
    found = r"\(data\.validation_prefix is .*/held_out with [\d,]+ tokens there and .*/more with"
    with pytest.raises(ConfigError, match=found):
        check_resumable(tmp_path / "step", config, here)


@pytest.mark.parametrize(
    ("contents", "rule"),
    [({}, "first"), ({CONTENTS: None}, "first"), ({CONTENTS: {RULE: "spread"}}, "spread")],
)
def test_a_run_keeps_the_rule_of_its_windows(contents: dict[str, Any], rule: str) -> None:
    """Checkpoints of before there were two do not say it."""
    state = checkpoint.TrainState(5, {"samples": 40, "windows": [1], **contents}, {})
    assert Resumption(Path(), state).validation_rule == rule


@pytest.mark.parametrize(
    ("there", "here", "accept", "kept"),
    [
        ([0.8, 0.1, 0.1], [0.8, 0.2, 0.0], (), True),  # as where the default had a test share
        ([0.8, 0.1, 0.1], [0.8, 0.2, 0.0], ("data.split",), False),
        ([0.8, 0.1, 0.1], [0.7, 0.3, 0.0], (), False),
        ([0.8, 0.1, 0.1], [0.8, 0.15, 0.05], (), False),
        ([0.8, 0.2, 0.0], [0.8, 0.1, 0.1], (), False),
        ([0.8, 0.2, 0.0], [0.8, 0.2, 0.0], (), False),
    ],
)
def test_a_run_keeps_its_own_test_share(
    there: list[float],
    here: list[float],
    accept: Sequence[str],
    kept: bool,
    configured: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    """Nothing reads it, and without it validation would be over other documents."""
    (tmp_path / "step").mkdir()
    before, config = (configured(data={"split": split}) for split in (there, here))
    state = checkpoint.TrainState(5, {"samples": 40, "windows": [1]}, {})
    checkpoint.write_metadata(tmp_path / "step", before, state, save_of(before, state))
    found, told = with_own_split(config, tmp_path / "step", accept)
    assert found.data.split == (there if kept else here)
    assert bool(told) == kept
    assert not told or told.startswith("data.split stays [0.8, 0.1, 0.1], as this run began")


def test_a_run_that_must_not_be_resumed(configured: Callable[..., RunConfig]) -> None:
    """Whether its checkpoint is whole or not."""
    config = configured(checkpoint={"resume": False})
    check_may_resume(config, find_candidates(config.output_dir))
    folder = checkpoint.checkpoints_folder(config.output_dir)
    (folder / "step_00000004").mkdir(parents=True)
    (folder / "step_00000004" / "state.json").write_text("{}")
    (folder / "latest").write_text("step_00000004\n")
    with pytest.raises(ConfigError, match=r"already holds checkpoints and checkpoint\.resume is false"):
        check_may_resume(config, find_candidates(config.output_dir))


def test_a_checkpoint_of_the_format_before(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    state = checkpoint.TrainState(5, {"epoch": 1, "sample": 40}, {})
    checkpoint.write_metadata(tmp_path / "step", configured(), state, save_of(configured(), state))
    path = tmp_path / "step" / "state.json"
    later = ("save", "config", "digest", "plan")
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in later}
    path.write_text(json.dumps(kept | {"format": 2}))
    assert checkpoint.read_state(tmp_path / "step") == state


def curve(folder: Path) -> dict[int, tuple[str, ...]]:
    """Loss, gradient norm and validation loss of every step, in hexadecimal."""
    keys = ("loss", "grad_norm", "validation_loss")
    return {step: tuple(v[k].hex() for k in keys if k in v) for step, v in read_log(folder).items()}


@pytest.mark.slow
@pytest.mark.parametrize("documents", long_but(["pack", "ignore", "reset"], "pack"))
def test_a_blended_run_resumes_to_the_bit(
    documents: str, configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Two ranks; stopped after 3 of 6 steps. The epochs read so far are in the log."""
    blend, own = {"shard": 0.7, "more": 0.3}, {"documents": documents}
    whole = configured(blend, "whole", data=dict(own), training={"steps": 6})
    run_ranks(pretrain_rank, 2, as_data(whole), ds_json(tmp_path, 1))
    for stop in (3, None):
        part = configured(blend, "parts", data=dict(own), training={"steps": 6, "stop_after": stop})
        run_ranks(pretrain_rank, 2, as_data(part), ds_json(tmp_path, 1))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    parts = read_log(tmp_path / "parts")
    assert all(
        parts[step]["validation_rule"] == 1 and parts[step]["validation_samples"] == 8 for step in (0, 6)
    )
    starts = read_starts(tmp_path / "parts" / STARTS)[0]
    assert [start["validation"]["rule"] for start in starts] == ["spread"] * 2
    lengths = [len(part) for part in open_corpora(whole.data, VOCABULARY).train]
    log = read_log(tmp_path / "whole")
    assert log[6]["epoch/shard"] == 34 / lengths[0]  # of 48 samples
    assert log[6]["epoch/more"] == 14 / lengths[1]


@pytest.mark.slow
def test_resuming_on_other_data(configured: Callable[..., RunConfig], tmp_path: Path) -> None:
    first = configured({"shard": 2, "more": 1}, training={"stop_after": 1})
    run_ranks(pretrain_rank, 1, as_data(first), ds_json(tmp_path, 1))
    other = configured({"shard": 2, "held_out": 1})
    with pytest.raises(RanksFailedError, match=r"ConfigError: .*data\.blend is .*more with .* tokens there"):
        run_ranks(pretrain_rank, 1, as_data(other), ds_json(tmp_path, 1))
    with pytest.raises(
        RanksFailedError, match=r"ValueError: The checkpoint was trained on .* windows, but the"
    ):
        run_ranks(pretrain_rank, 1, as_data(other), ds_json(tmp_path, 1), ["data.blend"])


class Tear(Callback):
    """Cuts a file short after the third step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step(self, run: Run, result: StepResult) -> None:
        if run.step == 3:
            os.truncate(self.file, 1000)


def pretrain_and_tear(config: dict[str, Any], ds_path: Path, file: Path) -> None:
    loaded = LoadedConfig(config=config_from_dict(config), ds_config_path=ds_path)
    ds_config = reconciled_ds_config(loaded, launch_environment().world_size)
    with ParallelContext.start(loaded.config.parallel) as context:
        run, callbacks = prepare(loaded.config, ds_config, context)
        train(run, [*callbacks, Tear(file)])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_while_reading_ends_the_run(
    threads: int, data: dict[str, str], configured: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """With the sample and the corpus by name; no rank waits for ever."""
    write_shard(tmp_path / "torn", documents=400)
    paths = {"prefix": str(tmp_path / "torn"), "tokenizer": data["tokenizer"], "num_workers": threads}
    config = tiny_config(paths, tmp_path / "run", training={"steps": 500})
    message = r"RuntimeError: sample \d+ \(window \d+ of .*torn\) could not be read: .*torn\.bin"
    with pytest.raises(RanksFailedError, match=message):
        run_ranks(pretrain_and_tear, 2, as_data(config), ds_json(tmp_path, 1), tmp_path / "torn.bin")
    # The main rank may be ended before it writes step 3, by what the other one read after its own.
    assert 2 <= max(read_log(tmp_path / "run")) < 30


LAYOUTS = [{}, {"tensor": 2}, {"pipeline": 2}, {"data": 2}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "where"),
    [
        *[(layout, "prefix") for layout in LAYOUTS],
        *long_but(
            [(layout, "validation_prefix") for layout in LAYOUTS], ({"tensor": 2}, "validation_prefix")
        ),
    ],
    ids=str,
)
def test_an_id_outside_the_vocabulary_ends_the_run(
    layout: dict[str, int], where: str, data: dict[str, str], tmp_path: Path
) -> None:
    """In every layout, in training and in validation, also where the vocabulary's padding has a row for it
    (96 ids are padded to 128) or where no rank of a tensor-parallel group does."""
    grid = {size: ranks for size, ranks in layout.items() if size != "data"}
    for document, id_ in ((3, 97), (5, 200)):
        prefix = tmp_path / f"foreign_{id_}"
        with IndexedDatasetWriter(prefix, 300) as writer:
            for number in range(8):
                writer.add_document(np.full(40, id_ if number == document else 7))
        config = tiny_config(
            data | {where: str(prefix)},
            tmp_path / f"run_{id_}",
            model={"vocab_size": 96},
            evaluation={"samples": 16},
            parallel=grid,
        )
        message = (
            rf"UnknownTokenError: the corpus .*foreign_{id_} holds the id {id_} \(document {document}, its "
            r"token \d+\), but model.vocab_size is 96"
        )
        with pytest.raises(RanksFailedError, match=message):
            run_ranks(
                pretrain_rank_of_any_vocabulary, 2 if layout else 1, as_data(config), ds_json(tmp_path, 1)
            )


def pretrain_rank_of_any_vocabulary(config: dict[str, Any], ds_path: Path) -> None:
    """A run whose tokenizer has more ids than the model, which the start would refuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "check_tokenizer", lambda config: None)
        pretrain_rank(config, ds_path)
