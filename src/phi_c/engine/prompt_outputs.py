"""Reads what a model makes of texts: the rows after the final norm as steps give them, and their logits in chunks."""

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

LM_HEAD_ROWS = 32  # whose logits, each of the vocabulary's width, are in memory together
_N_TOGETHER = 64  # sequences in the engine at a time


def read(engine: Engine, groups: Iterable[Group[Sequence]]) -> Iterator[tuple[Sequence, int, Floats]]:
    """Yield (sequence, position of the first row, rows [n, n_embd]) as steps compute them, in a sequence's order.

    Sequences of a group share a beginning: the first one goes ahead, and the others find its pages. Groups run together
    as far as the KV cache has room. Raises Cancelled when a sequence's flag was set, ModelClosedError.
    """
    coming = iter(groups)
    followers: deque[Sequence] = deque()
    active: dict[Sequence, Group[Sequence]] = {}  # -> those that follow it
    n_pages = 0  # that active ones take at most

    def start(sequence: Sequence, rest: Group[Sequence]) -> None:
        engine.add(sequence)
        active[sequence] = rest

    held: Group[Sequence] = ()  # a group that waits for room
    try:
        while True:
            while len(active) < _N_TOGETHER:
                # Followers first: what they share must not make room for others.
                held = held or (() if followers else next(coming, ()))
                sequence = followers[0] if followers else held[0] if held else None
                if sequence is None or (active and n_pages + pages_for(sequence.n_longest) > engine.kv.n_pages):
                    break
                n_pages += pages_for(sequence.n_longest)
                if followers:
                    start(followers.popleft(), ())
                else:
                    start(sequence, held[1:])
                    held = ()
            if not active:
                return
            engine.step(next(iter(active)))
            for sequence in list(active):
                is_done = sequence.is_done  # asked before the rows are taken: then none come after
                for first in sorted(sequence.rows):
                    yield sequence, first, sequence.rows.pop(first)
                if is_done:
                    followers.extend(active.pop(sequence))
                    n_pages -= pages_for(sequence.n_longest)
                    _check(sequence)
    finally:
        for sequence in active:
            engine.remove(sequence)


def _check(sequence: Sequence) -> None:
    if sequence.error is not None:  # another thread met it
        raise sequence.error
    if sequence.finish is Finish.CANCELLED:
        raise Cancelled("the call was cancelled")


def read_all(engine: Engine, sequence: Sequence) -> Floats:
    """Return the rows of one sequence, [n_output_rows, n_embd]."""
    return np.concatenate([rows for _, _, rows in read(engine, [[sequence]])])


def logits_by_chunk(engine: Engine, sequence: Sequence, rows: Floats) -> Iterator[tuple[slice, Floats]]:
    """Yield the logits, float32 [at most LM_HEAD_ROWS, n_vocab], of a sequence's rows, and which of the rows they are of.

    Raises Cancelled when the sequence's flag was set.
    """
    for start in range(0, len(rows), LM_HEAD_ROWS):
        if sequence.cancel is not None and sequence.cancel.is_set():
            raise Cancelled("the call was cancelled")
        chunk = slice(start, min(start + LM_HEAD_ROWS, len(rows)))
        yield chunk, engine.lm_head(rows[chunk])
