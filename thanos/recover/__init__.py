"""Training what pruning lost back into a model, its zeros kept (``python -m thanos.recover``)."""

from thanos.recover.options import RecoverOptions

__all__ = ["RecoverOptions"]
