"""Chat templates: messages to the text, and to the ids, that a model was trained on."""

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

# None begins with BOS: the tokenizer adds it where the file says so, as not every Phi-3 does.
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

# Tokens that a vocabulary must have for a template, and its kind of model; the first that fits is taken.
_KNOWN: tuple[tuple[frozenset[str], str | None, str], ...] = (
    (frozenset({"<|im_start|>", "<|im_sep|>", "<|im_end|>"}), None, _PHI4),
    (frozenset({"<|user|>", "<|assistant|>", "<|end|>"}), "gpt2", _PHI4_MINI),
    (frozenset({"<|user|>", "<|assistant|>", "<|end|>"}), "llama", _PHI3),
    (frozenset({"<|im_start|>", "<|im_end|>"}), None, _CHATML),
)


class ChatTemplate:
    """A Jinja template, run in a sandbox with the settings and functions that transformers gives it.

    It is read when messages are first rendered; damage shows then.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @cached_property
    def _template(self) -> "Template":
        # Half a tenth of a second that raw prompts and `--help` do without.
        from jinja2 import TemplateError  # noqa: PLC0415
        from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
        from jinja2.nodes import Scope  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        class Generation(Extension):
            """{% generation %} marks what the assistant says, for training: here it is its content."""

            tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

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
            raise ChatTemplateError(f"the model's chat template is damaged: {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation; raises ChatTemplateError for messages that it cannot hold.

        A system message that the template would drop in silence is put in front of the first user's message.
        """
        checked = [_check(i, message) for i, message in enumerate(messages)]
        if not checked:
            raise ChatTemplateError("there are no messages, expected at least one")
        return self._render(self._with_system(checked), add_generation_prompt)

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = [m for m in messages if m["role"] == "system"]
        if not system:
            return messages
        # Marks in place of the contents: a user may say the same as the system message that is dropped.
        marks = [f"\ue000{i}\ue001" for i in range(len(system))]
        left = iter(marks)
        try:
            text = self._render([{**m, "content": next(left)} if m["role"] == "system" else m for m in messages], True)
        except ChatTemplateError:
            text = ""  # "System role not supported" is said by raising
        if all(mark in text for mark in marks):
            return messages
        others = [m for m in messages if m["role"] != "system"]
        first_user = next((i for i, m in enumerate(others) if m["role"] == "user"), None)
        if first_user is None:
            raise ChatTemplateError("the model's chat template has no system role, and no user message takes it")
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
        except Exception as error:  # a template can fail in any way that Python can
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None

    def spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and where in it the contents of the messages lie.

        Raises ChatTemplateError when the template changes contents so much that they cannot be found again.
        """
        checked = self._with_system([_check(i, message) for i, message in enumerate(messages)])
        text = self._render(checked, add_generation_prompt)
        marks = [f"\ue000{i}\ue001" for i in range(len(checked))]
        marked = self._render(
            [{**m, "content": mark} for m, mark in zip(checked, marks, strict=True)], add_generation_prompt
        )
        parts = re.split("(\ue000[0-9]+\ue001)", marked)
        spans, at = [], 0
        for part in parts:
            if part not in marks:
                if not text.startswith(part, at):
                    raise ChatTemplateError("the chat template treats this text in a way that cannot be checked")
                at += len(part)
                continue
            content = checked[marks.index(part)]["content"]
            for form in (content, content.strip(), content.rstrip(), content.lstrip()):
                following = parts[parts.index(part) + 1]
                if text.startswith(form + following, at):
                    spans.append((at, at + len(form)))
                    at += len(form)
                    break
            else:
                raise ChatTemplateError("the chat template treats this text in a way that cannot be checked")
        return text, spans


def load_chat_template(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the file's chat template, else the known one that its vocabulary tells, else None: a base model."""
    tokens = set(tokenizer.vocabulary.tokens)
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        source = next(
            (
                template
                for needed, model, template in _KNOWN
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
    """Return the ids of a conversation, with exactly one BOS where the model has one.

    The template's special tokens are special; the same text inside a message is text, unless parse_special.
    Raises ChatTemplateError.
    """
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    pattern = tokenizer.special_pattern
    if pattern is None:
        return tokenizer.encode(text)
    contents = [str(m.get("content")) for m in messages]
    if parse_special or not any(pattern.search(content) for content in contents):
        return tokenizer.encode(text, parse_special=True)
    text, spans = template.spans(messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.with_bos(tokenizer.encode_spans(text, _outside(pattern, text, spans)))


def _outside(pattern: re.Pattern[str], text: str, spans: list[tuple[int, int]]) -> Iterator[re.Match[str]]:
    """Yield the matches in the gaps between spans."""
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        yield from pattern.finditer(text, at, start)
        at = end


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
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _to_json(  # Jinja's own escapes what HTML would read
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    from datetime import datetime  # noqa: PLC0415 - few templates ask for the date

    return datetime.now().strftime(pattern)
