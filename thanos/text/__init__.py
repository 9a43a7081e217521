"""Text: its readers, calibration samples and token streams."""
