"""Smaller models that run anywhere: fewer feed-forward channels, attention heads, decoder blocks and experts."""

from thanos.shrink.model import ShrinkPlan, Shrunk, shrink_model
from thanos.shrink.streamed import StreamedDepth

__all__ = ["ShrinkPlan", "Shrunk", "StreamedDepth", "shrink_model"]
