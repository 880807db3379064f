"""Texts on which tokenizers that look alike are known to differ."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from megatron_iiet.data.tokenizers.base import Tokenizer

HARD_TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n \n",
    " leading and trailing ",
    "two  spaces,   three    four",
    "tab\tand\ttabs\t\t, line ends\n\n\n of\r\n\r\nevery\rkind\u2028of\u2029them\x85\x0b\x0c.",
    "a\0b \0\0 c\0",
    "".join(map(chr, range(256))),
    " ".join(map(chr, range(256))),
    "\u00a0no\u00a0break \u2003em\u3000wide\u200bzero\u200c\u200d\u2060 \u180e",
    "\ufeffat the start and \ufeff inside",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ ❤ 1️⃣ ☺︎",
    "e\u0301 é a\u0308\u0323 ñ n\u0303 \u0301alone Z̷̢̛a̴l̵g̶o̵",
    "한국어 각 각 日本語のテキスト。漢字とかな ｆｕｌｌ　ｗｉｄｔｈ ﬁ ½ ㎒ Ⅷ ① ² 𝔘𝔫𝔦",
    "中文文本，没有空格。" * 20,
    "שלום עולם العربية مرحبا \u202eright to left\u202c \u2067a\u2069",
    "हिन्दी தமிழ் ไทยไม่มีช่องว่าง Ελληνικά кириллица ქართული አማርኛ",
    "\ue000\uf8ff \U000f0000 \ufffe\uffff \U0010ffff \ufffd \ufdd0 \U0001fffe",
    "\x01\x02\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "".join(map(chr, (*range(0x80, 0x800, 37), *range(0x800, 0xD800, 1009), *range(0xE000, 0x110000, 7919)))),
    "0 12 345 6789 01234567890 3.14159 1,000,000 1e-5 0xFF ١٢٣ ½ ²",
    "don't I'm you'll we'VE they'd it'S 'tis ''s ’s \u017f 'ſ K",
    "camelCase snake_case SCREAMING_CASE kebab-case CamelHTTPServer iPhone4S",
    "def f(x):\n    return {'a': [1, 2,\t3]}  # comment\n\n\n\tif (a<b) && c>=d: a->b::c;;",
    '<html><body class="a">&nbsp;<!-- -->{{ }} {% %} \\begin{x} $\\alpha_{1}^{2}$ \\\\',
    "https://example.com/a/b.html?c=d&e=f#g user@host.org C:\\dir\\file.txt",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|> [INST] [/INST] <<SYS>> <bos><eos> <s></s>a<s>",
    "<0x41> <0x0A><0xFF> <0x00> <0x4",
    "▁ ▁▁ a▁b ▁a a▁ ▁ ▁ Ġ Ċ Ġa",
    "x" * 5000,
    "ab" * 3000 + " " + "the" * 2000,
    "supercalifragilisticexpialidocious" * 40,
)

_RUN_CHARACTERS = " \t\n-=_.*#~/\\0a▁é世🙂"
_VOCABULARY_SAMPLE = 8_000


def hard_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The fixed texts, runs of characters, every control piece spelled out, and the vocabulary, shuffled.

    For 32,000 ids about 120,000 characters.
    """
    yield from HARD_TEXTS
    for character in _RUN_CHARACTERS:
        yield "\n".join(f"{character * length}a{character * length}" for length in range(1, 40))
        yield from (character * length for length in range(1, 80, 6))
    for text in tokenizer.spelled_out:
        yield from (text, f"a{text}b", f" {text} {text[:-1]} {text[1:]}{text}{text}\n{text}")
    chance = random.Random(0)
    ids = chance.sample(range(tokenizer.vocab_size), min(tokenizer.vocab_size, _VOCABULARY_SAMPLE))
    pieces = [tokenizer.decode(np.array([piece])) for piece in ids if piece not in tokenizer.control_ids]
    for start in range(0, len(pieces), 100):
        yield chance.choice(("", "", " ", "\n", " a")).join(pieces[start : start + 100])
    # Symbols that repeat are where the order of equally good merges shows.
    yield from (piece * 7 for piece in pieces[:1000])
