"""Smaller models that run anywhere: fewer feed-forward channels, attention heads, decoder blocks and experts."""

from thanos.shrink.model import Shrunk, check_shrink_options, shrink_model

__all__ = ["Shrunk", "check_shrink_options", "shrink_model"]
