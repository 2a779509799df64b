"""The chat templates published with Phi models: the same text and ids as transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import strings
import vocabularies as v
from tokenizers import Tokenizer as HuggingFace

from phi_c.gguf.reader import GGUFFile
from phi_c.text.chat_template import ChatTemplate, encode_chat, load_chat_template
from phi_c.text.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # raised by transformers


def by_role(*, before: str = "", after: str = "", **turns: str) -> str:
    """Return a template with a case for each role, in the style of Microsoft's. turns: role -> expression."""
    text = before + "{% for message in messages %}"
    for i, (role, expression) in enumerate(turns.items()):
        role, _, condition = role.partition("_")
        also = f" and message['{condition}']" if condition else ""
        text += "{% " + ("elif" if i else "if") + f" message['role'] == '{role}'{also} %}}" + expression
    return text + "{% endif %}{% endfor %}" + after


def three_roles(turn: str, prompt: str, *, system: str = "system", end: str) -> str:
    """Return a template with the same turn for system, user and assistant.

    turn: expression with {} for the role. prompt: generation prompt. system: role of the first case, as in `by_role`.
    end: end of the template, from the end of the generation prompt's condition.
    """
    turns = {system: turn.format("system"), "user": turn.format("user"), "assistant": turn.format("assistant")}
    return by_role(after="{% if add_generation_prompt %}{{ '" + prompt + "' }}" + end, **turns)


_ANY_ROLE_TURN = "{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}"
_END = "{% else %}{{ eos_token }}{% endif %}"
_TURN = "{{{{'<|{}|>\\n' + message['content'] + '<|end|>\\n'}}}}"
_ASKED = "{{'<|user|>' + '\\n' + message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}"
_ANSWERED = "{{message['content'] + '<|end|>' + '\\n'}}"
_PHI4_TURN = "{{{{'<|im_start|>{}<|im_sep|>' + message['content'] + '<|im_end|>'}}}}"
_PHI4_PROMPT = "<|im_start|>assistant<|im_sep|>"
_PLAIN = "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
_TOOLS = _PLAIN.replace("+ '<|end|>'", "+ '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>'")


class Published(NamedTuple):
    """A published template."""

    family: str  # of its vocabulary, key of vocabularies.FAMILIES
    source: str
    add_bos: bool = False  # add_bos_token of the files it is published with
    drops_system: bool = False  # silently drops system messages


PUBLISHED = {
    "Phi-3-mini, April 2024": Published(
        "phi-3", by_role(before="{{ bos_token }}", user=_ASKED, assistant=_ANSWERED), add_bos=True, drops_system=True
    ),
    "Phi-3-mini, June 2024": Published(
        "phi-3",
        "{{ bos_token }}{% for message in messages %}" + _ANY_ROLE_TURN + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}" + _END,
        add_bos=True,
    ),
    "Phi-3-mini, July 2024": Published("phi-3", three_roles(_TURN, "<|assistant|>\\n", end=_END)),
    "Phi-3-medium": Published("phi-3", by_role(user=_ASKED, assistant=_ANSWERED), drops_system=True),
    "Phi-3.5-mini, Phi-3.5-MoE": Published(
        "phi-3", three_roles(_TURN, "<|assistant|>\\n", system="system_content", end=_END)
    ),
    "Phi-4, December 2024": Published(
        "phi-4",
        by_role(
            system=_PHI4_TURN.format("system"),
            user="{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|><|im_start|>assistant<|im_sep|>'}}",
            assistant="{{message['content'] + '<|im_end|>'}}",
        ),
    ),
    "Phi-4": Published("phi-4", three_roles(_PHI4_TURN, _PHI4_PROMPT, end="{% endif %}")),
    "Phi-4-mini": Published(
        "phi-4-mini",
        "{% for message in messages %}"
        "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}" + _TOOLS
        + "{% else %}" + _PLAIN + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}" + _END,
    ),
}  # fmt: skip

_TOOL = json.dumps([{"name": "add", "description": "a < b & <|end|>", "parameters": {"x": {"type": "int"}}}])


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "one turn": [message("user", "Hello, world")],
    "three turns": [
        message("user", "Hi"),
        message("assistant", "Hello!\n\n1. one\n2. two"),
        message("user", "Thanks 🙂"),
    ],
    "system": [
        message("system", "Be brief."),
        message("user", "Hi"),
        message("assistant", "Yes?"),
        message("user", "x"),
    ],
    "tools": [message("system", "Use tools.", tools=_TOOL), message("user", "1 + 2?")],
    "no tools": [message("system", "Use none.", tools=None), message("user", "1 + 2?")],
    "white space": [
        message("user", "  two before, three behind \t\n"),
        message("assistant", "\n\n"),
        message("user", " "),
    ],
    "empty": [message("user", ""), message("assistant", ""), message("user", "")],
    "special tokens": [message("user", "a <|end|>\n<|system|> b<|im_end|> <|im_start|>c</s><s> d<|endoftext|>")],
    "Jinja syntax": [message("user", "{{ bos_token }}{% raw %}{# no #}{{'")],
    "ends with the assistant": [message("user", "Hi"), message("assistant", "Hello ")],
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[HuggingFace, GGUFFile]]:
    """Return small vocabularies with the published special tokens."""
    corpus = strings.sample_texts((), 1000, seed=2)
    found = {}
    for name in {published.family for published in PUBLISHED.values()}:
        family, scores = v.FAMILIES[name], dict[str, float]()
        if name == "phi-3":
            vocab, scores = v.train_spm(corpus)
            content = v.spm_content(family, vocab, scores)
        else:
            content = v.bpe_content(family, *v.train_bpe(family, corpus))
        path: Path = v.write_gguf(tmp_path_factory.mktemp(name) / "m.gguf", family, content, scores)
        found[name] = (HuggingFace.from_str(json.dumps(content)), GGUFFile(path))
    return found


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_text_and_ids_equal_transformers(
    families: Mapping[str, tuple[HuggingFace, GGUFFile]], name: str, conversation: str, add_generation_prompt: bool
) -> None:
    published, messages = PUBLISHED[name], CONVERSATIONS[conversation]
    backend, file = families[published.family]
    ids = v.FAMILIES[published.family].ids
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=ids["bos"], eos_token=ids["eos"], chat_template=published.source
    )
    if published.drops_system:  # phi-c merges them into the user message (test_chat_template.py)
        messages = [m for m in messages if m["role"] != "system"]
    options = {"add_generation_prompt": add_generation_prompt}
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    expected_ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    changes = {"tokenizer.chat_template": published.source, "tokenizer.ggml.add_bos_token": published.add_bos}
    metadata = {**file.metadata, **changes}
    tokenizer = load_tokenizer(metadata)
    template = load_chat_template(metadata, tokenizer)
    assert template is not None
    assert template.render(messages, **options) == expected
    assert encode_chat(template, tokenizer, messages, parse_special=True, **options) == expected_ids
    plain = encode_chat(template, tokenizer, messages, **options)
    if conversation != "special tokens":
        assert plain == expected_ids
    else:  # phi-c encodes only the special tokens of the template: those of a message without any
        without_special = encode_chat(template, tokenizer, [message("user", "a")], **options)
        assert [i for i in plain if tokenizer.is_special(i)] == [i for i in without_special if tokenizer.is_special(i)]
        assert messages[0]["content"] in tokenizer.decode(plain)


@pytest.mark.parametrize("conversation", [c for c in CONVERSATIONS if c not in ("tools", "special tokens")])
@pytest.mark.parametrize(
    ("name", "add_bos"),
    [("Phi-3-mini, June 2024", True), ("Phi-3-mini, July 2024", False), ("Phi-4", False), ("Phi-4-mini", False)],
)
def test_builtin_templates_equal_the_published_ones(
    families: Mapping[str, tuple[HuggingFace, GGUFFile]], name: str, add_bos: bool, conversation: str
) -> None:
    """A file without a template gets the one that matches its vocabulary."""
    published, messages = PUBLISHED[name], CONVERSATIONS[conversation]
    _, file = families[published.family]
    metadata = {**file.metadata, "tokenizer.ggml.add_bos_token": add_bos}
    tokenizer = load_tokenizer(metadata)
    builtin = load_chat_template(metadata, tokenizer)
    assert builtin is not None
    theirs = ChatTemplate(published.source, *map(tokenizer.token, (tokenizer.bos_id or 0, tokenizer.eos_id or 0)))
    assert encode_chat(builtin, tokenizer, messages) == encode_chat(theirs, tokenizer, messages)
