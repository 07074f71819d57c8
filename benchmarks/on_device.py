"""What benchmarks of speed share: where they run, how they take times there, and tables of several devices.

Results of a GPU lie in a file of their own beside those of the CPU, with the name of the device.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def add_device_(parser: argparse.ArgumentParser) -> None:
    """The option --device."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (cpu)")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if info.exists() and names else platform.processor()


def device_name(device: torch.device) -> str:
    """The device, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def wait(device: torch.device) -> None:
    """Until the device is done with all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, often: int = 1) -> float:
    """Seconds of a call, the mean of some in a row, on a device that has nothing else to do before and after."""
    wait(device)
    start = time.perf_counter()
    for _ in range(often):
        work()
    wait(device)
    return (time.perf_counter() - start) / often


def clock(device: torch.device) -> float:
    """Seconds of the processor, or of the clock on a device that has nothing left to do."""
    wait(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def print_tables(print_table: Callable[[Path], None], cpu: Path, cuda: Path) -> None:
    """The table of the CPU, and that of the GPU if there is one."""
    print_table(cpu)
    if cuda.exists():
        print("\nOn a GPU:\n")
        print_table(cuda)
