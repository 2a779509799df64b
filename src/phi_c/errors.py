"""The exceptions that phi-c raises: one base class, and one subclass for each failure that a caller may handle."""


class PhiError(Exception):
    """Base class of all phi-c errors. The message is one line: what was wrong, what was expected, what to do."""


class ModelFileError(PhiError):
    """A model file cannot be read, is corrupt or truncated, or does not have the expected format."""


class UnsupportedModelError(PhiError):
    """The model file is valid, but phi-c does not support its architecture, a tensor type or its tokenizer."""


class ModelNotFoundError(PhiError):
    """The model does not exist: no such file, preset, repository, revision or package file."""


class DownloadError(PhiError):
    """A download failed: no network, access denied, wrong checksum or broken connection."""


class CacheError(PhiError):
    """A cache folder cannot be read or written."""


class OutputError(PhiError):
    """An output file cannot be written."""


class OptionError(PhiError, ValueError):
    """An argument or option has an invalid value. A usage error on the command line."""


class ContextLengthError(PhiError, ValueError):
    """The prompt, or the prompt and the tokens that must follow it, does not fit the context."""


class MemoryLimitError(PhiError):
    """The request needs more memory than is available."""


class ChatTemplateError(PhiError):
    """The model has no usable chat template, or its template cannot render the messages."""


class StateError(PhiError):
    """A saved state is corrupt or truncated, or was saved by another model or with other options."""


class ModelClosedError(PhiError):
    """The model was closed before the call."""


class Cancelled(PhiError):  # noqa: N818 - not a fault: the caller requested it
    """The call was stopped through its cancel flag."""
