"""The engine on a model stub, as a Hypothesis state machine: sequences are submitted, read, left unread, cancelled,
removed and preempted, and steps fail. Every sequence gets the tokens that it would get alone.

The stub stores a hash of the whole prefix in each slot of a page, and its logits name the next token by that hash, so a
wrong page, position or order changes the output.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import phi_c
from phi_c._core import PAGE_TOKENS, Model
from phi_c.engine import engine as engine_module
from phi_c.engine.engine import Engine
from phi_c.engine.outputs import Output, OutputQueue
from phi_c.engine.scheduler import max_resident_pages
from phi_c.engine.sequence import Finish, Sequence
from phi_c.errors import Cancelled
from phi_c.sampling.params import SamplingParams
from phi_c.sampling.sampler import Sampler

N_VOCAB, N_EMBD = 200, 4
MAX_UNREAD = 5


def next_hash(previous: int, token: int) -> int:
    return (previous * 31 + token + 7) % 1_000_003


def hashes(tokens: list[int]) -> list[int]:
    found, current = [], 0
    for token in tokens:
        current = next_hash(current, token)
        found.append(current)
    return found


def expected_tokens(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(hashes(tokens)[-1] % N_VOCAB)
    return tokens[len(prompt) :]


class Stub:
    """Takes the place of `forward`."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], int] = {}
        self.fails = False

    def __call__(self, model: Any, kv: Any, tokens: Any, positions: Any, seq_ids: Any, tables: Any, *rest: Any) -> Any:
        _, rows, _, _, wants_hidden_states, _, cancels = rest
        if self.fails:
            raise MemoryError("the step failed")
        if all(flag.is_set() for flag in cancels):
            raise Cancelled("cancelled")
        found = []
        for token, position, sequence in zip(tokens.tolist(), positions.tolist(), seq_ids.tolist(), strict=True):
            table, before = tables[sequence], position - 1
            previous = self.slots[int(table[before // PAGE_TOKENS]), before % PAGE_TOKENS] if position else 0
            found.append(next_hash(previous, token))
            self.slots[int(table[position // PAGE_TOKENS]), position % PAGE_TOKENS] = found[-1]
        chosen = [found[row] for row in rows.tolist()]
        out = np.zeros((len(chosen), N_EMBD if wants_hidden_states else N_VOCAB), np.float32)
        for row, value in enumerate(chosen):
            if wants_hidden_states:
                out[row] = value
            else:
                out[row, value % N_VOCAB] = 1
        return out


def stub_lm_head(model: Any, kv: Any, states: Any) -> Any:
    out = np.zeros((len(states), N_VOCAB), np.float32)
    out[np.arange(len(states)), states[:, 0].astype(int) % N_VOCAB] = 1
    return out


class Caller:
    """A sequence and what its caller has read."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.outputs: list[Output] = []
        self.is_removed = False
        self.is_attentive = True  # reads after each step

    @property
    def is_done(self) -> bool:
        return bool(self.outputs) and self.outputs[-1].is_last

    def read(self) -> None:
        queue = self.sequence.outputs
        if not queue._queue.empty():
            self.outputs += queue.read()

    def check(self) -> None:
        """Compare what was read with what the sequence gets alone."""
        sequence = self.sequence
        prompt = sequence.tokens[: sequence.n_prompt]
        assert not any(output.is_last for output in self.outputs[:-1])
        assert all(str(output.error) == "the step failed" for output in self.outputs if output.error is not None)
        if sequence.output_from is None:
            tokens = [output.token for output in self.outputs if output.token is not None]
            assert tokens == expected_tokens(prompt, len(tokens))
            if self.is_done and self.outputs[-1].finish is Finish.LENGTH:
                assert len(tokens) == sequence.max_tokens
        else:
            parts = [output for output in self.outputs if output.hidden_states is not None]
            values = [int(row[0]) for output in parts if (rows := output.hidden_states) is not None for row in rows]
            assert values == hashes(prompt)[sequence.output_from :][: len(values)]
            if self.is_done and self.outputs[-1].finish is Finish.OUTPUTS_READY:
                assert len(values) == len(prompt) - sequence.output_from


class Request(NamedTuple):
    """What a sequence is made from."""

    n_prompt: int
    letter: int
    max_tokens: int
    output_from: int | None
    priority: int
    max_unread: int | None


REQUESTS = st.builds(
    Request,
    n_prompt=st.integers(1, 90),
    letter=st.integers(0, 9),
    max_tokens=st.integers(20, 100),
    output_from=st.none() | st.integers(0, 89),
    priority=st.integers(-1, 1),
    max_unread=st.sampled_from([MAX_UNREAD, None]),
)


def make_sequence(request: Request) -> Sequence:
    is_hidden = request.output_from is not None
    return Sequence(
        [request.letter] * request.n_prompt,
        0 if is_hidden else request.max_tokens,
        None if is_hidden else Sampler(SamplingParams(temperature=0), N_VOCAB),
        output_from=None if request.output_from is None else min(request.output_from, request.n_prompt - 1),
        priority=request.priority,
        outputs=OutputQueue(request.max_unread),
    )


class EngineMachine(RuleBasedStateMachine):
    """Runs an engine in one thread; see the module."""

    model: Model  # only its page size matters
    stub: Stub

    @initialize(n_pages=st.integers(4, 6), n_batch=st.integers(1, 60), window=st.none() | st.integers(2, 70))
    def start(self, n_pages: int, n_batch: int, window: int | None) -> None:
        self.engine = Engine(self.model, n_pages * PAGE_TOKENS, n_batch, window=window, max_step_seconds=0.0)
        self.stub.slots.clear()
        self.stub.fails = False
        self.callers: list[Caller] = []

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=6))
    def submit(self, requests: list[Request]) -> None:
        """Submit sequences together; those that can never fit are refused."""
        callers = [Caller(make_sequence(request)) for request in requests]
        scheduler = self.engine.scheduler
        self.engine.add([caller.sequence for caller in callers])
        for caller in callers:
            n_pages = max_resident_pages(caller.sequence.max_positions, scheduler.n_batch, scheduler.window)
            caller.read()
            assert caller.is_done is (n_pages > scheduler.pool.n_pages)
        self.callers += [caller for caller in callers if not caller.is_done]

    @rule(n=st.integers(1, 60))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.step()
            for caller in self.callers:
                if caller.is_attentive:
                    caller.read()

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def pause_or_continue(self, data: st.DataObject) -> None:
        caller = data.draw(st.sampled_from(self.callers))
        caller.is_attentive = not caller.is_attentive

    @precondition(lambda self: self.callers)
    @rule(data=st.data(), is_rare=st.integers(0, 3))
    def cancel(self, data: st.DataObject, is_rare: int) -> None:
        if is_rare:
            return
        data.draw(st.sampled_from(self.callers)).sequence.cancel.set()

    @precondition(lambda self: self.callers)
    @rule(data=st.data(), is_rare=st.integers(0, 3))
    def remove(self, data: st.DataObject, is_rare: int) -> None:
        if is_rare:
            return
        caller = data.draw(st.sampled_from(self.callers))
        self.engine.remove(caller.sequence)
        caller.is_removed = True

    @rule(is_rare=st.integers(0, 7))
    def failing_step(self, is_rare: int) -> None:
        if is_rare:
            return
        self.stub.fails = True
        self.engine.step()
        self.stub.fails = False

    @rule(is_rare=st.integers(0, 7))
    def forget(self, is_rare: int) -> None:
        """As in a forked child."""
        if is_rare:
            return
        self.engine.forget_sequences()
        self.callers.clear()

    @invariant()
    def outputs_are_those_of_a_sequence_alone(self) -> None:
        for caller in getattr(self, "callers", []):
            queue = caller.sequence.outputs
            if queue.max_unread is not None:
                assert queue._n_put - queue._n_read <= queue.max_unread + 1  # its end may come on top
            caller.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        for _ in range(10_000):
            for caller in self.callers:
                caller.read()
            if not scheduler.running and not scheduler.waiting:
                break
            self.engine.step()
        for caller in self.callers:
            caller.read()
            caller.check()
            assert caller.is_done or caller.is_removed, "a sequence never ends"
        assert scheduler.n_available_pages == scheduler.pool.n_pages


def run(path: Path, monkeypatch: pytest.MonkeyPatch, max_examples: int, n_rules: int) -> None:
    stub = Stub()
    monkeypatch.setattr(engine_module, "forward", stub)
    monkeypatch.setattr(engine_module, "lm_head", stub_lm_head)
    with phi_c.load(path, n_threads=1) as llm:
        machine = type("Machine", (EngineMachine,), {"model": llm.engine.model, "stub": stub})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=max_examples,
                stateful_step_count=n_rules,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_engine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, monkeypatch, 100, 40)


@pytest.mark.exhaustive
def test_engine_at_length(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(path, monkeypatch, 500, 60)
