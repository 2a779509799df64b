"""The model "phi-c" for lm-evaluation-harness; importing this module registers it.

python -m phi_c.evaluate --model phi-c --model_args model=smollm2,n_ctx=2048 --tasks hellaswag
lm_eval.simple_evaluate(model=PhiCLM("smollm2", n_ctx=2048), tasks=["hellaswag"])
"""

import os
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from phi_c import llm
from phi_c._core import CancelFlag
from phi_c.errors import ChatTemplateError, ContextLengthError, OptionError
from phi_c.scoring import Pair, encode_pair, prefix_ids, score_pairs
from phi_c.text.chat_template import ChatTemplate

_DEFAULT_BATCH_SIZE = 8
_DEFAULT_MAX_GEN_TOKS = 256
# The harness's name of a sampling option -> the name in SamplingParams.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed"}
_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


@register_model("phi-c")
class PhiCLM(LM):  # type: ignore[misc]
    """A phi-c model as lm-evaluation-harness calls it.

    model: a source for phi_c.load, or a loaded LLM.
    batch_size: number of concurrent generation requests; None or "auto": max_batch_size, else 8. Log-likelihood
        requests are batched regardless of it, as far as the KV cache has room.
    device: ignored; the harness passes cuda:0 by default.
    max_gen_toks: maximum number of generated tokens for tasks that do not specify one.
    load_options: options of phi_c.load, such as n_ctx, n_threads, kv_type.

    Special tokens in prompts are parsed, as in transformers, and prompts begin with BOS if the model uses it. Sampling
    is seeded from Python's random module, which the harness seeds, unless the task has a seed. Raises OptionError for
    load options with a loaded model, and the errors of phi_c.load.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | llm.LLM,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = _DEFAULT_MAX_GEN_TOKS,
        **load_options: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, llm.LLM) and load_options:
            raise OptionError(f"{', '.join(load_options)} cannot be used with a model that is already loaded")
        self.llm: llm.LLM = model if isinstance(model, llm.LLM) else llm.load(model, **load_options)
        self.max_length = self.llm.n_ctx
        self.max_gen_toks = max_gen_toks
        explicit = None if batch_size == "auto" else batch_size
        self.batch_size = int(explicit or max_batch_size or _DEFAULT_BATCH_SIZE)

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cache of rendered requests."""
        return self.llm.path.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the model's chat template, which the harness stores with its results."""
        return self._template().source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the rendered conversation; without a generation prompt it ends with the last message's content."""
        template = self._template()
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        start = text.rfind(last)
        if start < 0:
            raise ChatTemplateError("the chat template changes the last message, so it cannot be continued")
        return text[: start + len(last)]

    def _template(self) -> ChatTemplate:
        if self.llm.template is None:
            raise ChatTemplateError(f"{self.llm.path.name} has no chat template")
        return self.llm.template

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding generates it) for each (context, continuation)."""
        texts = [request.args for request in requests]
        pairs = [self._truncated(*encode_pair(self.llm.tokenizer, *text, parse_special=True)) for text in texts]
        scores = self._scores(pairs, "log-likelihoods", disable_tqdm)
        for text, score in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text in windows of the context; every token is scored once."""
        prefix = prefix_ids(self.llm.tokenizer)[0]
        texts = [request.args[0] for request in requests]
        pairs: list[Pair] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            ids = self.llm.tokenizer.encode(text, add_bos=False, parse_special=True)
            for window in get_rolling_token_windows(ids, prefix, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                pairs.append((context, continuation))
                owners.append(i)
        sums = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self._scores(pairs, "rolling windows", disable_tqdm), strict=True):
            sums[owner] += value
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated text for each context, without the stop string."""
        cancel = CancelFlag()

        def run(request: Instance, seed: int) -> str:
            context, options = request.args
            return self._generate(context, {"seed": seed} | options, cancel)

        seeds = [random.getrandbits(32) for _ in requests]
        texts = []
        with ThreadPoolExecutor(self.batch_size) as threads:
            try:
                results = threads.map(run, requests, seeds)
                outputs = _with_progress(results, len(requests), "generation", disable_tqdm)
                for request, text in zip(requests, outputs, strict=True):
                    self.cache_hook.add_partial("generate_until", request.args, text)
                    texts.append(text)
            except BaseException:
                cancel.set()
                threads.shutdown(cancel_futures=True)
                raise
        return texts

    def _generate(self, context: str, options: dict[str, Any], cancel: CancelFlag) -> str:
        until = options.pop("until", None) or []
        lengths = [options.pop(name) for name in _MAX_TOKENS_NAMES if options.get(name) is not None]
        max_tokens = int(lengths[0]) if lengths else self.max_gen_toks
        do_sample = options.pop("do_sample", float(options.get("temperature") or 0) > 0)
        unknown = options.keys() - _SAMPLING
        if unknown:
            raise OptionError(
                f"phi-c does not support these generation_kwargs of the task: {', '.join(sorted(unknown))}"
            )
        sampling = _NEUTRAL_SAMPLING | {_SAMPLING[name]: value for name, value in options.items() if value is not None}
        if not do_sample:
            sampling["temperature"] = 0.0
        max_prompt = self.max_length - max_tokens
        if max_prompt < 1:
            raise ContextLengthError(
                f"generating {max_tokens} tokens leaves no room for a prompt in the context size of {self.max_length}: "
                "lower max_gen_toks or raise n_ctx"
            )
        ids = self.llm.tokenizer.encode(context, parse_special=True)[-max_prompt:] or prefix_ids(self.llm.tokenizer)
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return self.llm.generate(ids, max_tokens=max_tokens, stop=stop, cancel=cancel, **sampling).text

    def _truncated(self, context: list[int], continuation: list[int]) -> Pair:
        """Return the pair with its context truncated on the left until both fit the context size."""
        if not continuation:
            raise OptionError("a continuation adds no token to its context")
        max_context = self.max_length + 1 - len(continuation)
        if max_context < 1:
            raise ContextLengthError(
                f"a continuation has {len(continuation)} tokens, more than the context size of {self.max_length}: "
                "raise n_ctx"
            )
        return context[-max_context:], continuation

    def _scores(self, pairs: list[Pair], what: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        scores = dict(_with_progress(score_pairs(self.llm.loop, pairs), len(pairs), what, disable_tqdm))
        return [(scores[i].logprob, scores[i].is_greedy) for i in range(len(pairs))]


def _with_progress(items: Iterable[Any], total: int, what: str, disable: bool) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(items, total=total, desc=what, disable=disable)
    return bar
