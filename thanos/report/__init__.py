"""What a run did: its record, and how it is shown."""

from thanos.report.machine import machine, versions
from thanos.report.record import FILE_NAME, BlockReport, LayerReport, ModelReport, json_numbers

__all__ = ["FILE_NAME", "BlockReport", "LayerReport", "ModelReport", "json_numbers", "machine", "versions"]
