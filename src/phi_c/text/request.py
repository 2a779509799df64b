"""Encoding of request inputs: prompts, messages and token ids become checked token ids."""

from collections.abc import Sequence
from typing import NamedTuple

from phi_c.arguments import check_token_ids
from phi_c.errors import ChatTemplateError, OptionError
from phi_c.text.chat_template import ChatTemplate, Message, encode_chat
from phi_c.text.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """An encoded prompt."""

    ids: list[int]
    is_raw: bool  # not rendered with the chat template: the output continues its text


def encode_raw(prompt: str | Sequence[int], tokenizer: Tokenizer, n_vocab: int, *, parse_special: bool) -> list[int]:
    """Return the ids of a prompt without the chat template; token ids are checked and returned unchanged.

    Raises OptionError for an empty prompt or an id outside the vocabulary.
    """
    if not isinstance(prompt, str):
        return check_token_ids(prompt, n_vocab)
    if not prompt:
        raise OptionError("the prompt is empty")
    return tokenizer.encode(prompt, parse_special=parse_special)


def encode_messages(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    model_name: str,
    *,
    parse_special: bool,
) -> list[int]:
    """Return the ids of a conversation rendered with the model's chat template.

    model_name: name of the model file, for error messages. Raises ChatTemplateError if the model has no template or the
    messages cannot be rendered.
    """
    if template is None:
        raise ChatTemplateError(
            f"{model_name} has no chat template and its vocabulary matches none of the built-in ones: use raw prompts"
        )
    return encode_chat(template, tokenizer, messages, parse_special=parse_special)


def encode_prompt(
    prompt: str | Sequence[int],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    model_name: str,
    n_vocab: int,
    *,
    raw: bool,
    system: str | None,
    parse_special: bool,
) -> Prompt:
    """Return the encoded prompt of a generation call.

    A str becomes the user message of a conversation, after a system message if `system` is given, unless `raw`. Token
    ids are always raw. Raises OptionError for an empty prompt, an id outside the vocabulary, or `system` with a raw
    prompt; ChatTemplateError as `encode_messages`.
    """
    is_raw = raw or not isinstance(prompt, str)
    if system is not None and is_raw:
        reason = "raw=True skips" if isinstance(prompt, str) else "token ids skip"
        raise OptionError(f"system needs the chat template, which {reason}: include it in the prompt instead")
    if isinstance(prompt, str) and prompt and not is_raw:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        return Prompt(encode_messages(messages, tokenizer, template, model_name, parse_special=parse_special), False)
    return Prompt(encode_raw(prompt, tokenizer, n_vocab, parse_special=parse_special), is_raw)
