"""``python -m thanos.unpack DIR --output PRUNED_DIR``; as a function, ``thanos.unpack(folder, output)``."""

import sys

from thanos.commands.cli import start
from thanos.commands.unpack import main
from thanos.compact import unpack

if __name__ == "__main__":
    start(main)
else:  # ``import thanos.unpack`` binds the function too, so that ``thanos.unpack`` is the same in any order of imports
    sys.modules[__name__] = unpack  # type: ignore[assignment]
