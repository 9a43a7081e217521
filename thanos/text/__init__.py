"""Text: its readers, calibration samples and token streams."""

from thanos.text.readers import NAMES, Text, check_source, load_text
from thanos.text.samples import Samples, load_samples, tokenize

__all__ = ["NAMES", "Samples", "Text", "check_source", "load_samples", "load_text", "tokenize"]
