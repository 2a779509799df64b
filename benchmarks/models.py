"""Writes docs/models.md: each published model's way of computing, held against transformers.

    python benchmarks/models.py            # write the page
    python benchmarks/models.py --check    # exit status 1 when the page is not what the code gives
    python benchmarks/models.py --only Phi-4-mini

For each row of `published.py` a small model of random weights with the published settings is saved by transformers,
converted by phi-c, and run by both. Needs the extra `reference`.
"""

import argparse
import difflib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from phi_c import llm
from phi_c.convert.run import convert
from phi_c.convert.vocabulary import PROBES
from published import PUBLISHED, Published
from reference_models import random_tokens, reference_run, reference_tokenizer, save_model, worst_nmse
from small_tokenizers import TOKENIZERS, save_tokenizer

PAGE = Path(__file__).parents[1] / "docs/models.md"

# Errors are given as the first of these that they stay below. Keys and values in half precision alone cost about 1e-7,
# a little more or less on each machine.
BOUNDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))

# Of a router's scores: keys in half precision may turn a choice between experts that is nearer than this.
_NEAR_TIE = 2e-3

_TOKENIZERS = {"default": "SentencePiece BPE", "phi-2": "GPT-2 BPE", "smollm": "GPT-2 BPE, single digits"}
_TOKENIZERS |= {"dbrx": "cl100k BPE", "llama-bpe": "cl100k BPE, whole words", "gpt-4o": "o200k BPE"}

_HEAD = """# Models

Made by `python benchmarks/models.py`; `nox -s reference` fails when it is out of date.

Each row is a small model of random weights with the published model's settings (`benchmarks/published.py`): saved by
transformers as safetensors in float32, converted by `phi-c convert`, run by both. The numbers of layers, heads and
tokens are smaller than the published ones, LongRoPE's factors are made up, all else is as in the published config.json.

- **Logits**: the largest squared error of any position over its squared signal stays below this, for texts of so many
  tokens, which reach beyond the window, or up to and beyond the original context.
- **Window**: positions that attention reaches back, counting the token itself.
- **LongRoPE**: the context up to which short factors hold, and the longest one.
- **Tokenizer**: what the file's vocabulary is read as, and the published number of rows. *Same ids* as transformers'
  tokenizer for a small vocabulary of this kind; `tests/text/test_published.py` compares the published vocabularies
  on 12,000 texts each.
- **Template**: the kind; *same text* as transformers renders, for a conversation with a system message.

Phi-3.5-MoE has one layer here, and positions whose choice of experts is a near tie in transformers (scores within 0.2
% of another choice, at most a fifth of the positions) are left out: half precision in keys may turn those. With more
layers `tests/transformers_reference` has it at every position of shorter texts. Beyond its original context
transformers' own class keeps the short factors (seen in 5.24, see `reference_models.py`); here it is given the long
ones, as the code published with the model does.

| model | GGUF architecture | logits, NMSE below | tokens | window | LongRoPE | tokenizer | template |
|---|---|---|---|---|---|---|---|
"""

_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the harbour?\n"},
    {"role": "assistant", "content": "  Down the hill."},
    {"role": "user", "content": "Thanks, it's 10:30."},
]


@dataclass(frozen=True)
class Row:
    """What was found; error: the NMSE itself."""

    text: str
    error: float
    is_right: bool


def measure(model: Published) -> Row:
    """Make the small model, run it in both, and return its row."""
    with tempfile.TemporaryDirectory(prefix="phi-c-") as work:
        folder = Path(work) / model.name
        n_tokens = save_tokenizer(folder, model.tokenizer)
        # A turned choice must not reach other positions through a second layer's attention.
        one_layer = {"num_hidden_layers": 1} if model.family == "Phimoe" else {}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        save_model(folder, model.family, {"vocab_size": n_tokens, **ids, **model.config(), **one_layer})
        path = convert(folder, folder.with_suffix(".gguf"))
        lengths = model.lengths()
        with llm.load(path, n_ctx=min(model.n_ctx, max(lengths) + 64)) as engine:
            config, pre = engine.config, engine.tokenizer.vocabulary.pre
            errors = []
            for length in lengths:
                tokens = random_tokens(length, n_tokens)
                expected, margins = reference_run(folder, tokens)
                clear = margins > _NEAR_TIE
                if clear.mean() < 0.8:
                    raise AssertionError(f"{model.name}: {clear.mean():.0%} of the positions are no near tie")
                errors.append(worst_nmse(engine.logits(tokens)[clear], expected[clear]))
            same_ids, same_text = _same_ids(engine, folder), _same_text(engine, folder)
    template = "none: raw prompts" if TOKENIZERS[model.tokenizer][3] is None else f"{model.tokenizer}, "
    if not template.startswith("none"):
        template += "same text" if same_text else "OTHER TEXT"
    cells = (
        f"[{model.name}](https://huggingface.co/{model.repo})",
        config.architecture,
        f"{next(bound for bound in BOUNDS if max(errors) <= bound):.0e}",
        ", ".join(map(str, lengths)),
        str(config.window) if config.window else "none",
        f"{config.n_ctx_orig}, {config.n_ctx_train}" if config.long_rope else "none",
        f"{_TOKENIZERS[pre]}, {model.n_vocab}, {'same ids' if same_ids else 'OTHER IDS'}",
        template,
    )
    is_right = max(errors) <= BOUNDS[0] and same_ids and same_text
    return Row("| " + " | ".join(cells) + " |", max(errors), is_right)


def _same_ids(engine: llm.LLM, folder: Path) -> bool:
    theirs = reference_tokenizer(folder)
    return all(
        engine.tokenizer.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False) for text in PROBES
    )


def _same_text(engine: llm.LLM, folder: Path) -> bool:
    theirs = reference_tokenizer(folder)
    if theirs.chat_template is None:
        return engine.template is None
    text = theirs.apply_chat_template(_MESSAGES, tokenize=False, add_generation_prompt=True)
    return engine.template is not None and engine.template.render(_MESSAGES) == text


def main() -> int:
    """Run the command line; 1: the page differs, or a row is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/models.md instead of writing it")
    parser.add_argument("--only", action="append", choices=[m.name for m in PUBLISHED], help="print only this row")
    options = parser.parse_args()
    rows = []
    for model in PUBLISHED:
        if options.only is None or model.name in options.only:
            row = measure(model)
            rows.append(row)
            print(f"{model.name}: NMSE {row.error:.1e}{'' if row.is_right else ', WRONG'}", file=sys.stderr)
    if options.only:
        print(*(row.text for row in rows), sep="\n")
        return 0 if all(row.is_right for row in rows) else 1
    page = _HEAD + "".join(row.text + "\n" for row in rows)
    if not options.check:
        PAGE.write_text(page, encoding="utf-8", newline="\n")
        return 0 if all(row.is_right for row in rows) else 1
    old = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    difference = list(difflib.unified_diff(old.splitlines(), page.splitlines(), str(PAGE), "the code", lineterm=""))
    print(*difference, sep="\n")
    return 1 if difference or not all(row.is_right for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
