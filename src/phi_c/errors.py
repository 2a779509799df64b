"""The errors that phi-c raises: one base class and a kind for each thing a caller may want to tell apart."""


class PhiError(Exception):
    """Base of every error that phi-c raises on purpose; its text is one line that says what to do."""


class ModelFileError(PhiError):
    """The model file is damaged, truncated, or no GGUF file at all."""


class UnsupportedModelError(PhiError):
    """The file is well formed, but its architecture, tensor type or tokenizer is not one that phi-c runs."""


class ModelNotFoundError(PhiError):
    """A model source names nothing that can be found."""


class DownloadError(PhiError):
    """A download failed: no network, refused access, a wrong checksum, a broken transfer."""


class CacheError(PhiError):
    """The cache folder cannot be read or written."""


class OutputError(PhiError):
    """A file that was asked for cannot be written."""


class OptionError(PhiError, ValueError):
    """An option has a value outside its range; a usage error on the command line."""


class ContextLengthError(PhiError, ValueError):
    """A prompt, or what was asked to follow it, does not fit the context."""


class MemoryLimitError(PhiError):
    """What was asked for needs more memory than the machine has."""


class ChatTemplateError(PhiError):
    """The messages cannot be rendered with the model's chat template."""


class StateError(PhiError):
    """A saved state is damaged, truncated, or belongs to another model or to other options."""


class ModelClosedError(PhiError):
    """The model was closed before the call."""


class Cancelled(PhiError):  # noqa: N818 - not a fault: somebody asked for it
    """The call was stopped through its cancel flag."""
