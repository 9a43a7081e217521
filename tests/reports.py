"""Records of runs for tests, as ``pruning.json`` has them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def record(blocks: int = 3, experts: int = 0, **changes: Any) -> dict[str, Any]:
    """A run over ``blocks`` x (4 + 2 x ``experts``) layers."""
    draw = random.Random(0)
    layers = []
    for block in range(blocks):
        names = [f"model.layers.{block}.{kind}" for kind in KINDS]
        names += [
            f"model.layers.{block}.mlp.experts.{kind}[{index}]" for index in range(experts) for kind in ("up", "down")
        ]
        for name in names:
            layers.append(
                {
                    "name": name,
                    "shape": [64, 128],
                    "zeros": 4096,
                    "sparsity": 0.5,
                    "loss": draw.random(),
                    "relative_loss": 0.01 * draw.lognormvariate(0, 1),
                    "damping": 0.1 if draw.random() < 0.1 else 0.01,
                    "shared_with": None,
                    "tokens": draw.randrange(8, 4096),
                    "seconds": {"factor": 0.1, "solve": 0.25},
                    "pool_share": draw.random() if "[" in name else 0.0,
                }
            )
    return {
        "method": "thanos",
        "pattern": "2:4",
        "nominal_sparsity": 0.5,
        "effective_sparsity": 0.4987,
        "options": {"damping": 0.01, "outlier_fraction": 0.02, "model": "some/model", "device": "cpu"},
        "layers": layers,
        "excluded": ["model.layers.0.mlp.gate_proj"],
        "dense": {"model.layers.0.mlp.gate": "a router"},
        "passes": 1,
        "seconds": {"forward": 2.5, "prune": 1.25, "total": 3.75},
        "calibration": {"source": "my.jsonl", "samples": 4, "sequence_length": 32},
        "perplexity": {"dense": 20.5, "pruned": 25.25, "source": "wikitext2"},
        "command": "python -m thanos.prune some/model --output /a/private/place --pattern 2:4",
        "size": {"parameters": {"before": 10**6, "after": 10**6}, "bytes": {"before": 2 * 10**6, "after": 2 * 10**6}},
        "versions": {"python": "3.11", "thanos-pruning": "0.1.0"},
        **changes,
    }


def written(folder: Path, **changes: Any) -> Path:
    """A directory that holds the record."""
    folder.mkdir()
    (folder / "pruning.json").write_text(json.dumps(record(**changes)))
    return folder
