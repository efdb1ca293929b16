"""Bytes a second of a switch between two models, against one large copy and against moving modules with `.to()`.

scripts/bench switch                      1 GB of Flux's transformer, on CUDA where it is, else on the CPU
scripts/bench switch --model flux-dev     all of it, for a GPU

On a CPU `.to("cpu")` would do nothing, so its work is done by hand: each tensor is copied to new memory, and back.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.base import Component
from pipelines.residency.packed import host_buffer
from pipelines.residency.residency import Residency
from scripts.tools.large_weights import CONFIGS, random_module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="flux-1gb")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size_bytes = sum(tensor.nbytes for tensor in random_module(given.model).parameters())
    print(f"{given.model}: {size_bytes / 1e9:.2f} GB of random bfloat16 on {device.type}, median of {given.rounds}")
    makes: dict[str, Callable[[], Callable[[], None]]] = {
        "one plain copy": lambda: plain_copy(size_bytes, device),
        "switch, packed": lambda: packed_switch(given.model, device),
        ".to() there and back": lambda: moving(given.model, device),
    }
    if device.type == "cuda":
        makes["enable_model_cpu_offload"] = lambda: offloading(given.model, device)
        rates = {name: measure({name: make()}, given.rounds, size_bytes)[name] for name, make in makes.items()}
    else:
        rates = measure({name: make() for name, make in makes.items()}, given.rounds, size_bytes)
    for name, rate in rates.items():
        print(f"{name:26} {rate / 1e9:6.2f} GB/s   switch / this: {rates['switch, packed'] / rate:.2f}")


def measure(turns: dict[str, Callable[[], None]], rounds: int, size_bytes: int) -> dict[str, float]:
    """Bytes per second, median of the rounds. Each round runs all in turn, so that other load affects them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            synchronize()
            started = time.perf_counter()
            turn()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: size_bytes / statistics.median(each) for name, each in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain_copy(size_bytes: int, device: torch.device) -> Callable[[], None]:
    """One copy of one buffer into new memory, as a switch needs it; from page-locked memory with CUDA."""
    source = host_buffer(size_bytes).random_(0, 255)
    if device.type == "cuda":
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(source.data_ptr(), source.nbytes, 0))

    def turn() -> None:
        torch.empty_like(source, device=device).copy_(source, non_blocking=True)

    return turn


def packed_switch(model: str, device: torch.device) -> Callable[[], None]:
    """Two models that do not fit together: one is evicted, the other acquired."""
    residency = Residency(device, copies_to_device=True)
    turns = [0]
    for key in "ab":
        residency.acquire(component(key), lambda _, key=key: random_module(model, ord(key)))
        residency.evict(key)

    def turn() -> None:
        key, other = ("a", "b") if turns[0] % 2 else ("b", "a")
        residency.evict(other)
        residency.acquire(component(key), lambda _: None)
        turns[0] += 1

    return turn


def component(key: str) -> Component:
    return Component("transformer", key, 0, Path("/nowhere"))


def moving(model: str, device: torch.device) -> Callable[[], None]:
    modules = [random_module(model, 1).to(device), random_module(model, 2)]

    def turn() -> None:
        there, here = modules
        if device.type == "cuda":
            there.to("cpu")
            here.to(device)
        else:
            reallocate(there)
            reallocate(here)
        modules.reverse()

    return turn


def reallocate(module: torch.nn.Module) -> None:
    """Copies each tensor to new memory, as `.to()` another device does."""
    for tensor in module.parameters():
        tensor.data = tensor.data.clone()


def offloading(model: str, device: torch.device) -> Callable[[], None]:
    """The switch of a diffusers pipeline with `enable_model_cpu_offload()` between two of its models."""
    from accelerate import cpu_offload_with_hook

    modules = [random_module(model, 1), random_module(model, 2)]
    first = cpu_offload_with_hook(modules[0], device)[1]
    second = cpu_offload_with_hook(modules[1], device, prev_module_hook=first)[1]
    hooks = [first, second]

    def turn() -> None:
        hooks[1].offload()
        hooks[0].hook.pre_forward(hooks[0].model)
        hooks.reverse()

    return turn


if __name__ == "__main__":
    main()
