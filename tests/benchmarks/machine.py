"""What a run ran on: the commit, the versions and the machine, without names of hosts or paths."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from tests.benchmarks.values import Machine

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "numpy", "grpcio", "sam2", "segrpc")


def commit() -> tuple[str, bool]:
    """Return the commit, and whether files differ from it; without git ``unknown``."""
    try:
        name, changes = (_git(*arguments) for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
    return name.strip(), bool(changes.strip())


def versions() -> dict[str, str]:
    """Return the versions of what computes and of what transports."""
    return {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}}


def machine(*, gpu: bool) -> Machine:
    """Describe the machine, with its first GPU if that is used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory / 2**30, 1),
        gpu=torch.cuda.get_device_name(0) if gpu else None,
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout
