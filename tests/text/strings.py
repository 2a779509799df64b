"""Random texts that are hard for tokenizers. A seed gives the same texts on every machine and Python version."""

import random
from collections.abc import Callable, Sequence

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACE_LIKE = "\x1c\x1d\x1e\x1f\u200b\u200c\u200d\u2060\ufeff\u180e\u2581"

# First and last code points of letter ranges, from Latin to the supplementary planes.
_SCRIPTS = (
    (0x61, 0x7A), (0x41, 0x5A), (0xC0, 0xFF), (0x100, 0x24F), (0x1E00, 0x1EFF), (0x250, 0x2AF), (0x370, 0x3FF),
    (0x400, 0x4FF), (0x531, 0x556), (0x5D0, 0x5EA), (0x620, 0x64A), (0x710, 0x72F), (0x904, 0x939), (0x985, 0x9B9),
    (0xA05, 0xA39), (0xB85, 0xBB9), (0xC05, 0xC39), (0xD05, 0xD39), (0xE01, 0xE3A), (0xE81, 0xEB0), (0xF40, 0xF6C),
    (0x1000, 0x102A), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x1248), (0x13A0, 0x13F5), (0x1401, 0x1676),
    (0x16A0, 0x16EA), (0x1780, 0x17B3), (0x1820, 0x1878), (0x2C00, 0x2C5F), (0x3041, 0x3096), (0x30A1, 0x30FA),
    (0x3105, 0x312F), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF21, 0xFF5A), (0x10330, 0x1034A), (0x10400, 0x1044F),
    (0x1D400, 0x1D6A3), (0x20000, 0x2A6DF),
)  # fmt: skip
_MARKS = (
    (0x300, 0x36F), (0x591, 0x5BD), (0x64B, 0x65F), (0x93E, 0x94D), (0xE34, 0xE3A), (0x1DC0, 0x1DFF), (0x20D0, 0x20F0),
)  # fmt: skip
# ASCII, Arabic-Indic, full width, superscripts and fractions, Roman, Devanagari, Chinese.
_DIGITS = (
    "0123456789", "\u0660\u0661\u0662\u0669", "\uff10\uff11\uff19", "\u00b2\u00b3\u00b9\u00bd", "\u2160\u2163\u216b",
    "\u0967\u096f", "\u4e00\u4e8c",
)  # fmt: skip
# With ZWJ, skin tones, variation selectors and tags; flags and keycaps.
_EMOJI = (
    "\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f44d\U0001f3fd", "\u2764\ufe0f",
    "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f1eb\U0001f1f7", "1\ufe0f\u20e3", "\u263a", "\U0001fae8",
    "\U0001f575\U0001f3ff\u200d\u2640\ufe0f", "\u270d\U0001f3fb",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
)  # fmt: skip
_WORDS = (
    "the", "The", "and", "HTTPServer", "camelCase", "snake_case", "don't", "We'LL", "I'd", "they'VE", "'re", "it's",
    "O'Neil", "x'T", "naïve", "Straße", "Ελλάδα", "Привет", "東京", "한국어", "internationalisation", "a", "I",
    "README.md", "e.g.", "\u01c5", "\u0131",
)  # fmt: skip
_CODE = (
    "def f(x):\n    return x ** 2  # two\n",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] += b/c;\n\t}\n",
    '<div class="x">&nbsp;</div>\r\n',
    "SELECT * FROM t WHERE a='b';",
    "\\frac{1}{2} \\alpha_{i}^{2}",
    "https://example.org/a/b?c=d&e=%20f#g",
    "/usr/local/lib//x.so",
    '{"a": [1, 2.5e-3, null]}',
    "if x:\n" + " " * 8 + "pass\n\n\n" + " " * 4 + "else:\n\t\t\tx",
    "#!/bin/sh\nset -eu\n",
    "0xDEADBEEF 1_000 3.14",
    "=>!==&&||??::->",
    "a\n/\n//\n\n/",
)
_PUNCTUATION = (
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2013\u2014\u2018\u2019\u201c\u2026\u00bf\u3002\uff0c\u00ab\u20ac\u2192"
)
_REPEATED = ("a", "ab", "=", "-", "/", "\n", " ", "0", "あ", "\U0001f642", "\u0301", "▁", " a", "the")


def _letters(r: random.Random) -> str:
    first, last = r.choice(_SCRIPTS)
    return "".join(chr(r.randint(first, last)) for _ in range(r.randint(1, 9)))


def _white_space(r: random.Random) -> str:
    if r.random() < 0.5:
        return r.choice(" \t\n\r") * r.randint(1, 40)
    return "".join(r.choice(" \n" if r.random() < 0.6 else WHITE_SPACE + _SPACE_LIKE) for _ in range(r.randint(1, 8)))


def _controls(r: random.Random) -> str:
    ranges = ((0, 0x1F), (0x7F, 0x9F), (0xE000, 0xE010), (0xFFF0, 0xFFFF), (0x10FFF0, 0x10FFFF), (0x2066, 0x2069))
    return "".join(chr(r.randint(*r.choice(ranges))) for _ in range(r.randint(1, 5)))


def _with_marks(r: random.Random) -> str:
    def marks() -> str:
        return "".join(chr(r.randint(*r.choice(_MARKS))) for _ in range(r.randint(0, 3)))

    return marks() + "".join(c + marks() for c in _letters(r))


def _any_character(r: random.Random) -> str:
    # Never surrogates, and rarely the planes without assigned characters.
    return "".join(
        chr(c if c < 0xD800 else c + 0x800)
        for c in (r.randrange(0x1F800 if r.random() < 0.9 else 0x10F800) for _ in range(r.randint(1, 12)))
    )


def _repeated(r: random.Random) -> str:
    return r.choice(_REPEATED) * r.randint(2, 70)


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _letters, _white_space, _controls, _with_marks, _any_character, _repeated,
    lambda r: r.choice(_WORDS),
    lambda r: " ".join(r.choice(_WORDS) for _ in range(r.randint(2, 8))),
    lambda r: "".join(r.choice(r.choice(_DIGITS[: r.choice((1, 1, 7))])) for _ in range(r.randint(1, 15))),
    lambda r: "".join(r.choice(_EMOJI) for _ in range(r.randint(1, 4))),
    lambda r: "".join(r.choice(_PUNCTUATION) for _ in range(r.randint(1, 7))),
    lambda r: r.choice(_CODE),
)  # fmt: skip


def sample_texts(specials: Sequence[str], count: int = 12_000, seed: int = 3) -> list[str]:
    """Return distinct texts, each of one or several of the kinds above, joined with or without white space.

    specials: names of a vocabulary's special tokens; a quarter of the texts contain some of them, or misspellings.
    """
    r = random.Random(seed)
    specials = [*specials]
    misspelled = [form for s in specials for form in (s[:-1], s.upper(), s.replace("|", " |", 1))]
    found = {"": None}
    while len(found) < count:
        parts = [r.choice(_KINDS)(r) for _ in range(r.choice((1, 1, 2, 3, 5)))]
        if specials and r.random() < 0.25:
            for _ in range(r.randint(1, 4)):
                parts.insert(r.randint(0, len(parts)), r.choice(specials if r.random() < 0.8 else misspelled))
                if r.random() < 0.5:
                    parts.insert(r.randint(0, len(parts)), _white_space(r))
        found[r.choice(("", "", " ", "\n", "  ")).join(parts)] = None
    return list(found)
