"""How much to remove where, at the same total: each choice maps layers to the share of their weights to remove."""

from thanos.allocate.curvature import Curve, curvature, layer_curve
from thanos.allocate.lamp import lamp
from thanos.allocate.owl import outlier_share, owl
from thanos.allocate.search import SearchState, search_counts
from thanos.allocate.total import MOST, fit_total, uniform

__all__ = [
    "MOST",
    "Curve",
    "SearchState",
    "curvature",
    "fit_total",
    "lamp",
    "layer_curve",
    "outlier_share",
    "owl",
    "search_counts",
    "uniform",
]
