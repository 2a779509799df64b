"""Rewrites a `llama` GGUF file as a `phi3` file of the same model: matrices fused, q and k rows in NeoX order."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

import gguf
from tiny_gguf import write_and_close

Rows = npt.NDArray[np.uint8]


def fuse_llama_to_phi3(source: Path, target: Path) -> Path:
    """Write the phi3 file and return target; quantised rows are moved, not requantised."""
    reader = gguf.GGUFReader(source)
    tensors = {t.name: t for t in reader.tensors}
    n_heads = int(reader.fields["llama.attention.head_count"].contents())
    n_kv_heads = int(reader.fields["llama.attention.head_count_kv"].contents())
    writer = gguf.GGUFWriter(target, "phi3")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("llama.", "phi3.", 1), field.contents(), kind, sub_kind)
    for name, tensor in tensors.items():
        if ".attn_k." in name or ".attn_v." in name or ".ffn_gate." in name:
            continue
        data = tensor.data
        if ".attn_q." in name:
            q = _neox_order(data, n_heads)
            k = _neox_order(tensors[name.replace("attn_q", "attn_k")].data, n_kv_heads)
            data = np.concatenate([q, k, tensors[name.replace("attn_q", "attn_v")].data])
            name = name.replace("attn_q", "attn_qkv")
        elif ".ffn_up." in name:
            data = np.concatenate([tensors[name.replace("ffn_up", "ffn_gate")].data, data])
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    write_and_close(writer)
    return target


def _neox_order(rows: Rows, n_heads: int) -> Rows:
    """Undo the interleaving of GGUF `llama` files: rows 2 i and 2 i + 1 of a head become i and i + half."""
    pairs = rows.reshape(n_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
