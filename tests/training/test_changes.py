"""What a change of each key means to a run that has checkpoints, and what is compared."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.config import ConfigError, RunConfig, config_from_dict, config_to_dict
from megatron_iiet.config.changes import Change, change_of_field, key
from megatron_iiet.config.keys import key_changes, key_types
from megatron_iiet.config.kinds import own_keys
from megatron_iiet.config.optimizers import OPTIMIZERS
from megatron_iiet.config.solvers import IIET, SOLVERS, PCformer, ReleasedIIET, SolverConfig
from megatron_iiet.storage import checkpoint
from megatron_iiet.storage.selection import find_candidates
from megatron_iiet.training.resume import (
    CONTENTS,
    check_may_resume,
    check_resumable,
    differences,
    nothing_to_do,
)
from tests.config.resume_table import with_table
from tests.tiny import save_of, tiny_config

OTHER: dict[str, Any] = {
    "output_dir": "elsewhere",
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 64,
    "model.num_layers": 4,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 1,
    "model.head_dim": 8,
    "model.attention_bias": "qkv",
    "model.qk_norm": True,
    "model.vocab_size": 400,
    "model.vocab_multiple": 64,
    "model.max_position_embeddings": 64,
    "model.tie_embeddings": False,
    "model.embedding_scale": 1.0,
    "model.rms_norm_eps": 1e-5,
    "model.rotary_base": 5e5,
    "model.rope_scaling": {"kind": "linear", "factor": 2.0},
    "model.init_std": 0.03,
    "solver.kind": "pcformer",
    "solver.variant": "released",
    "solver.iterations": 2,
    "solver.merge": False,
    "solver.predictor": "euler",
    "solver.coefficient_init": "average",
    "solver.history_norm": "none",
    "solver.damping": 0.5,
    "solver.readout": "shared",
    "solver.output_norm": "layer",
    "solver.stage_coefficients": "fixed",
    "solver.predictor_order": 4,
    "solver.repeats": 2,
    "solver.key_values": "first",
    "solver.schedule": [(0.5, 0), (0.5, 1)],
    "parallel.tensor": 2,
    "parallel.pipeline": 2,
    "parallel.sequence": True,
    "parallel.timeouts": {"step": 60.0},
    "data.prefix": "moved",
    "data.blend": {"one": 1.0, "two": 2.0},
    "data.validation_prefix": "held_out",
    "data.tokenizer": "moved.model",
    "data.text_follows": "bos",
    "data.sequence_length": 8,
    "data.documents": "reset",
    "data.split": [0.9, 0.1, 0.0],
    "data.skip_steps": [1, [3, 4]],
    "data.num_workers": 3,
    "data.timeout": 1.0,
    "optimizer.kind": "momentum",
    "optimizer.implementation": "torch",
    "optimizer.momentum": 0.5,
    "optimizer.newton_schulz_steps": 3,
    "optimizer.adjust_lr": "original",
    "optimizer.matrix_lr_ratio": 2.0,
    "optimizer.lr": 1.0,
    "optimizer.min_lr_ratio": 0.5,
    "optimizer.warmup_fraction": 0.5,
    "optimizer.schedule": "constant",
    "optimizer.decay_fraction": 0.5,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.eps": 1e-4,
    "optimizer.weight_decay": 0.5,
    "optimizer.gradient_clipping": 0.5,
    "training.steps": 16,
    "training.global_batch_size": 16,
    "training.micro_batch_size": 1,
    "training.precision": "bf16",
    "training.fp8": "tensorwise",
    "training.recompute": "layer",
    "training.compile": "layer",
    "training.seed": 5,
    "training.initial_weights": "runs/other",
    "training.stop_after": 5,
    "training.stop_signals": ["USR1"],
    "training.max_wall_time": "1:00:00",
    "evaluation.interval": 5,
    "evaluation.samples": 5,
    "evaluation.tasks": ["piqa"],
    "evaluation.tasks_interval": 5,
    "evaluation.tasks_limit": 5,
    "evaluation.tasks_data_dir": "tasks",
    "evaluation.tasks_include_path": "tasks",
    "checkpoint.interval": 5,
    "checkpoint.keep": 5,
    "checkpoint.keep_every": 5,
    "checkpoint.mirror": "file:///elsewhere",
    "checkpoint.mode": "sync",
    "checkpoint.resume": False,
    "logging.interval": 5,
    "logging.tensorboard": False,
    "logging.solver_interval": 5,
    "logging.peak_tflops": 5.0,
    "logging.profile": [2, 3],
    "guards.nonfinite": "skip",
    "guards.spike": "rewind",
    "guards.window": 5,
    "guards.deviations": 5.0,
    "guards.max_skips": 5,
    "guards.replicas": 5,
    "ops.backend": "reference",
    "ops.history_gradient": "per_edge",
    "guidance.interval": 5,
    "guidance.budget": 0.9,
    "guidance.start": 0.5,
    "guidance.samples": 5,
    "guidance.decay": 0.1,
    "guidance.inertia": 0.1,
    "distillation.teacher": "runs/other",
    "debug.inject": ["raise@step=9"],
    "distillation.alpha": 0.5,
    "distillation.beta": 0.5,
    "distillation.temperature": 2.0,
}
"""Another value for every key than :func:`everything_in_force` has."""


def solver_with(name: str) -> SolverConfig:
    """A solver that has the key ``name``, the default one if that does."""
    return next(solver for solver in (IIET, *SOLVERS) if name in own_keys(solver))()


def everything_in_force(name: str = "solver.iterations") -> RunConfig:
    """A configuration in which every key means something, ``name`` among them, though they could not all be
    trained together."""
    config = tiny_config({"prefix": "corpus"}, Path("runs/one"), model={"num_key_value_heads": 2})
    config.model.embedding_scale = 50.0
    section, _, leaf = name.rpartition(".")
    if section == "solver" and leaf not in ("kind", "variant"):
        config.solver = solver_with(leaf)
    if section == "optimizer":
        config.optimizer = next(each for each in OPTIMIZERS if leaf == "kind" or leaf in own_keys(each))()
    config.guidance.interval = 2
    config.guards.spike = "skip"
    config.distillation.teacher = "runs/teacher"
    return config


def with_value(config: RunConfig, name: str, value: Any) -> RunConfig:
    changed = copy.deepcopy(config)
    *section, leaf = name.split(".")
    if name in ("solver.kind", "solver.variant"):  # with what null means held
        changed.solver = (
            PCformer() if leaf == "kind" else ReleasedIIET(coefficient_init="identity", iterations=1)
        )
        return changed
    setattr(getattr(changed, section[0]) if section else changed, leaf, value)
    return changed


def test_every_key_is_in_the_table_and_has_a_class() -> None:
    assert set(OTHER) == set(key_types()) == set(key_changes())


@pytest.mark.parametrize("name", OTHER)
def test_a_change_of_one_key(name: str) -> None:
    """Found under its own name alone and of its class, or not at all if it is free."""
    before = everything_in_force(name)
    found = differences(before, with_value(before, name, OTHER[name]), step=4)
    expected = [] if key_changes()[name] is Change.FREE else [(name, key_changes()[name])]
    assert [(difference.key, difference.change) for difference in found] == expected
    assert differences(before, before, step=4) == []


def test_a_key_without_a_class_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="a key needs a class of change"):
        key(3)
    section = make_dataclass("Section", [("forgotten", int, 3), ("fine", int, key(3, Change.FREE))])
    assert change_of_field(section.__dataclass_fields__["fine"]) is Change.FREE
    with pytest.raises(TypeError, match="the key forgotten has no class of change"):
        change_of_field(section.__dataclass_fields__["forgotten"])


def test_the_table_of_the_documentation_is_that_of_the_classes() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "resume.md"
    text = document.read_text()
    refresh = "python -m tests.config.resume_table docs/resume.md"
    assert refresh in text
    assert text == with_table(text), f"the classes of keys have changed; run `{refresh}`"


ITERATING = {"kind": "iiet", "iterations": 3}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"model": {"num_key_value_heads": 2}}),
        ({}, {"model": {"embedding_scale": 50.0}}),
        ({"model": {"init_std": 0.02, "embedding_scale": 50.0}}, {}),
        ({}, {"solver": {"coefficient_init": "identity"}}),
        ({"solver": ITERATING}, {"solver": {**ITERATING, "iterations": [3, 3, 3]}}),
        ({"solver": ITERATING}, {"solver": {**ITERATING, "schedule": [[1.0, 3]]}}),
        (
            {"solver": {**ITERATING, "schedule": [[0.5, 0], [0.5, 3]]}},
            {"solver": {**ITERATING, "schedule": [[0.5, [0, 0, 0]], [0.5, 3]]}},
        ),
        ({"data": {"blend": {"a": 2, "b": 1}}}, {"data": {"blend": {"elsewhere/a": 4, "elsewhere/b": 2}}}),
        ({"data": {"prefix": "a"}}, {"data": {"blend": {"a": 3}}}),
        ({"data": {"validation_prefix": "v"}}, {"data": {"validation_prefix": "w", "split": [0.5, 0.5, 0]}}),
        ({}, {"guidance": {"budget": 0.9}, "distillation": {"alpha": 5.0}}),
        ({"training": {"initial_weights": "runs/a"}}, {"training": {"initial_weights": "runs/./a/"}}),
    ],
    ids=str,
)
def test_other_words_for_the_same_are_no_change(before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = (tiny_config({}, Path("run"), **sections) for sections in (before, now))
    assert differences(old, new, 4) == []


def told(before: dict[str, Any], now: dict[str, Any], step: int = 4) -> list[str]:
    old, new = (tiny_config({}, Path("run"), **sections) for sections in (before, now))
    return [f"{one.change.name} {one}{one.note}" for one in differences(old, new, step)]


def test_what_is_told() -> None:
    other_kind = {"kind": "pcformer", "predictor_order": 4, "key_values": "first"}
    assert told({"solver": ITERATING}, {"solver": other_kind}) == ["FUNCTION solver.kind: iiet → pcformer"]
    assert told({}, {"model": {"init_std": 0.04}}) == [
        "FUNCTION model.embedding_scale: 50.0 → 25.0",
        "COURSE model.init_std: 0.02 → 0.04",
    ]
    assert told({}, {"guidance": {"interval": 2, "budget": 0.9}}) == ["FUNCTION guidance.interval: 0 → 2"]
    assert told({}, {"data": {"blend": {"a": 2, "b": 1}}}) == ["ORDER data.blend: [1.0] → [2.0, 1.0]"]


def test_steps_ahead_may_be_left_out_and_no_longer_left_out() -> None:
    def skipping(*steps: int | list[int]) -> dict[str, Any]:
        return {"data": {"skip_steps": list(steps)}}

    assert told(skipping(3, [6, 7]), skipping([3, 3], 8)) == [
        "COURSE data.skip_steps: [3, [6, 7]] → [[3, 3], 8]"
    ]
    note = ", which differ in step 3 of the 4 that are done"
    assert told(skipping(3), skipping()) == [f"ORDER data.skip_steps: [3] → []{note}"]
    assert told(skipping(), skipping([3, 5])) == [f"ORDER data.skip_steps: [] → [[3, 5]]{note}"]
    at_the_border = "ORDER data.skip_steps: {}, which differ in step 4 of the 4 that are done"
    assert told(skipping(), skipping(4)) == [at_the_border.format("[] → [4]")]
    assert told(skipping(4, 8), skipping(8)) == [at_the_border.format("[4, 8] → [8]")]
    assert told(skipping(), skipping(5)) == ["COURSE data.skip_steps: [] → [5]"]
    assert told(skipping([2, 4]), skipping(2, 3, [4, 4])) == []


STAGED = {**ITERATING, "schedule": [[0.75, 0], [0.25, 3]]}


@pytest.mark.parametrize(
    ("step", "steps", "note"),
    [
        (8, 16, ", which moves step 8 into another stage, from r = 3 to r = 0"),
        (8, 10, None),  # 7.5 of 10 is the border
        (4, 16, None),
        (4, 5, ", which moves step 4 into another stage, from r = 0 to r = 3"),
    ],
)
def test_steps_that_move_the_present_one_into_another_stage(step: int, steps: int, note: str | None) -> None:
    sections: dict[str, Any] = {"solver": STAGED}
    found = told(sections, {**sections, "training": {"steps": steps}}, step)
    change = "COURSE" if note is None else "FUNCTION"
    assert found == [f"{change} training.steps: 8 → {steps}{note or ''}"]
    assert told({}, {"training": {"steps": steps}}, step) == [f"COURSE training.steps: 8 → {steps}"]


# --- what is refused, accepted and left to do ---

HELD = {"tokens": 1000, "documents": 10, "sampled": "ab" * 16}
CONTENT = {"train": [HELD], "validation": None, "tokenizer": "cd" * 16, "teacher": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of :func:`tiny_config` after 4 of 8 steps."""
    folder = tmp_path / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    layout = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1}
    state = checkpoint.TrainState(4, {"samples": 32, "windows": [9], CONTENTS: CONTENT}, layout)
    config = tiny_config({"prefix": "a"}, tmp_path)
    checkpoint.write_metadata(folder, config, state, save_of(config, state))
    (folder.parent / "latest").write_text(folder.name)
    return folder


def test_the_refusal_names_all_of_it_and_both_ways_on(saved: Path, tmp_path: Path) -> None:
    solver = {"iterations": 0, "key_values": "first"}
    config = tiny_config(
        {"prefix": "b"}, tmp_path, solver=solver, training={"seed": 9}, optimizer={"lr": 1.0}
    )
    content = {**CONTENT, "train": [{**HELD, "sampled": "ef" * 16}]}
    with pytest.raises(ConfigError) as caught:
        check_resumable(saved, config, content, ["solver.iterations"])
    assert str(caught.value) == (
        f"checkpoint {saved} does not fit: the parameters there compute something else (solver.key_values is "
        "every there and first here), and samples there are others or in another order (training.seed is "
        "1234 there and 9 here; data.prefix is a with tokens of digest abababab there and b with tokens of "
        f"digest efefefef here); restore what it was made with, start anew from its weights with "
        f"--training.initial_weights {tmp_path} and another output_dir, or, where you mean it, add "
        "--checkpoint.accept_changes "
        "solver.key_values,training.seed,data.prefix to this one start"
    )
    accept = ["solver.key_values", "training.seed", "data.prefix", "solver.iterations", "model.rotary_base"]
    found = check_resumable(saved, config, content, accept)
    assert [str(difference) for difference in found.changed] == ["optimizer.lr: 0.01 → 1.0"]
    assert [difference.as_data() for difference in found.accepted] == [
        {"key": "solver.key_values", "old": "every", "new": "first"},
        {"key": "solver.iterations", "old": 1, "new": 0},
        {"key": "training.seed", "old": 1234, "new": 9},
        {
            "key": "data.prefix",
            "old": "a with tokens of digest abababab",
            "new": "b with tokens of digest efefefef",
        },
    ]
    assert found.describe().splitlines()[-1] == (
        "  --checkpoint.accept_changes names model.rotary_base, which needs none of it: it has not changed, "
        "or may"
    )


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"tokens": 999}, "1,000 tokens there"),
        ({"documents": 9}, "10 documents there"),
        ({"sampled": "0"}, "tokens of digest abababab there"),
        ({"listed": "0"}, None),  # a list made since of the same pair
    ],
)
def test_a_corpus_is_known_by_what_it_holds(
    held: dict[str, Any], told: str | None, saved: Path, tmp_path: Path
) -> None:
    config = tiny_config({"prefix": "moved/a"}, tmp_path)
    content = {**CONTENT, "train": [{**HELD, **held}]}
    if told is None:
        assert check_resumable(saved, config, content).describe() == f"resuming from {saved}"
        return
    with pytest.raises(ConfigError, match=told):
        check_resumable(saved, config, content)


def test_another_tokenizer_is_refused_and_a_moved_one_is_not(saved: Path, tmp_path: Path) -> None:
    config = tiny_config({"prefix": "a", "tokenizer": "other.model"}, tmp_path)
    assert not check_resumable(saved, config, CONTENT).changed
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer is  of digest cdcdcdcd there and other\.model of"
    ):
        check_resumable(saved, config, {**CONTENT, "tokenizer": "0"})


@pytest.mark.parametrize("name", ["tokenizer", "teacher"])
@pytest.mark.parametrize(("there", "here"), [(None, "ef" * 16), ("ef" * 16, None), (None, None)])
def test_what_one_side_does_not_know_is_no_difference(
    name: str, there: str | None, here: str | None, saved: Path, tmp_path: Path
) -> None:
    config = tiny_config({"prefix": "a"}, tmp_path)
    state = checkpoint.read_state(saved)
    state.data[CONTENTS] = {**CONTENT, name: there}
    checkpoint.write_metadata(saved, config, state, save_of(config, state))
    found = check_resumable(saved, config, {**CONTENT, name: here})
    assert (found.changed, found.accepted, found.notes) == ([], [], [])


def test_a_run_that_must_not_be_resumed_says_so(saved: Path, tmp_path: Path) -> None:
    """And one without checkpoints starts from scratch, whatever it may."""
    config = tiny_config({"prefix": "a"}, tmp_path, checkpoint={"resume": False})
    with pytest.raises(
        ConfigError, match=r"already holds checkpoint step_00000004 and checkpoint\.resume is"
    ):
        check_may_resume(config, find_candidates(config.output_dir))
    fresh = tiny_config({"prefix": "a"}, tmp_path / "fresh", checkpoint={"resume": False})
    check_may_resume(fresh, find_candidates(fresh.output_dir))
    config.checkpoint.resume = True
    check_may_resume(config, find_candidates(config.output_dir))
    found = check_resumable(saved, config, CONTENT)
    assert (found.folder, found.state.step, found.notes) == (saved, 4, [])
    config.training.steps = 4
    assert nothing_to_do(config, 4).startswith("complete: 4 of 4 steps")
    assert not nothing_to_do(config, 3)


def test_a_checkpoint_that_does_not_say_what_its_corpora_held(saved: Path, tmp_path: Path) -> None:
    """As formats up to 4 were written before; and a state with it is read as format 4."""
    state = checkpoint.read_state(saved)
    config = config_from_dict(config_to_dict(tiny_config({"prefix": "b"}, tmp_path)))
    del state.data[CONTENTS]
    checkpoint.write_metadata(saved, config, state, save_of(config, state))
    assert check_resumable(saved, config, CONTENT).describe() == (
        f"resuming from {saved}\n"
        "  the checkpoint does not say what its corpora held; they are taken to be the same"
    )


@pytest.mark.parametrize(
    ("step", "sections", "message"),
    [
        (8, {}, "complete: 8 of 8 steps; raise training.steps or choose another output_dir"),
        (9, {}, "complete: 9 of 8 steps; raise training.steps or choose another output_dir"),
        (
            8,
            {"solver": STAGED},
            "complete: 8 of 8 steps; to go on from here, give --training.initial_weights run and another "
            "output_dir",
        ),
        (
            4,
            {"training": {"stop_after": 4}},
            "complete up to training.stop_after = 4: 4 of 8 steps; raise it, or set it to null to go on to "
            "the end",
        ),
        (7, {}, None),
        (3, {"training": {"stop_after": 4}}, None),
    ],
)
def test_nothing_to_do(step: int, sections: dict[str, Any], message: str | None) -> None:
    config = tiny_config({}, Path("run"), **sections)
    assert nothing_to_do(config, step) == (message or "")


# --- other models, by what they compute ---


def with_state(saved: Path, config: RunConfig, **contents: str | None) -> None:
    """Write the checkpoint anew as one of ``config``, with more that it says of other models."""
    state = checkpoint.read_state(saved)
    state.data[CONTENTS] = CONTENT | contents
    checkpoint.write_metadata(saved, config, state, save_of(config, state))


OTHER_MODELS = {"training.initial_weights": "initial_weights", "distillation.teacher": "teacher"}


def naming(key: str, path: Path | str, folder: Path, **training: Any) -> RunConfig:
    config = tiny_config({"prefix": "a"}, folder, training=training)
    return with_value(config, key, str(path))


@pytest.mark.slow
@pytest.mark.parametrize("key", OTHER_MODELS)
def test_a_model_is_known_by_what_it_computes(key: str, saved: Path, tmp_path: Path) -> None:
    """And by its path, however that is written, where the checkpoint does not say more."""
    one, name = "ab" * 16, OTHER_MODELS[key]
    (tmp_path / "link").symlink_to("one")
    with_state(saved, naming(key, "one", tmp_path))
    for spelled in ("one", os.path.abspath("one"), "./one/"):
        assert not check_resumable(saved, naming(key, spelled, tmp_path), CONTENT | {name: one}).changed
    with pytest.raises(ConfigError, match=rf"{key} is one there and two here"):
        check_resumable(saved, naming(key, "two", tmp_path), CONTENT | {name: one})
    with_state(saved, naming(key, tmp_path / "one", tmp_path))
    assert not check_resumable(saved, naming(key, tmp_path / "link", tmp_path), CONTENT).changed

    with_state(saved, naming(key, "one", tmp_path), **{name: one})
    found = check_resumable(saved, naming(key, "two", tmp_path), CONTENT | {name: one})
    assert found.describe() == f"resuming from {saved}"
    message = rf"{key} is one of digest abababab there and one of digest cdcdcdcd here\)"
    with pytest.raises(ConfigError, match=message):
        check_resumable(saved, naming(key, "one", tmp_path), CONTENT | {name: "cd" * 16})
    with pytest.raises(ConfigError, match=rf"{key} is one there and  here"):
        check_resumable(saved, naming(key, "", tmp_path), CONTENT)


def test_initial_weights_may_be_gone(saved: Path, tmp_path: Path) -> None:
    key = "training.initial_weights"
    with_state(saved, naming(key, "one", tmp_path), initial_weights="ab" * 16)
    assert check_resumable(saved, naming(key, "gone", tmp_path), CONTENT).notes == [
        "training.initial_weights gone holds no model now; only step 0 needed it"
    ]


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_where_nothing_is_left_no_model_matters(key: str, saved: Path, tmp_path: Path) -> None:
    with_state(saved, naming(key, "one", tmp_path, steps=4))
    for path, refused in (("two", False), ("", True)):
        config = naming(key, path, tmp_path, steps=4)
        with pytest.raises(ConfigError) if refused else nullcontext():
            assert check_resumable(saved, config, CONTENT).describe() == f"resuming from {saved}"


# --- states without a digest ---


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state["data"].update(samples=-5), r"data\.samples is -5"),
        (lambda state: state["data"].update(samples=float("nan")), r"data\.samples is nan"),
        (lambda state: state["data"].update(samples=2**63), r"data\.samples is 9223372036854775808"),
        (lambda state: state["data"].pop("samples"), r"data\.samples is missing"),
        (lambda state: state["data"].update(windows=[9, "x"]), r"data\.windows is 'x'"),
        (lambda state: state["data"].update(contents=[]), r"data\.contents is \[\]"),
        (lambda state: state["data"]["contents"].update(train=None), r"data\.contents\.train is missing"),
        (lambda state: state["data"]["contents"]["train"][0].update(tokens="1"), r"train\.tokens is '1'"),
        (lambda state: state["data"]["contents"].update(teacher=7), r"contents\.teacher is 7"),
        (lambda state: state["layout"].pop("zero_stage"), r"layout\.zero_stage is missing"),
        (lambda state: state.update(step=-4), "step is -4"),
    ],
)
@pytest.mark.parametrize("version", [2, 3, 4])
def test_an_edited_state_of_an_older_format(
    version: int, edit: Callable[[dict[str, Any]], object], message: str, saved: Path, tmp_path: Path
) -> None:
    """Which has no digest to tell; unedited it is read."""
    path = saved / "state.json"
    state = json.loads(path.read_text()) | {"format": version}
    for later in ("save", "config", "digest", *(["plan"] if version < 4 else [])):
        del state[later]
    config = tiny_config({"prefix": "a"}, tmp_path)
    path.write_text(json.dumps(state))
    assert check_resumable(saved, config, CONTENT).state.step == 4
    edit(state)
    path.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=rf"^{path} is damaged: [\w.]*{message}; copy the whole checkpoint"):
        check_resumable(saved, config, CONTENT)
