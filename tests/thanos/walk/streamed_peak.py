"""Prints how many bytes a process grows by while a streamed model, the first argument, is made ready for a walk."""

import re
import sys
from pathlib import Path

import torch

from thanos.walk.decoder import find_decoder
from thanos.walk.memory import freed_memory_returned
from thanos.walk.replay import Capture
from thanos.walk.store import DiskStore
from thanos.walk.stream import load_streamed


def own_memory() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


model, files = load_streamed(sys.argv[1])
decoder = find_decoder(model.eval())
seen = [own_memory()]
for block in decoder.blocks:
    block.register_forward_hook(lambda *_: seen.append(own_memory()) and None)
with torch.no_grad(), freed_memory_returned():
    store = DiskStore(files, decoder.blocks, torch.device("cpu"))
    Capture(model, decoder, torch.randint(300, (1, 32)), store.running)
print(max(seen) - seen[0])
