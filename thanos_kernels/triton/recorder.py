"""The launches that the kernels make, recorded as Triton's own JIT binds them, and compiled, for a chip not at hand.

A stand-in takes the place of Triton's driver: it names a chip, and its stopwatch runs what the autotuner wants timed
once. The JIT binds a launch's arguments as on that chip (the value 1 becomes a constant, multiples of 16 are marked)
and asks before it compiles; here the answer is no, and what it would have compiled is kept. Nothing runs, so tensors
on the meta device do, of any size.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner

CHIPS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class StandIn:
    """A driver of a chip that is not there.

    Attributes:
        device: the index of the current device. Triton keeps what it compiled by device, so the name of the chip is
            part of what it is given.
    """

    def __init__(self, chip: str) -> None:
        self.chip, self.device = chip, 0

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.chip]

    def get_current_device(self) -> Any:
        return self.chip, self.device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(call: Callable[[], None], **_: Any) -> list[float]:
            call()
            return [0.0, 0.0, 0.0]

        return once


@dataclass(frozen=True)
class Launch:
    """What determines the code of a launch.

    Attributes:
        chip: one of ``CHIPS``.
        module, kernel: where the ``@triton.jit`` function is.
        request: what it is to be compiled for, as ``JITFunction.preload`` takes it: JSON with the types of the
            arguments, constants, what is known of the others, warps, stages and the target.
    """

    chip: str
    module: str
    kernel: str
    request: str

    @property
    def name(self) -> str:
        """File and kernel."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"

    @property
    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = json.loads(self.request)
        return parts

    @property
    def types(self) -> dict[str, str]:
        """The Triton type of each argument, in order: ``*fp32``, ``i32``, ..., ``constexpr``."""
        signature: dict[str, str] = self._parts["signature"]
        return signature

    @property
    def constants(self) -> dict[str, Any]:
        """The value of each argument that is a constant to the compiler, declared so or the number 1."""
        parts, names = self._parts, list(self.types)
        return {names[key[0]]: value for key, value in zip(parts["constant_keys"], parts["constant_vals"], strict=True)}

    @property
    def divisible(self) -> set[str]:
        """The arguments that the compiler takes for multiples of 16."""
        parts, names = self._parts, list(self.types)
        known = zip(parts["attrs_keys"], parts["attrs_vals"], strict=True)
        return {names[key[0]] for key, values in known if ["tt.divisibility", 16] in values}

    @property
    def warps(self) -> int:
        return int(self._parts["options"]["num_warps"])

    @property
    def stages(self) -> int:
        return int(self._parts["options"]["num_stages"])


@contextmanager
def _driver_of(chip: str) -> Iterator[None]:
    """Inside, the stand-in is the active driver."""
    driver = triton.runtime.driver
    with patch.dict(vars(driver)):  # to ask for the driver before would start it, and fail where there is none
        driver.set_active(StandIn(chip))
        yield


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Inside, kernels are launched for ``chip`` and nothing runs; yields the list that their launches go to.

    Each configuration of an autotuner counts as a launch of its own, at every call.

    Raises:
        RuntimeError: Triton runs in its interpreter, which binds and compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches are not recorded in the interpreter: unset TRITON_INTERPRET before Python starts")
    launches: list[Launch] = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        request = json.loads(compile["specialization_data"])
        request["key"] = ""  # of a cache; two keys may ask for the same code
        launches.append(Launch(chip, fn.module, fn.name, json.dumps(request)))
        return True

    tuned = Autotuner.run

    def run(self: Autotuner, *arguments: Any, **options: Any) -> Any:
        self.cache.clear()  # else it would launch the best of a call before alone
        try:
            return tuned(self, *arguments, **options)
        finally:
            self.cache.clear()

    with _driver_of(chip), patch.object(Autotuner, "run", run), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = keep
        yield launches


def compiled(launch: Launch) -> Any:
    """The ``CompiledKernel`` of a launch, made by the JIT as on the chip itself; its errors are the compiler's."""
    function = getattr(import_module(launch.module), launch.kernel)
    with _driver_of(launch.chip), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function.preload(launch.request)
