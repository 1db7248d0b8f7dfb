"""This machine: what it has, what is free, what this process used at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

# The name that pip knows this toolkit by.
_OWN_DISTRIBUTION: Final = "onnx-distill-toolkit"
_TUNABLES: Final = "GLIBC_TUNABLES"
_VERSIONS: Final = (_OWN_DISTRIBUTION, "onnxruntime", "onnxruntime-genai", "onnx-ir", "numpy", "tokenizers")


@dataclass(frozen=True)
class Machine:
    """What measured: its processor, logical cores, memory, system, Python, and the versions of packages."""

    cpu: str
    cores: int
    ram_bytes: int
    os: str
    python: str
    versions: dict[str, str]


def this_machine() -> Machine:
    """Describes the machine that runs this."""
    return Machine(
        cpu=_cpu_name(),
        cores=psutil.cpu_count() or 1,
        ram_bytes=ram_bytes(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=package_versions(),
    )


def package_versions() -> dict[str, str]:
    """Returns the installed versions of everything that decides what comes out, by package; this code's own is
    `toolkit`."""
    found = {}
    for package in _VERSIONS:
        try:
            key = "toolkit" if package == _OWN_DISTRIBUTION else package.replace("-", "_")
            found[key] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cache_folder() -> Path:
    """Returns the folder for what is measured once and kept, which may not be there yet: `TOOLKIT_CACHE` names another
    than the system's own place for it."""
    if named := os.environ.get("TOOLKIT_CACHE"):
        return Path(named)
    places = {"Windows": os.environ.get("LOCALAPPDATA"), "Darwin": str(Path.home() / "Library" / "Caches")}
    place = places.get(platform.system()) or os.environ.get("XDG_CACHE_HOME")
    return (Path(place) if place else Path.home() / ".cache") / _OWN_DISTRIBUTION


def ram_bytes() -> int:
    """Returns the memory of the whole machine."""
    return int(psutil.virtual_memory().total)


def fits_the_page_cache(nbytes: int) -> bool:
    """Returns whether so many bytes of files may well lie in memory, or stay there: half of it would hold them."""
    return 2 * nbytes <= ram_bytes()


def free_memory_bytes() -> int:
    """Returns the bytes that a program may take without swapping."""
    return int(psutil.virtual_memory().available)


def physical_cores() -> int:
    """Cores without hyper-threads: what ONNX Runtime takes as threads when told to choose."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def threads() -> int:
    """Returns how many threads this process may keep busy: as OMP_NUM_THREADS says where it is set, as Dask does for
    its workers, else as many as there are logical cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(said)) if said.isdecimal() else os.cpu_count() or 1


def is_running(process: int) -> bool:
    """Whether a process of that number is there."""
    return psutil.pid_exists(process)


def peak_rss_bytes() -> int:
    """Returns the most bytes that this process ever held."""
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak is not None:  # Windows
        return int(peak)
    try:  # Linux: getrusage would count the parent this process was forked from
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        pass
    import resource

    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def free_disk_bytes(place: Path) -> int:
    """The bytes that are free on the disk where a place is or will be."""
    return shutil.disk_usage(_existing(place)).free


def _existing(place: Path) -> Path:
    """The nearest folder above a place that is there; the root itself, which has none above it."""
    # Unlike `resolve`, of a loop of links too.
    whole = Path(os.path.realpath(place))
    return next((above for above in whole.parents if above.is_dir()), whole)


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that is to decode: glibc, from 2.35 on, asks Linux for pages of 2 MiB, of
    which it gives none by itself where `transparent_hugepage` is `madvise` (glibc's manual, Memory Allocation
    Tunables). A step reads all weights, and looks up fewer pages so. What the user says of it stands."""
    said = environment.get(_TUNABLES, "")
    asked = said if "glibc.malloc.hugetlb" in said else ":".join(filter(None, [said, "glibc.malloc.hugetlb=1"]))
    return {**environment, **({_TUNABLES: asked} if sys.platform == "linux" else {})}
