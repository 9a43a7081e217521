"""One layer: the naive form of the algorithm, and the engine that runs it fast."""
