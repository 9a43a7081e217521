"""Smaller models that run anywhere: fewer feed-forward channels, attention heads, decoder blocks and experts."""

from thanos.shrink.model import ShrinkPlan, Shrunk, check_shrink_options, shrink_model

__all__ = ["ShrinkPlan", "Shrunk", "check_shrink_options", "shrink_model"]
