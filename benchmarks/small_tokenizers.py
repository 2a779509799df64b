"""Small tokenizers of the published kinds, trained on English: tokenizer.json and tokenizer_config.json.

Patterns and templates are written as published, not imported from phi_c: tests compare phi-c with them.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

_TEXT = Path(__file__).parents[1] / "tests/english.txt"

PHI3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI4_MINI_TEMPLATE = PHI3_TEMPLATE.replace("{{ bos_token }}", "").replace("\\n", "").replace("\n", "")
PHI4_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


_PHI3_SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

# Kind -> (pre-tokenizer or None for SentencePiece, special tokens, (BOS, EOS), chat template), as published.
TOKENIZERS: dict[str, tuple[Any, tuple[str, ...], tuple[str | None, str], str | None]] = {
    "phi-3": (None, _PHI3_SPECIAL, ("<s>", "<|endoftext|>"), PHI3_TEMPLATE),
    "phi-4": (
        lambda: _split(_CL100K),
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        ("<|endoftext|>", "<|im_end|>"),
        PHI4_TEMPLATE,
    ),
    "phi-4-mini": (
        lambda: _split(_O200K),
        _PHI3_SPECIAL,
        ("<|endoftext|>", "<|endoftext|>"),
        PHI4_MINI_TEMPLATE,
    ),
    "phi-2": (_byte_level, ("<|endoftext|>",), ("<|endoftext|>", "<|endoftext|>"), None),
    "smollm2": (
        lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<|im_start|>", "<|im_end|>"),
        CHATML_TEMPLATE,
    ),
    "llama-3": (
        lambda: _split(_CL100K),
        ("<|begin_of_text|>", "<|eot_id|>"),
        ("<|begin_of_text|>", "<|eot_id|>"),
        None,
    ),
}


def make_tokenizer(kind: str, n_vocab: int = 600) -> tokenizers.Tokenizer:
    """Train and return a tokenizer of a kind in TOKENIZERS; its special tokens have the last ids."""
    pre, special, _, _ = TOKENIZERS[kind]
    backend = _train_spm(n_vocab) if pre is None else _train_bytes(pre(), n_vocab, ignore_merges=kind == "llama-3")
    if pre is None:
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>")])
        backend.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    rstrip_flags = [pre is None and token != "<|endoftext|>" for token in special]
    backend.add_special_tokens(
        [
            AddedToken(token, rstrip=rstrip, normalized=False)
            for token, rstrip in zip(special, rstrip_flags, strict=True)
        ]
    )
    return backend


def _train_bytes(pre: Any, n_vocab: int, *, ignore_merges: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_vocab, initial_alphabet=alphabet, show_progress=False)
    backend.train([str(_TEXT)], trainer)
    return backend


def _train_spm(n_vocab: int) -> tokenizers.Tokenizer:
    """Train a BPE with byte fallback; ids are ordered as SentencePiece's: control, bytes, merged tokens, characters."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train([str(_TEXT)], trainers.BpeTrainer(vocab_size=n_vocab, show_progress=False))
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    words = [token for token, _ in by_id if len(token) > 1]
    letters = [token for token, _ in by_id if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    mergeable = {*words, *letters}
    # As transformers derives merges from SentencePiece's scores: every split of a token, highest score first.
    splits = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    merges = [(left, right) for left, right in splits if left in mergeable and right in mergeable]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = tokenizers.decoders.Sequence(steps)
    return backend


def save_tokenizer(folder: Path, kind: str) -> int:
    """Write tokenizer.json and tokenizer_config.json with the chat template. Return the number of tokens."""
    backend = make_tokenizer(kind)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    _, _, (bos, eos), template = TOKENIZERS[kind]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": kind == "phi-3",
    }
    config |= {"unk_token": "<unk>"} if kind == "phi-3" else {}
    config |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return backend.get_vocab_size()
