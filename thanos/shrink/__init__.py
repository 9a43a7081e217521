"""Smaller models that run anywhere: fewer feed-forward channels, attention heads, decoder blocks and experts."""

from thanos.shrink.model import ShrinkPlan, Shrunk, shrink_model

__all__ = ["ShrinkPlan", "Shrunk", "shrink_model"]
