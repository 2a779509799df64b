"""Hidden-state requests: hidden states of whole inputs as steps compute them, and their logits in chunks."""

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Group

import numpy as np
import numpy.typing as npt

from phi_c.engine.engine import Engine
from phi_c.engine.scheduler import pages_for
from phi_c.engine.sequence import Finish, Sequence
from phi_c.errors import Cancelled

Floats = npt.NDArray[np.float32]

LM_HEAD_ROWS = 32  # positions whose logits, [n_vocab] each, are in memory at a time
_MAX_ACTIVE_SEQUENCES = 64  # added to the engine at a time


def stream_hidden_states(engine: Engine, groups: Iterable[Group[Sequence]]) -> Iterator[tuple[Sequence, int, Floats]]:
    """Yield (sequence, first position, hidden states [n, n_embd]) as steps compute them, in order within a sequence.

    groups: hidden-state requests; those of a group share a prefix. The first of a group runs alone; the others then
    find the prefix in the cache. Groups run concurrently as far as the KV cache has room. Raises Cancelled when a
    sequence's cancel flag was set, ModelClosedError.
    """
    upcoming = iter(groups)
    followers: deque[Sequence] = deque()  # of groups whose first sequence is done
    active: dict[Sequence, Group[Sequence]] = {}  # -> the followers that wait for it
    n_pages = 0  # upper bound of what active sequences hold

    def start(sequence: Sequence, rest: Group[Sequence]) -> None:
        engine.add(sequence)
        active[sequence] = rest

    next_group: Group[Sequence] = ()  # waits for room
    try:
        while True:
            while len(active) < _MAX_ACTIVE_SEQUENCES:
                # Followers first, before other sequences evict the pages that they share.
                next_group = next_group or (() if followers else next(upcoming, ()))
                sequence = followers[0] if followers else next_group[0] if next_group else None
                if sequence is None or (active and n_pages + pages_for(sequence.max_positions) > engine.kv.n_pages):
                    break
                n_pages += pages_for(sequence.max_positions)
                if followers:
                    start(followers.popleft(), ())
                else:
                    start(sequence, next_group[1:])
                    next_group = ()
            if not active:
                return
            engine.step(next(iter(active)))
            for sequence in list(active):
                is_done = sequence.is_done  # read before the hidden states, so that none are added after them
                for position in sorted(sequence.hidden_states):
                    yield sequence, position, sequence.hidden_states.pop(position)
                if is_done:
                    followers.extend(active.pop(sequence))
                    n_pages -= pages_for(sequence.max_positions)
                    _check(sequence)
    finally:
        for sequence in active:
            engine.remove(sequence)


def _check(sequence: Sequence) -> None:
    if sequence.error is not None:  # raised in a step that another thread drove
        raise sequence.error
    if sequence.finish is Finish.CANCELLED:
        raise Cancelled("the call was cancelled")


def hidden_states(engine: Engine, sequence: Sequence) -> Floats:
    """Return all hidden states of one request: float32 [n_positions, n_embd]. Raises as `stream_hidden_states`."""
    return np.concatenate([states for _, _, states in stream_hidden_states(engine, [[sequence]])])


def logits_by_chunk(engine: Engine, sequence: Sequence, states: Floats) -> Iterator[tuple[slice, Floats]]:
    """Yield (rows, logits of these rows) for a sequence's hidden states, at most LM_HEAD_ROWS rows at a time.

    states: float32 [n, n_embd]. Logits: float32 [n_rows, n_vocab]. Raises Cancelled when the sequence's cancel flag
    was set, ModelClosedError.
    """
    for start in range(0, len(states), LM_HEAD_ROWS):
        if sequence.cancel is not None and sequence.cancel.is_set():
            raise Cancelled("the call was cancelled")
        chunk = slice(start, min(start + LM_HEAD_ROWS, len(states)))
        yield chunk, engine.lm_head(states[chunk])
