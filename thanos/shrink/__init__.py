"""Smaller models that run anywhere: fewer feed-forward channels, attention heads, decoder blocks and experts."""

from thanos.shrink.model import DAMPING, ShrinkPlan, Shrunk, check_shrink_options, shrink_model

__all__ = ["DAMPING", "ShrinkPlan", "Shrunk", "check_shrink_options", "shrink_model"]
