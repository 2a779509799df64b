"""The model "phi-c" of lm-evaluation-harness; importing this module registers it.

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

_N_TOGETHER = 8
_MAX_GEN_TOKS = 256
# As the harness names them -> as SamplingParams does.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed"}
_MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


@register_model("phi-c")
class PhiCLM(LM):  # type: ignore[misc]
    """A model of phi-c as the harness asks for it.

    model: a source as phi_c.load takes it, or a loaded LLM; loading: options of phi_c.load, such as n_ctx, n_threads,
    kv. batch_size: texts that are generated together, "auto": 8; log-likelihoods run together in any case, as far as
    n_ctx has room. device: not looked at, since the harness names cuda:0 unasked. max_gen_toks: of tasks that name no
    number. Special tokens in texts are read as such, as transformers does, and a text begins with BOS if the model
    wants one. Sampling without a seed in the task follows Python's random, which the harness seeds.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | llm.LLM,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = _MAX_GEN_TOKS,
        **loading: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, llm.LLM) and loading:
            raise OptionError(f"{', '.join(loading)} cannot be given with a model that is loaded")
        self.llm: llm.LLM = model if isinstance(model, llm.LLM) else llm.load(model, **loading)
        self.max_length = self.llm.n_ctx
        self.max_gen_toks = max_gen_toks
        named = None if batch_size == "auto" else batch_size
        self.batch_size = int(named or max_batch_size or _N_TOGETHER)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells caches of rendered requests apart by."""
        return self.llm.path.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's template, which the harness notes beside its results."""
        return self._template().source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; without a generation prompt it ends within the last message."""
        template = self._template()
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        at = text.rfind(last)
        if at < 0:
            raise ChatTemplateError("the chat template changes the last message, so that it cannot be continued")
        return text[: at + len(last)]

    def _template(self) -> ChatTemplate:
        if self.llm.template is None:
            raise ChatTemplateError(f"{self.llm.path.name} has no chat template")
        return self.llm.template

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding gives it) of each (context, continuation)."""
        texts = [request.args for request in requests]
        pairs = [self._fitted(*encode_pair(self.llm.tokenizer, *text, parse_special=True)) for text in texts]
        scores = self._scores(pairs, "log-likelihoods", disable_tqdm)
        for text, score in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the context; each token counts once."""
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
        """Return what follows each context, without the stop string that ended it."""
        cancel = CancelFlag()

        def run(request: Instance, seed: int) -> str:
            context, options = request.args
            return self._generate(context, {"seed": seed} | options, cancel)

        seeds = [random.getrandbits(32) for _ in requests]

        texts = []
        with ThreadPoolExecutor(self.batch_size) as threads:
            try:
                found = threads.map(run, requests, seeds)
                for request, text in zip(requests, _shown(found, len(requests), "texts", disable_tqdm), strict=True):
                    self.cache_hook.add_partial("generate_until", request.args, text)
                    texts.append(text)
            except BaseException:
                cancel.set()
                threads.shutdown(cancel_futures=True)
                raise
        return texts

    def _generate(self, context: str, options: dict[str, Any], cancel: CancelFlag) -> str:
        until = options.pop("until", None) or []
        lengths = [options.pop(name) for name in _MOST_TOKENS if options.get(name) is not None]
        max_tokens = int(lengths[0]) if lengths else self.max_gen_toks
        do_sample = options.pop("do_sample", float(options.get("temperature") or 0) > 0)
        unknown = options.keys() - _SAMPLING
        if unknown:
            raise OptionError(f"the task's generation_kwargs have {', '.join(sorted(unknown))}, which phi-c has not")
        sampling = _PLAIN | {_SAMPLING[name]: value for name, value in options.items() if value is not None}
        if not do_sample:
            sampling["temperature"] = 0.0
        room = self.max_length - max_tokens
        if room < 1:
            raise ContextLengthError(f"{max_tokens} tokens to generate leave none of the context {self.max_length}")
        ids = self.llm.tokenizer.encode(context, parse_special=True)[-room:] or prefix_ids(self.llm.tokenizer)
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return self.llm.generate(ids, max_tokens=max_tokens, stop=stop, cancel=cancel, **sampling).text

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """Return the pair with a context cut from the left until both fit."""
        if not continuation:
            raise OptionError("a continuation has no token of its own after its context")
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ContextLengthError(f"a continuation has {len(continuation)} tokens, the context {self.max_length}")
        return context[-room:], continuation

    def _scores(self, pairs: list[Pair], what: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        found = dict(_shown(score_pairs(self.llm.engine, pairs), len(pairs), what, disable_tqdm))
        return [(found[i].logprob, found[i].is_greedy) for i in range(len(pairs))]


def _shown(items: Iterable[Any], total: int, what: str, disable: bool) -> Iterable[Any]:
    bar: Iterable[Any] = tqdm(items, total=total, desc=what, disable=disable)
    return bar
