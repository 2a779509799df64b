"""Searches the project's names, messages and documents for words that it does not use.

    python tests/lint/words.py [PATH...]

Prints FILE:LINE: the words found -> what to write instead, and exits with status 1 if there are any. Each pattern is a
word in one sense, not a common word: "text" is fine for text, but a batch has 8 sequences, not "8 texts".
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyx", ".pxd", ".pxi", ".pyi", ".c", ".h", ".def", ".md", ".toml", ".yml", ".txt", ".cmake", ""}
# The words are named here, in the test and in the table of old test names; the others are data.
EXCLUDED = ("tests/lint/", "tests/fuzz/corpus/", "tests/english.txt", "docs/tests-moved.md", "LICENSE")

_NUMBER = r"(?:\d+|one|two|three|four|eight|sixteen|several)"

# Pattern, and the words to use instead. A pattern without upper-case letters matches any case.
WORDS: tuple[tuple[str, str], ...] = (
    (rf"(?<![-,.\d])\b(?:one text|{_NUMBER} texts)\b(?! files?)", "sequence(s), prompt(s) or input(s)"),
    (r"\btexts that (?:run|go|are (?:written|generated|computed|decoded))\b", "sequences"),
    (r"\breads? (?:a |the |its )?prompts?\b", "prefill(s)"),
    (r"\bprompts? (?:is|are) read\b", "is prefilled"),
    (r"\bfirst text\b", "time to first token"),
    (r"\b(?:is|are|was|were|be|been) asked for\b", "is prefetched; is requested; opt-in"),
    (r"\basks? ahead\b|\bask_for\b", "prefetch"),
    (r"\bhad to be asked\b|\bhave to be asked\b", "opt-in"),
    (r"\b(?:is|are|was|were|be) had\b", "a concrete verb: is computed, is stored, is available"),
    (r"\bgo(?:es)? on\b", "continue(s)"),
    (r"\blies? (?:in|at|beside|between|behind|beyond|together|outside|side by side|one after)\b", "is stored; is"),
    (r"\bas (?:many|much)(?: \w+)? as (?:it|they) likes?\b|\blikes? best\b", "name the preference or the limit"),
    (
        r"layout[= ]+\"?(?:file|cached)\b|\"cached\" layout|file layout",
        'layout "mmap", "packed-cache"; row-major blocks',
    ),
    (r"\bside[ _-]files?\b|\bSideFile\b", "packed-weight cache"),
    (r"\b_core\.touch\b|\btouch(?:es|ed|ing)? (?:the |all )?(?:pages|memory|weights|mapp)", "prefault"),
    (r"\bwide (?:activation|product|block|tile)s?\b|\b(?:quantize|takes|phi|all|only)_wide\b|\bPHI_WIDE", "tiled"),
    (r"\bshelf\b", "KV connector; second-level prefix cache"),
    (r"\bpool\.(?:take|share|release|remember|known)\(", "allocate, incref, decref, register, registered_keys"),
    (r"\bn_unpromised\b", "n_available_pages"),
    (r"\brows_from\b|\bFinish\.READ\b", "output_from; a hidden-state request"),
    (r"\bphi_head\b|\b_core\.head\(|\bphi_batch\.embeddings\b", "lm_head, hidden_states"),
    (r"\bphi_activation_kind\b|\bPHI_ACT_", "phi_ffn_activation, phi_activation_format"),
    (r"\bPHI_ROPE_NORM\b", "PHI_ROPE_INTERLEAVED"),
    (r"\bsoften\w*\b", "update_softmax"),
    (r"\bfew_tokens\b", "max_exact_batch"),
    (r"\blikeliest\b", "most probable"),
    (r"\bhow likely\b", "log-probability; perplexity"),
    (r"\bPiece\b", "Chunk"),
    (r"\bhow far (?:two|the) models\b|\bfar from each other\b", "KL divergence, top-1 agreement"),
    (r"\bsame_top\b|\bsame top token\b", "top1_agreement; top-1 agreement"),
    (r"\bkept positions\b|\bn_cache\b|--n-cache\b", "KV cache capacity in tokens; kv_cache_tokens"),
    (r"--(?:n-ctx|n-batch|ctx)\b(?!-)|--kv\b(?!-)|\bkv=\"", "--ctx-size, --batch-size, --kv-type; kv_type="),
    (r"\b(?:is|are|be) (?:said|told)\b", "is reported"),
    (r"\bsays (?:what|which|how|that|why|so|nothing|otherwise)\b", "reports; gives; defines"),
    (r"\bin silence\b", "silently"),
    (r"\bleav(?:es|ing) out\b|\bleft out\b|\bleave out\b", "omit(s), skip(s)"),
    (r"\bdamaged?\b", "corrupt"),
    (
        r"(?<!there )\b(?:is|are|was|were|be) no "
        r"(?!longer|more|less|such|faster|slower|larger|smaller|better|worse)[a-z]",
        "is not a ...",
    ),
    (r"\bof so many\b|\bso many (?:tokens|bytes|rows|pages|columns|positions)\b", "name the number: n tokens"),
    (r"\bat home\b|\bthe house\b", "plain words, no metaphors"),
)
_COMPILED = tuple(
    (re.compile(pattern, re.IGNORECASE if pattern == pattern.lower() else 0), instead) for pattern, instead in WORDS
)


def find(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line number, words found, what to write instead); words may be split by the end of a line."""
    lines = [re.sub(r"^\s*(?:#|//|\*|/\*)?\s*", "", line).rstrip() for line in text.splitlines()]
    for i, line in enumerate(lines):
        following = " ".join(lines[i + 1].split()[:2]) if i + 1 < len(lines) else ""
        for pattern, instead in _COMPILED:
            for match in pattern.finditer(f"{line} {following}"):
                if match.start() < len(line):
                    yield i + 1, match[0], instead


def tracked(paths: Iterable[str]) -> list[Path]:
    """Return the files that git tracks below the paths, those that hold words of ours."""
    listed = subprocess.run(["git", "ls-files", "-z", *paths], cwd=ROOT, check=True, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name and not name.startswith(EXCLUDED)]
    return [ROOT / name for name in names if Path(name).suffix in SUFFIXES and (ROOT / name).is_file()]


def main(paths: list[str]) -> int:
    """Print what is found; return the exit status."""
    n_found = 0
    files = tracked(paths)
    for path in files:
        for number, words, instead in find(path.read_text(encoding="utf-8")):
            print(f"{path.relative_to(ROOT)}:{number}: {words!r} -> {instead}")
            n_found += 1
    print(f"{len(files)} files searched, {n_found} places found", file=sys.stderr)
    return 1 if n_found or not files else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
