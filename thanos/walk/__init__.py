"""One model: its blocks, how they are replayed, and the walk that prunes them one after the other."""
