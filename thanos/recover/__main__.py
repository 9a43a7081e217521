"""``python -m thanos.recover PRUNED --output DIR``."""

from thanos.commands.cli import start
from thanos.commands.recover import main

if __name__ == "__main__":
    start(main)
