"""Evaluation tasks on our models: the numbers of the harness's own model class, and of loops written here."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from megatron_iiet import models
from megatron_iiet.config import RunConfig, config_from_dict
from megatron_iiet.config.schema import ParallelConfig
from megatron_iiet.evaluation.harness import HarnessModel, TaskResults, TextCodec
from megatron_iiet.evaluation.models import ModelOptions, prepare_model
from megatron_iiet.evaluation.scoring import noting_scores, score_tokens
from megatron_iiet.evaluation.tasks import load_tasks, task_names
from megatron_iiet.hf import register
from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.tokenizer import extras_of_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.parallel.group import Group
from megatron_iiet.storage import portable
from megatron_iiet.storage.hugging_face import import_llama
from tests.distributed.harness import run_ranks
from tests.evaluation.ranks import evaluate_all, split_scores
from tests.evaluation.task_data import ROWS, write_task_data

torch.set_num_threads(1)

LENGTH = 64
"""Shorter than the longest wikitext page and the longest question: windows and cuts happen."""
EOS = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 320 tokens that adds nothing to a text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([str(row) for rows in ROWS.values() for row in rows], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    assert fast.eos_token_id == EOS
    return folder


@pytest.fixture(scope="module")
def llama(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("llama") / "hf"
    torch.manual_seed(0)
    fields: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            **fields,
            num_attention_heads=4,
            vocab_size=320,
            max_position_embeddings=LENGTH,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=EOS,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def portable_llama(llama: Path) -> Path:
    """The same weights as a folder of ours."""
    config, state = import_llama(llama)
    config.data.tokenizer = "tokenizer.json"
    folder = llama.with_name("portable")
    files = [llama / "tokenizer.json", llama / "tokenizer_config.json"]
    portable.save(config, {name: state[name] for name in state}, folder, extra_files=files)
    return folder


@pytest.fixture(scope="module")
def iiet(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IIET of ours with coefficients that matter; its heads and widths can be split in two."""
    config = iiet_config()
    model = Transformer(config)
    model.initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("coefficients"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    folder = tmp_path_factory.mktemp("iiet") / "model"
    files = [tokenizer_folder / "tokenizer.json", tokenizer_folder / "tokenizer_config.json"]
    portable.save(config, dict(model.named_parameters()), folder, extra_files=files)
    return folder


def iiet_config() -> RunConfig:
    return config_from_dict(
        {
            "model": {
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "num_layers": 3,
                "num_attention_heads": 4,
                "vocab_size": 320,
                "max_position_embeddings": LENGTH,
                "init_std": 0.2,
            },
            "solver": {"kind": "iiet", "iterations": [2, 0, 1]},
            "data": {"tokenizer": "tokenizer.json", "sequence_length": LENGTH},
        }
    )


def evaluated(folder: Path, data: Path, names: tuple[str, ...] = ("paper",), **options: Any) -> TaskResults:
    return evaluate_all([ModelOptions(str(folder), **options)], data, names)[0]


def harness_class(folder: Path) -> Any:
    """lm-evaluation-harness's own class for models of transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=3,
        max_length=LENGTH,
        device="cpu",
        prefix_token_id=EOS,
        add_bos_token=False,
    )


def all_answers(model: Any, data: Path) -> dict[str, Any]:
    """Metrics of the seven tasks, and each answer that they are made of."""
    from lm_eval.evaluator import evaluate

    found = evaluate(model, load_tasks(task_names(["paper"]), data), bootstrap_iters=0, log_samples=True)
    return {
        task: {
            "metrics": {k: v for k, v in found["results"][task].items() if isinstance(v, float)},
            "answers": [answer for row in found["samples"][task] for answer in row["resps"]],
        }
        for task in ROWS
    }


def without_errors(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {k: v for k, v in m.items() if "stderr" not in k} for name, m in metrics.items()}


def assert_same(found: TaskResults, expected: dict[str, dict[str, float]]) -> None:
    values = without_errors(found.metrics)
    assert list(values) == list(expected) == list(ROWS)
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-4), name


def flat(answers: Any) -> list[float]:
    """The numbers of nested lists of answers; whether greedy decoding would write it counts as 0 or 1."""
    if isinstance(answers, (list, tuple)):
        return [number for part in answers for number in flat(part)]
    return [float(answers)]


@pytest.mark.slow
def test_all_seven_tasks_equal_the_harness_own_model_class(
    llama: Path, portable_llama: Path, data: Path
) -> None:
    """On transformers' LLaMA, and on the same weights in our model: every answer, every metric."""
    expected = all_answers(harness_class(llama), data)
    assert_same_answers(ModelOptions(str(llama), start="eos", batch_size=2), data, expected)
    assert_same_answers(ModelOptions(str(portable_llama)), data, expected)


@pytest.mark.slow
def test_an_exported_iiet_equals_the_harness_own_model_class(iiet: Path, data: Path) -> None:
    """The export under the harness's class and under ours, and our model itself."""
    stored, export = portable.StoredModel(iiet), iiet.with_name("export")
    export_folder(stored.config, stored, export, extras_of_tokenizer(iiet / "tokenizer.json"))
    register()
    expected = all_answers(harness_class(export), data)
    assert_same_answers(ModelOptions(str(export), batch_size=2), data, expected)
    assert_same_answers(ModelOptions(str(iiet)), data, expected)


def assert_same_answers(options: ModelOptions, data: Path, expected: dict[str, Any]) -> None:
    assert sum(len(flat(of_task["answers"])) for of_task in expected.values()) == 4 + 2 * (4 * 14 + 4 + 7)
    prepared = prepare_model(options, 1)
    with ParallelContext.start() as context:
        found = all_answers(HarnessModel(prepared.load(context), prepared.codec), data)
    for task in ROWS:
        assert flat(found[task]["answers"]) == pytest.approx(flat(expected[task]["answers"]), rel=1e-4)
        assert found[task]["metrics"] == pytest.approx(expected[task]["metrics"], rel=1e-4)


def scores_one_by_one(model: Transformer, requests: list[Any], encode: Any) -> list[tuple[float, bool]]:
    """Log-likelihood and greedy match of each (context, continuation), one unpadded forward pass each."""
    answers = []
    for context, continuation in requests:
        if not context.strip():
            context, continuation = "", context + continuation
        whole = encode(context + continuation)
        start = len(encode(context)) if context else 1
        if not context:
            whole = [EOS, *whole]
        counted = len(whole) - start
        window = whole[-(LENGTH + 1) :]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([window[:-1]]))[0], -1)[-counted:]
        targets = torch.tensor(window[-counted:])
        total = log_probs[range(counted), targets].sum().item()
        answers.append((total, bool((log_probs.argmax(-1) == targets).all())))
    return answers


@pytest.fixture
def harness_model(iiet: Path) -> Any:
    prepared = prepare_model(ModelOptions(str(iiet), batch_size=2), 1)
    with ParallelContext.start() as context:
        yield HarnessModel(prepared.load(context), prepared.codec)


def greedily_continued(model: Transformer, folder: Path, encode: Any) -> tuple[str, str]:
    """A prompt whose likeliest next token is a text, and that text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for prompt in ROWS["lambada_openai"][1]["text"].split():
        ids = encode(prompt)
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        written = tokenizer.decode(ids[-1:])
        if encode(prompt + written) == ids:
            return prompt, written
    raise AssertionError("no prompt with a likeliest next token that reads back; take more words")


def test_scores_equal_a_loop_without_batches(harness_model: HarnessModel, iiet: Path) -> None:
    """Of different lengths, with an empty context, longer than the model reads, and one that greedy decoding
    writes."""
    model, encode = models.load(iiet), harness_model.codec.encode
    prompt, written = greedily_continued(model, iiet, encode)
    pairs = [
        (prompt, " by the river"),
        ("", "A bridge was built"),
        (" ".join(f"word{i}" for i in range(60)), " end"),
        (prompt, written),
        ("a", " b"),
        (" ", "b"),
        ("Question: what is ice made of?\nAnswer:", " frozen water and nothing else"),
    ]
    found = harness_model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    expected = scores_one_by_one(model, pairs, encode)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]
    assert expected[3][1]
    assert not expected[0][1]
    assert [a[0] for a in found] == pytest.approx([a[0] for a in expected], rel=1e-4)


def test_a_context_of_spaces_is_the_token_before_a_text() -> None:
    """The spaces are the continuation's; what ends a document is another token."""
    codec = TextCodec(lambda text: [ord(letter) for letter in text], start_id=1, end_id=2)
    model = HarnessModel(SimpleNamespace(max_length=8), codec)  # type: ignore[arg-type]
    assert model._encode_pair("  ", "b") == ([1], [32, 32, 98])
    assert model._encode_pair("a", "b") == ([97], [98])
    assert (model.prefix_token_id, model.eot_token_id) == (1, 2)


def test_rolling_windows_score_each_token_once(harness_model: HarnessModel, iiet: Path) -> None:
    """Against windows cut here: the first one behind the start token, the last one as full as it can be."""
    model, text = models.load(iiet), ROWS["wikitext"][2]["page"]
    ids = harness_model.codec.encode(text)
    assert len(ids) > 2 * LENGTH
    assert len(ids) % LENGTH
    whole, total = [EOS, *ids], 0.0
    for start in range(0, len(ids), LENGTH):
        end = min(start + LENGTH, len(ids))
        window = whole[max(0, end - LENGTH) : end + 1]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([window[:-1]]))[0], -1)
        count = end - start
        total += log_probs[range(-count, 0), torch.tensor(window[-count:])].sum().item()
    (found, nothing) = harness_model.loglikelihood_rolling([SimpleNamespace(args=(t,)) for t in (text, "")])
    assert found == pytest.approx(total, rel=1e-5)
    assert nothing == 0


def test_wikitext_and_piqa_by_hand(iiet: Path, data: Path) -> None:
    """The metrics themselves, from the definitions of the tasks: words are those of the page as it is."""
    model = models.load(iiet)
    found = evaluated(iiet, data, ("piqa", "wikitext")).metrics
    prepared = prepare_model(ModelOptions(str(iiet)), 1)
    right = 0
    for row in ROWS["piqa"]:
        question = f"Question: {row['goal']}\nAnswer:"
        answers = [f" {row['sol1']}", f" {row['sol2']}"]
        scores = scores_one_by_one(model, [(question, answer) for answer in answers], prepared.codec.encode)
        normed = [s[0] / len(answer.strip()) for s, answer in zip(scores, answers, strict=True)]
        right += normed.index(max(normed)) == row["label"]
    assert found["piqa"]["acc_norm"] == right / len(ROWS["piqa"])
    words = sum(len(re.split(r"\s+", row["page"])) for row in ROWS["wikitext"])
    length = sum(len(row["page"].encode()) for row in ROWS["wikitext"])
    nats = torch.tensor(found["wikitext"]["word_perplexity"]).log() * words
    assert (nats / length).exp().item() == pytest.approx(found["wikitext"]["byte_perplexity"], rel=1e-4)


def test_continuation_longer_than_the_model_reads(harness_model: HarnessModel) -> None:
    text = " ".join(f"number{i}" for i in range(80))
    with pytest.raises(ValueError, match=r"continuation of \d+ tokens is longer than the 64"):
        harness_model.loglikelihood([SimpleNamespace(args=("a", text))])


def test_continuation_that_melts_into_its_context(harness_model: HarnessModel) -> None:
    """One token spans both: the continuation is scored on its own instead of counting as certain."""
    encode = harness_model.codec.encode
    texts = [harness_model_text(harness_model, token) for token in range(258, 320)]
    first, second = next(text for text in texts if len(text) == 2 and text.isalpha())
    assert len(encode(first + second)) == len(encode(first)) == 1
    ((value, _),) = harness_model.loglikelihood([SimpleNamespace(args=(first, second))])
    model = harness_model.scorer.model.model  # type: ignore[attr-defined]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([encode(first)]))[0, -1], -1)
    assert value == pytest.approx(log_probs[encode(second)[0]].item(), rel=1e-4)


def harness_model_text(model: HarnessModel, token: int) -> str:
    from megatron_iiet.data.tokenizers.loading import load_tokenizer

    path = model.scorer.model.config.data.tokenizer  # type: ignore[attr-defined]
    return load_tokenizer(path).decode([token])


@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.long)]
)
def test_scores_of_split_logits(ranks: int) -> None:
    """Against log_softmax over the unpadded vocabulary; of equal logits the first is the likeliest; the last
    rank of three has padding only."""
    torch.manual_seed(1)
    vocab_size = {1: 4, 2: 6, 3: 8}[ranks]
    logits = torch.randn(3, 5, 4 * ranks).round(decimals=0)  # many ties
    logits[..., vocab_size:] = 100.0
    targets = torch.randint(vocab_size, (3, 5))
    real = logits[..., :vocab_size]
    expected = torch.log_softmax(real, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    first = (real == real.amax(-1, keepdim=True)).int().argmax(-1)
    assert (real == real.amax(-1, keepdim=True)).sum(-1).max() > 1
    if ranks == 1:
        found = [tuple(score_tokens(logits, targets, vocab_size, Group()))]
    else:
        found = run_ranks(split_scores, ranks, logits, targets, vocab_size)
    for log_probs, greedy in found:
        torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(greedy, first == targets)


def test_noting_scores_leaves_the_loss_as_it_was() -> None:
    model = Transformer(iiet_config())
    model.initialise(0)
    tokens = torch.randint(320, (2, 9))
    before = model(tokens[:, :-1], tokens[:, 1:])
    with noting_scores(model) as found:
        inside = model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(inside, before)
    assert torch.equal(model(tokens[:, :-1], tokens[:, 1:]), before)
    assert len(found) == 1
    torch.testing.assert_close(-found[0].log_probs.mean(), before)


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(iiet: Path, llama: Path, data: Path) -> None:
    """Split, staged and shared out; a Hugging Face folder as replicas of transformers' model, and split as
    ours."""
    grids = [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig()]
    ours = [ModelOptions(str(iiet), batch_size=1, parallel=grid) for grid in grids]
    theirs = [ModelOptions(str(llama), batch_size=1, parallel=grid) for grid in (grids[0], grids[2])]
    expected = [evaluated(iiet, data)] * 3 + [evaluated(llama, data)] * 2
    for results in run_ranks(evaluate_all, 2, [*ours, *theirs], data, timeout=400):
        for found, one in zip(results, expected, strict=True):
            assert_same(found, without_errors(one.metrics))
            assert found.rows == one.rows == dict.fromkeys(ROWS, 4)


@pytest.mark.long
def test_four_processes_find_the_numbers_of_one(iiet: Path, data: Path) -> None:
    """Replicas of a model that is split along widths and sequence."""
    options = ModelOptions(str(iiet), batch_size=1, parallel=ParallelConfig(tensor=2, sequence=True))
    expected = without_errors(evaluated(iiet, data).metrics)
    for results in run_ranks(evaluate_all, 4, [options], data, timeout=400):
        assert_same(results[0], expected)
