"""Read damaged compact checkpoints: ``python tools/fuzz_compact.py --count 100000``.

Each is a small sound one of which one file was changed at random: bytes, or values in JSON. It is read, and every tenth
that passes is loaded, run and unpacked. A sound reading or a ValueError is right; any other end is printed with what
leads to it, and fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thanos import compact
from thanos.compact import read_manifest

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 0.5, 1e308, float("nan"), "", "x",
    "../x", "/etc/passwd", "bitmask", "sparse24", "columns", "bitmask_int8", "float16", "F16", "I8", "\ud800",
    [], [1], [0, 0], {},
]  # fmt: skip
SIZES = (0, 1, 7, 255, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)


def seeds(folder: Path) -> list[Path]:
    """Sound checkpoints with every kind of layer, with values as they were and with int8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    block = model.model.layers[0]
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj):
        layer.weight.data *= torch.rand(layer.weight.shape) < 0.4  # leaves negative zeros
    for layer in (block.self_attn.o_proj, block.mlp.up_proj):
        groups = layer.weight.data.view(len(layer.weight), -1, 4)
        groups.scatter_(-1, groups.float().abs().argsort(-1)[..., :2], 0)
    block.mlp.down_proj.weight.data[2:, ::3] = 0
    model.save_pretrained(folder / "pruned")
    found = []
    for values in compact.VALUES:
        compact.pack(folder / "pruned", folder / values, values=values)
        found.append(folder / values)
    return found


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """The data with a few bytes flipped, cut, doubled, or made an odd number."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(changed):
                changed[at] = draw.randrange(256)
            case 2:
                del changed[at : at + draw.randrange(1, 64)]
            case 3:
                changed[at:at] = changed[at : at + draw.randrange(1, 64)]
            case 4:
                del changed[at:]
            case _:
                start = draw.choice((0, at))
                changed[start : start + 8] = draw.choice(SIZES).to_bytes(8, "little")
    return bytes(changed)


def change_json(data: bytes, draw: random.Random) -> bytes:
    """The JSON with one value somewhere in it replaced, removed, or moved."""
    content = json.loads(data)
    place = content
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.2:
            break
        place = place[key]
    match draw.randrange(5):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[draw.choice(["x", "weight", str(key) + ".bits"])] = place.pop(key)
        case 2 if isinstance(place[key], int):
            place[key] += draw.choice((-1, 1, 16, 1 << 20))
        case 3:
            other = draw.choice(keys)
            place[key], place[other] = place[other], place[key]
        case _:
            place[key] = draw.choice(VALUES)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def try_one(folder: Path, scratch: Path, whole: bool) -> str:
    """How reading ends: "read", or the name of a refusal; any other error is raised."""
    try:
        read_manifest(folder)
        if whole:
            model = compact.load(folder)
            with torch.inference_mode():
                for tokens in (1, 8):
                    model(torch.arange(tokens, device="cpu", dtype=torch.int64)[None])
            compact.unpack(folder, scratch, overwrite=True)
    except UnicodeError:  # a ValueError, and no sentence
        raise
    except ValueError as error:
        return type(error).__name__
    return "read"


def fuzz(count: int, seed: int, every: int = 10, said: Callable[[str], Any] = print) -> Counter[str]:
    """How ``count`` damaged checkpoints end.

    Args:
        every: of those that are read, each such one is loaded, run and unpacked.

    Raises:
        AssertionError: one ends otherwise than read or refused.
    """
    draw = random.Random(seed)
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folders = seeds(Path(temporary))
        begin = time.perf_counter()
        for number in range(count):
            folder = draw.choice(folders)
            name = draw.choice(("compact.json", "compact.json", "config.json", "compact-00001-of-00001.safetensors"))
            path = folder / name
            sound = path.read_bytes()
            by_values = name.endswith(".json") and draw.random() < 0.7
            damaged = (change_json if by_values else change_bytes)(sound, draw)
            path.write_bytes(damaged)
            try:
                ends[try_one(folder, Path(temporary) / "scratch", number % every == 0)] += 1
            except Exception as error:
                reason = "".join(traceback.format_exception(error)[-3:])
                raise AssertionError(f"number {number} of seed {seed}, {folder.name}/{name}: {reason}") from error
            finally:
                path.write_bytes(sound)
            if (number + 1) % 10_000 == 0:
                said(f"{number + 1}: {dict(ends)}, {time.perf_counter() - begin:.0f} s")
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=10, help="load each such one, if it is read")
    chosen = parser.parse_args()
    try:
        print(dict(fuzz(chosen.count, chosen.seed, chosen.every)))
    except AssertionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
