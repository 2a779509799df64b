"""Hidden-state requests: hidden states of whole inputs as steps compute them, and their logits in chunks."""

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Group

import numpy as np
import numpy.typing as npt

from phi_c._core import CancelFlag
from phi_c.engine.engine import Engine
from phi_c.engine.loop import EngineLoop
from phi_c.engine.outputs import OutputQueue
from phi_c.engine.sequence import Finish, Sequence
from phi_c.errors import Cancelled

Floats = npt.NDArray[np.float32]

LM_HEAD_ROWS = 32  # positions whose logits, [n_vocab] each, are in memory at a time
_MAX_ACTIVE_SEQUENCES = 64  # submitted at a time
_MAX_UNREAD = 2 * _MAX_ACTIVE_SEQUENCES  # outputs, of at most n_batch tokens a step together


def stream_hidden_states(loop: EngineLoop, groups: Iterable[Group[Sequence]]) -> Iterator[tuple[Sequence, int, Floats]]:
    """Yield (sequence, first position, hidden states [n, n_embd]) as steps compute them, in order within a sequence.

    groups: hidden-state requests; those of a group share a prefix. The first of a group runs alone; the others then
    find the prefix in the cache. Groups run concurrently. Raises Cancelled when a sequence's cancel flag was set,
    ModelClosedError.
    """
    upcoming = iter(groups)
    followers: deque[Sequence] = deque()  # of groups whose first sequence is done
    active: dict[Sequence, Group[Sequence]] = {}  # -> the followers that wait for it
    outputs = OutputQueue(_MAX_UNREAD)
    try:
        while True:
            new: list[Sequence] = []
            while len(active) < _MAX_ACTIVE_SEQUENCES:
                # Followers first, before other sequences evict the pages that they share.
                group: Group[Sequence] = (followers.popleft(),) if followers else next(upcoming, ())
                if not group:
                    break
                active[group[0]] = group[1:]
                group[0].outputs = outputs
                new.append(group[0])
            if not active:
                return
            loop.submit(*new)
            for output in outputs.read():
                if output.error is not None:
                    raise output.error
                if output.finish is Finish.CANCELLED:
                    raise Cancelled("the call was cancelled")
                if output.finish is not None:
                    followers.extend(active.pop(output.sequence))
                if output.hidden_states is not None:
                    yield output.sequence, output.position, output.hidden_states
    finally:
        loop.cancel(active)


def hidden_states(loop: EngineLoop, sequence: Sequence) -> Floats:
    """Return all hidden states of one request: float32 [n_positions, n_embd]. Raises as `stream_hidden_states`."""
    return np.concatenate([states for _, _, states in stream_hidden_states(loop, [[sequence]])])


def logits_by_chunk(loop: EngineLoop, states: Floats, cancel: CancelFlag) -> Iterator[tuple[slice, Floats]]:
    """Yield (rows, logits of these rows) for a sequence's hidden states, at most LM_HEAD_ROWS rows at a time.

    states: float32 [n, n_embd]. Logits: float32 [n_rows, n_vocab]. Raises Cancelled when the flag was set,
    ModelClosedError.
    """
    for start in range(0, len(states), LM_HEAD_ROWS):
        if cancel.is_set():
            raise Cancelled("the call was cancelled")
        chunk = slice(start, min(start + LM_HEAD_ROWS, len(states)))
        yield chunk, _lm_head(loop, states[chunk])


def _lm_head(loop: EngineLoop, states: Floats) -> Floats:
    def run(engine: Engine) -> Floats:
        return engine.lm_head(states)

    return loop.call(run)
