"""Text that tokenizers split in different ways, and a vocabulary whose tokens show each difference."""

# ruff: noqa: RUF001 - letters that look like others are what splits differ in

import json
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.models.tiny_gguf import Vocabulary

GOLDEN = Path(__file__).with_name("tricky.json")
"""The vocabulary's merges, and by the name of a split the tokens that llama.cpp makes of each text."""

SPECIAL = ("<|begin|>", "<|im_end|>", "<|im_start|>", "<｜fim▁hole｜>")
OWN = ("<think>", "</think>")
WHOLE = ("ĠHTTPServer", "Ġcomment")
"""Words that no merges make: a token each where ``ignore_merges`` holds."""

PAGE = (
    "List:\n\n1. One\n2. Two\n",
    "1 12 123 1234 12345 1234567890 3.14159 -0,5e10 ١٢٣ ④ ½ x² 10th 2nd 007",
    "I'm you're he'd we'll they've it's DON'T I'LL it’S 'twas o'clock rock'n'roll 's 'T",
    "CamelCase HTTPServer iPhone XMLHttpRequest snake_case kebab-case SCREAMING_CASE aB Ab",
    "  two leading, trailing two  ",
    "\tTab\t\ttabs \t mixed\t ",
    "\n\n\nThree before\n \n  \n   \nfour after\n\n\n\n",
    "a\r\nb\r\n\r\nc\rd \r\n e",
    " ",
    "      ",
    "\n",
    "a  b   c    d     e      f",
    "def f(x: int) -> str:\n    if x >= 10 and not y[3:]:\n\t\treturn f'{x!r}/{y}'\n\n\n# a comment…\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; } // done\n/* and\n * more */",
    '<html><body class="x">&amp;&lt;</body></html>\n{"key": [1, 2.5, null, true]}',
    "https://example.org/path/to?q=1&r=%20#top user@mail.co 192.168.0.1 v1.2.3-rc4 /usr/bin/\n//\n/",
    "!!! ??? ... --- === *** ### $$$ %%% &&& +++ ~~~ ^^^ ||| `code` ```block``` \\ \\n",
    "!a .b ,c (d [e {f \"g 'h -i _j #k @l $m %n",
    "(a)!(b)? c; d: e, f. «g» „h“ “i” ‘j’ —k– …l",
    "東京は日本の首都です。人口は約1400万人。カタカナ ひらがな 漢字、",
    "你好，世界！今天是2024年5月1日。 中文 English 混合text文字",
    "한국어 문장입니다. 안녕하세요 세계!",
    "Ünïcödé naïve café über straße Ångström ĳs ŒUVRE ǆ",
    "Привет, мир! ПРИВЕТ приВет 123рубля",
    "Καλημέρα κόσμε ΑΘΗΝΑ αΒγ",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "हिन्दी में वाक्य है। ไทยภาษา বাংলা தமிழ்",
    "e\u0301 n\u0303 a\u030a Z\u0335 cafe\u0301s",
    "😀😃 👍🏽 👨‍👩‍👧 🇩🇪🇫🇷 ❤️ ☕️x 1️⃣ 🙂text🙃",
    "x\u00a0y\u2003z\u3000w\u200bv\ufeffu\u2028t\u0085s",
    "½+¼=¾ × ÷ ± € £ ¥ ° © ® ™ → ⇒ ∑ √ ∞ ≠ a→b",
    "𝒳𝓎𝓏 ｆｕｌｌ Ⅷ ⅷ ª º ᾳ \U000e0041",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "a <|im_end|> b<|im_end|>c  <|im_end|>  d<|im_end",
    "<think>\nwell, 1+1\n</think>\n\nTwo.<｜fim▁hole｜>x",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbb BBBB AAaaAAaa zzz\u0000\u0001\u007f\n\n\n\n\n\n\n\nend",
)


def vocabulary(merges: list[str]) -> Vocabulary:
    """Bytes, what the merges make, and tokens that are found in text as they are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = (merge.replace(" ", "") for merge in merges)
    normal = [*dict.fromkeys([*letters, *made, *WHOLE])]
    kinds = ((SPECIAL, TokenType.CONTROL), (OWN, TokenType.USER_DEFINED), (normal, TokenType.NORMAL))
    return Vocabulary([*SPECIAL, *OWN, *normal], merges, [kind for tokens, kind in kinds for _ in tokens])


def sentencepiece() -> Vocabulary:
    """Bytes, runs of spaces, and the beginnings of all words with and without a space before them."""
    words = [space + word for text in PAGE if "\0" not in text for word in text.split() for space in ("", "▁")]
    runs = ["▁" * count for count in range(1, 9)]
    pieces = dict.fromkeys([*runs, *(word[:end] for word in words for end in range(1, len(word) + 1)), *"".join(words)])
    marked = (
        (SPECIAL, TokenType.CONTROL),
        (OWN, TokenType.USER_DEFINED),
        ([f"<0x{byte:02X}>" for byte in range(256)], TokenType.BYTE),
        ([piece for piece in pieces if piece not in SPECIAL + OWN], TokenType.NORMAL),
    )
    tokens = [token for group, _ in marked for token in group]
    types = [kind for group, kind in marked for _ in group]
    return Vocabulary(tokens, (), types, [-float(index) for index in range(len(tokens))])


def golden() -> dict[str, Any]:
    """What stands in the file."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


def learned_merges(count: int) -> list[str]:
    """Merges across all splits: of the whole page, as if none of it were split."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([text for text in PAGE * 2 if not any(map(text.__contains__, SPECIAL + OWN))], trainer)
    return [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
