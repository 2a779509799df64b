"""lm-evaluation-harness on local tasks with SmolLM2: same results as LLM.score, LLM.logits and LLM.generate."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'phi-c[eval]'")
import phi_c
from phi_c.errors import ContextLengthError, OptionError

TASKS = Path(__file__).parent / "tasks"
ENGLISH = (Path(__file__).parents[1] / "english.txt").read_text(encoding="utf-8")
CHOICES = [
    ("The capital of France is", [" Paris", " London", " Berlin", " a fish"], 0),
    ("Question: What do cows drink?\nAnswer:", [" water", " milk from a cup", " diesel"], 0),
    ("Two plus two is ", ["four", "seven"], 0),
    ("", ["The", "zq"], 0),
]
QUESTIONS = ["The capital of France is the city of", "One, two, three,", "The sun rises in the"]
# No network. Set for child processes, because huggingface_hub reads these variables when it is imported.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [{"question": q, "choices": c, "label": label} for q, c, label in CHOICES],
        "write": [{"question": q, "answer": "?"} for q in QUESTIONS],
        "rolling": [{"text": ENGLISH}, {"text": "A short one."}],
    }
    for name, docs in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
        task = (TASKS / f"{name}.yaml").read_text(encoding="utf-8")
        (folder / f"{name}.yaml").write_text(task.replace("DATA", folder.as_posix()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[phi_c.LLM]:
    with phi_c.load(smollm2_path, n_ctx=512) as loaded:
        yield loaded


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=500,
        env={**os.environ, **OFFLINE, "HF_HOME": str(home)},
        check=False,
    )


@pytest.fixture(scope="module")
def results(smollm2_path: Path, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results that the harness's command line wrote, with the samples of each task."""
    home, out = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("out")
    arguments = ["-m", "phi_c.evaluate", "--model", "phi-c", "--model_args", f"model={smollm2_path},n_ctx=512"]
    arguments += ["--tasks", "phi_c_choice,phi_c_write,phi_c_rolling", "--include_path", str(tasks)]
    done = run(*arguments, "--output_path", str(out), "--log_samples", "--batch_size", "4", home=home)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found["samples"] = {
        path.name.removeprefix("samples_").rsplit("_", 1)[0]: [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in out.rglob("samples_*.jsonl")
    }
    return found


def answers(results: dict[str, Any], task: str) -> list[tuple[dict[str, Any], list[Any]]]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [(sample["doc"], [answer for (answer,) in sample["resps"]]) for sample in samples]


def log_likelihood(llm: phi_c.LLM, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """Return (log-likelihood, is greedy) of ids after a context, from LLM.logits in float64."""
    logits = llm.logits(context + ids[:-1])[len(context) - 1 :].astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    values = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(values[np.arange(len(ids)), ids].sum()), bool((logits.argmax(1) == ids).all())


def test_multiple_choice(llm: phi_c.LLM, results: dict[str, Any]) -> None:
    found = answers(results, "phi_c_choice")
    assert len(found) == len(CHOICES)
    n_right = 0
    for (question, choices, label), (doc, got) in zip(CHOICES, found, strict=True):
        assert doc["question"] == question
        # The harness puts a space between question and choice.
        scores = llm.score(question, [f" {choice}" for choice in choices])
        values = [float(value) for value, _ in got]  # strings in the file
        for choice, score, value, (_, text) in zip(choices, scores, values, got, strict=True):
            is_greedy = str(text) == "True"
            assert value == pytest.approx(score.logprob, abs=1e-9)
            assert is_greedy == score.is_greedy
            prompt = question.rstrip()
            context = llm.tokenizer.encode(prompt) if prompt else [llm.tokenizer.bos_id]
            whole = llm.tokenizer.encode(f"{question} {choice}")
            expected = log_likelihood(llm, context, whole[len(context) :] if prompt else whole)
            assert value == pytest.approx(expected[0], abs=1e-4)
            assert is_greedy == expected[1]
        n_right += int(np.argmax(values)) == label
    assert results["results"]["phi_c_choice"]["acc,none"] == n_right / len(CHOICES)
    assert n_right >= 3


def test_generated_text(llm: phi_c.LLM, results: dict[str, Any]) -> None:
    for question, (_, got) in zip(QUESTIONS, answers(results, "phi_c_write"), strict=True):
        out = llm.generate(question, raw=True, max_tokens=12, temperature=0, repeat_penalty=1, stop=["\n", "."])
        assert got == [out.text]
        assert out.text
    assert "Paris" in answers(results, "phi_c_write")[0][1][0]


def test_rolling_perplexity(llm: phi_c.LLM, results: dict[str, Any]) -> None:
    """The first window scores 512 tokens after the prefix; the second scores the rest after as much context as fits."""
    texts, total = [ENGLISH, "A short one."], 0.0
    for text, (_, got) in zip(texts, answers(results, "phi_c_rolling"), strict=True):
        ids = llm.tokenizer.encode(text, add_bos=False)
        prefix = [llm.tokenizer.bos_id]
        expected = log_likelihood(llm, prefix, ids[:512])[0]
        if len(ids) > 512:
            # The second window fills the context; only its end is scored.
            expected += log_likelihood(llm, ids[len(ids) - 513 : 512], ids[512:])[0]
        assert float(got[0]) == pytest.approx(expected, abs=2e-3)
        total += float(got[0])
    n_bytes = sum(len(text.encode()) for text in texts)
    bits = results["results"]["phi_c_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / n_bytes / math.log(2))


def test_encode_pair_matches_the_harness(llm: phi_c.LLM) -> None:
    from lm_eval.api.model import TemplateLM

    from phi_c.scoring import encode_pair

    class Cutter(TemplateLM):  # type: ignore[misc]
        eot_token_id = 0

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            return llm.tokenizer.encode(string, add_bos=add_special_tokens, parse_special=True)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            raise NotImplementedError

        generate_until = loglikelihood_rolling = _loglikelihood_tokens

    cutter = Cutter()
    words = ["The cat", "Answer: ", " Paris", "ing", "\n\n", "a \t b", "<|im_end|>", "\u00e9t\u00e9", "  two", "4"]
    for context in words:
        for continuation in words:
            if context.strip():
                expected = cutter._encode_pair(context, continuation)
                assert encode_pair(llm.tokenizer, context, continuation, parse_special=True) == expected


def test_requests_longer_than_the_context_and_invalid_options(smollm2_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from phi_c.evaluate.harness import PhiCLM

    def request(kind: str, *arguments: Any) -> Any:
        return Instance(kind, {}, arguments, 0)

    lm = PhiCLM(str(smollm2_path), n_ctx=64, n_threads=1, batch_size="auto", device="cuda:0")
    long = ENGLISH[:600]
    ((value, _),) = lm.loglikelihood([request("loglikelihood", long, " oranges")], disable_tqdm=True)
    ids = lm.llm.tokenizer.encode(long + " oranges")
    context, own = ids[:-1][-64:], ids[-1:]
    assert value == pytest.approx(lm.llm.score(context, [own])[0].logprob)
    (text,) = lm.generate_until([request("generate_until", long, {"until": [], "max_gen_toks": 10})], disable_tqdm=True)
    truncated = lm.llm.tokenizer.encode(long)[-54:]
    assert text == lm.llm.generate(truncated, max_tokens=10, temperature=0, repeat_penalty=1).text
    with pytest.raises(ContextLengthError, match="a continuation has"):
        lm.loglikelihood([request("loglikelihood", "a", long)], disable_tqdm=True)
    with pytest.raises(ContextLengthError, match="generating 64 tokens leaves no room"):
        lm.generate_until([request("generate_until", "a", {"max_gen_toks": 64})], disable_tqdm=True)
    with pytest.raises(OptionError, match="generation_kwargs of the task: num_beams"):
        lm.generate_until([request("generate_until", "a", {"num_beams": 2})], disable_tqdm=True)
    sampled = {"do_sample": True, "temperature": 1.5, "seed": 4, "max_gen_toks": 20, "until": "zq"}
    first, second = lm.generate_until([request("generate_until", "The", sampled)] * 2, disable_tqdm=True)
    assert first == second != lm.llm.generate("The", raw=True, max_tokens=20, temperature=0, repeat_penalty=1).text
    del sampled["seed"]
    texts = []
    for _ in range(2):
        random.seed(1)  # as the harness does
        texts.append(lm.generate_until([request("generate_until", "The", sampled)] * 2, disable_tqdm=True))
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    with pytest.raises(OptionError, match="n_ctx cannot be used"):
        PhiCLM(lm.llm, n_ctx=5)
    lm.llm.close()


def test_chat_template(llm: phi_c.LLM) -> None:
    from phi_c.evaluate.harness import PhiCLM

    lm = PhiCLM(llm)
    messages = [{"role": "user", "content": "Hi"}]
    text = lm.apply_chat_template(messages)
    assert llm.template is not None
    assert text == llm.template.render(messages)
    assert text.endswith("<|im_start|>assistant\n")
    begun = [*messages, {"role": "assistant", "content": "The answer is"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("<|im_start|>assistant\nThe answer is")
    assert lm.chat_template(True) == llm.template.source
    assert lm.chat_template(False) is None
    assert lm.tokenizer_name == llm.path.name


_SCRIPT = """
import sys, lm_eval
from lm_eval.tasks import TaskManager
from phi_c.evaluate.harness import PhiCLM
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = lm_eval.simple_evaluate(
    model=PhiCLM(sys.argv[1], n_ctx=256), tasks=["phi_c_choice"], task_manager=tasks, limit=2, bootstrap_iters=0
)
print("acc", found["results"]["phi_c_choice"]["acc,none"])
"""


def test_simple_evaluate(smollm2_path: Path, tasks: Path, tmp_path: Path) -> None:
    done = run("-c", _SCRIPT, str(smollm2_path), str(tasks), home=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "acc 1.0"


def test_error_is_one_line(tasks: Path, tmp_path: Path) -> None:
    arguments = ["--model", "phi-c", "--model_args", "model=/none.gguf", "--tasks", "phi_c_choice"]
    done = run("-m", "phi_c.evaluate", *arguments, "--include_path", str(tasks), home=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("phi-c: error: ")
    assert "Traceback" not in done.stderr
