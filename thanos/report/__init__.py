"""What a run did: its record, and how it is shown."""

from thanos.report.record import FILE_NAME, LayerReport, ModelReport, json_numbers, versions

__all__ = ["FILE_NAME", "LayerReport", "ModelReport", "json_numbers", "versions"]
