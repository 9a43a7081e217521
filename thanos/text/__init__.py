"""Text: its readers, calibration samples and token streams."""

from thanos.text.beginning import BOS, Beginning, beginning, check_bos
from thanos.text.readers import NAMES, Text, check_source, load_text
from thanos.text.samples import Samples, load_packed, load_samples, text_tokens, tokenize, with_beginning

__all__ = [
    "BOS",
    "NAMES",
    "Beginning",
    "Samples",
    "Text",
    "beginning",
    "check_bos",
    "check_source",
    "load_packed",
    "load_samples",
    "load_text",
    "text_tokens",
    "tokenize",
    "with_beginning",
]
