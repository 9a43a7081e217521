"""``python -m thanos.pack PRUNED_DIR --output DIR``; as a function, ``thanos.pack(source, output)``."""

import sys

from thanos.commands.cli import start
from thanos.commands.pack import main
from thanos.compact import pack

if __name__ == "__main__":
    start(main)
else:  # ``import thanos.pack`` binds the function too, so that ``thanos.pack`` is the same in any order of imports
    sys.modules[__name__] = pack  # type: ignore[assignment]
