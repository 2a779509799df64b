"""SentencePiece BPE as its paper defines it: merge the adjacent pair with the highest score, leftmost first."""

from itertools import pairwise

from phi_c.text.vocabulary import BYTE, CONTROL, UNKNOWN, Vocabulary


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Return the token ids of a plain text, without BOS. Slow and simple."""
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
        best, position = max(pairs, default=(-1e30, 0))
        if best == -1e30:
            break
        symbols[-position : -position + 2] = [symbols[-position] + symbols[-position + 1]]
    ids = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens)))}
    result = []
    for symbol in symbols:
        result += [ids[symbol]] if symbol in scores else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return result
