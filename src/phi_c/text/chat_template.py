"""Chat templates: render messages into a model's prompt format, and encode them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from phi_c.errors import ChatTemplateError
from phi_c.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser

Message: TypeAlias = Mapping[str, Any]  # {"role": ..., "content": ...}

# These do not begin with BOS: the tokenizer adds it if the model file specifies it, which not every Phi-3 file does.
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PHI4_MINI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# For files without a template: (tokens that the vocabulary must have, its tokenizer model or None for any, template).
# The first match is used.
_BUILTIN: tuple[tuple[frozenset[str], str | None, str], ...] = (
    (frozenset({"<|im_start|>", "<|im_sep|>", "<|im_end|>"}), None, _PHI4),
    (frozenset({"<|user|>", "<|assistant|>", "<|end|>"}), "gpt2", _PHI4_MINI),
    (frozenset({"<|user|>", "<|assistant|>", "<|end|>"}), "llama", _PHI3),
    (frozenset({"<|im_start|>", "<|im_end|>"}), None, _CHATML),
)


class ChatTemplate:
    """A Jinja template, run in a sandbox with the settings and functions that transformers provides.

    It is compiled when messages are first rendered, which then raises ChatTemplateError for a syntax error.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """source: the template; bos_token, eos_token: names available to it."""
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @cached_property
    def _template(self) -> "Template":
        # Slow imports (50 ms), not needed for raw prompts.
        from jinja2 import TemplateError  # noqa: PLC0415
        from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
        from jinja2.nodes import Scope  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        class Generation(Extension):
            """{% generation %}: marks assistant output for training; renders its content."""

            tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

            def parse(self, parser: "Parser") -> "Node":
                line = next(parser.stream).lineno
                return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

        extensions = [loopcontrols, Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid Jinja: {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation.

        add_generation_prompt: end with the beginning of an assistant turn.

        If the template silently drops system messages, or rejects them, they are prepended to the first user message.

        Raises ChatTemplateError for malformed messages and for those that the template rejects.
        """
        checked = [_check(i, message) for i, message in enumerate(messages)]
        if not checked:
            raise ChatTemplateError("there are no messages, expected at least one")
        return self._render(self._merge_dropped_system(checked), add_generation_prompt)

    def _merge_dropped_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, with system messages merged into the first user message if the template drops them."""
        system = [m for m in messages if m["role"] == "system"]
        if not system:
            return messages
        # Rendered with unique markers as contents: a user message may equal a system message that is dropped.
        markers = _markers(len(system))
        remaining = iter(markers)
        marked = [{**m, "content": next(remaining)} if m["role"] == "system" else m for m in messages]
        try:
            text = self._render(marked, True)
        except ChatTemplateError:
            text = ""  # templates report "System role not supported" by raising
        if all(marker in text for marker in markers):
            return messages
        others = [m for m in messages if m["role"] != "system"]
        first_user = next((i for i, m in enumerate(others) if m["role"] == "user"), None)
        if first_user is None:
            raise ChatTemplateError(
                "the model's chat template has no system role: expected a user message to prepend the system message to"
            )
        parts = [m["content"] for m in system if m["content"].strip()] + [others[first_user]["content"]]
        others[first_user] = {**others[first_user], "content": "\n\n".join(parts)}
        return others

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # template code can raise anything
            raise ChatTemplateError(f"the chat template rejects these messages: {error}") from None

    def render_with_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation, and the (start, end) of each message content in it.

        Raises ChatTemplateError if the template changes a content by more than stripping it, so that it is not found.
        """
        checked = self._merge_dropped_system([_check(i, message) for i, message in enumerate(messages)])
        text = self._render(checked, add_generation_prompt)
        markers = _markers(len(checked))
        marked = self._render(
            [{**m, "content": marker} for m, marker in zip(checked, markers, strict=True)], add_generation_prompt
        )
        parts = re.split("(\ue000[0-9]+\ue001)", marked)
        not_found = ChatTemplateError(
            "the chat template changes the content of a message with special tokens: remove them, or set parse_special"
        )
        spans, position = [], 0
        for part in parts:
            if part not in markers:
                if not text.startswith(part, position):
                    raise not_found
                position += len(part)
                continue
            content = checked[markers.index(part)]["content"]
            for stripped in (content, content.strip(), content.rstrip(), content.lstrip()):
                following = parts[parts.index(part) + 1]
                if text.startswith(stripped + following, position):
                    spans.append((position, position + len(stripped)))
                    position += len(stripped)
                    break
            else:
                raise not_found
        return text, spans


def load_chat_template(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the chat template of a GGUF file, or the built-in one that matches its vocabulary; None: a base model."""
    tokens = set(tokenizer.vocabulary.tokens)
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        source = next(
            (
                template
                for needed, model, template in _BUILTIN
                if needed <= tokens and model in (None, tokenizer.vocabulary.model)
            ),
            None,
        )
    if source is None:
        return None
    names = [tokenizer.token(i) if i is not None else "" for i in (tokenizer.bos_id, tokenizer.eos_id)]
    return ChatTemplate(source, *names)


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    parse_special: bool = False,
) -> list[int]:
    """Return the token ids of a conversation, with exactly one BOS if the model uses it.

    add_generation_prompt: end with the beginning of an assistant turn.
    parse_special: encode special tokens inside messages as such; False: as plain text, so that messages cannot forge
        the template's own special tokens.

    Raises ChatTemplateError.
    """
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    pattern = tokenizer.special_pattern
    if pattern is None:
        return tokenizer.encode(text)
    contents = [str(m.get("content")) for m in messages]
    if parse_special or not any(pattern.search(content) for content in contents):
        return tokenizer.encode(text, parse_special=True)
    text, spans = template.render_with_spans(messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.with_bos(tokenizer.encode_with_special(text, _matches_outside(pattern, text, spans)))


def _matches_outside(pattern: re.Pattern[str], text: str, spans: list[tuple[int, int]]) -> Iterator[re.Match[str]]:
    """Yield the pattern's matches outside the spans."""
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        yield from pattern.finditer(text, position, start)
        position = end


def _markers(n: int) -> list[str]:
    """Return n strings of private-use characters that stand in for message contents."""
    return [f"\ue000{i}\ue001" for i in range(n)]


def _check(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"message {index} is {message!r:.60}, expected a mapping with role and content")
    if not isinstance(message.get("content"), str):
        found = type(message.get("content")).__name__
        raise ChatTemplateError(f"the content of message {index} is a {found}, expected a str")
    if message["role"] not in ("system", "user", "assistant", "tool"):
        raise ChatTemplateError(
            f"the role of message {index} is {message['role']!r}, expected system, user, assistant or tool"
        )
    return dict(message)


def _raise(message: str) -> NoReturn:
    raise ChatTemplateError(f"the chat template rejects these messages: {message}")


def _to_json(  # Jinja's own tojson escapes HTML characters
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime  # noqa: PLC0415 - few templates use the date

    return datetime.now().strftime(pattern)
