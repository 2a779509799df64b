"""SentencePiece BPE as its paper says it: merge the adjacent pair with the best score, the leftmost of equals."""

from itertools import pairwise

from phi_c.text.vocabulary import BYTE, CONTROL, UNKNOWN, Vocabulary


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Return the ids of a plain text, without BOS; slow and simple."""
    if not text:
        return []
    text = (" " if vocabulary.add_space_prefix else "") + text
    scores = {
        token: vocabulary.scores[i]
        for i, token in enumerate(vocabulary.tokens)
        if vocabulary.kinds[i] not in (UNKNOWN, CONTROL, BYTE) and i not in vocabulary.special
    }
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores.get(a + b, -1e30), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        best, at = max(pairs, default=(-1e30, 0))
        if best == -1e30:
            break
        symbols[-at : -at + 2] = [symbols[-at] + symbols[-at + 1]]
    ids = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens)))}
    result = []
    for symbol in symbols:
        known = symbol in scores
        result += [ids[symbol]] if known else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result
