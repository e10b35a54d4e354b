"""GPUs: which ones this process may use, and a lease that gives each to one job at a time.

The CUDA driver itself is asked, so CUDA_VISIBLE_DEVICES, SLURM's GRES and CUDA's own numbering hold without being
interpreted here, and neither torch nor CTranslate2 is needed to know whether there is a GPU.
"""

import ctypes
import importlib.util
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from cuepoint.errors import EnvironmentFault, LockedError
from cuepoint.locks import hold

log = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
# All runs on a machine share its GPUs, so the leases are not among one run's results; nor under TMPDIR, which a cluster
# may make anew for each job. Each user has a directory: what one user's jobs write, no other user can prepare.
LEASES = Path("/tmp") / f"cuepoint-gpu-{os.getuid()}"
_POLL = 0.5  # seconds between looks for a free GPU
# What CTranslate2 opens by name when it first runs on a GPU, after what that needs. (Its wheels need no cuDNN.)
_LIBRARIES = ("libcublasLt.so.12", "libcublas.so.12")


@dataclass(frozen=True)
class Gpu:
    """One GPU (or MIG slice) that this process can see."""

    index: int  # as CUDA numbers it in this process: `cuda:<index>`, `device_index=<index>`
    uuid: str  # as NVML and nvidia-smi spell it
    name: str
    memory: int  # bytes


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows to this process, in CUDA's order; none without a driver."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def count() -> int:
    """How many GPUs this process can see."""
    return len(gpus())


def choose(wanted: Literal["auto", "cuda", "cpu"]) -> Literal["cuda", "cpu"]:
    """The device for a `device` setting. Raises EnvironmentFault when a GPU is asked for and there is none."""
    if wanted == "cuda" and not gpus():
        raise EnvironmentFault(
            "device is cuda, but CUDA shows no GPU to this process: see whether nvidia-smi works here and what "
            "CUDA_VISIBLE_DEVICES is; on SLURM the job needs a GPU (gres); or set device to auto or cpu"
        )
    return "cuda" if wanted != "cpu" and gpus() else "cpu"


@contextmanager
def lease(among: Sequence[Gpu] | None = None, leases: Path = LEASES) -> Iterator[Gpu]:
    """Hold one of the GPUs (all visible ones by default) for the block; waits while others hold them all.

    The lease is the kernel's: it ends with the process, and the orphan of a killed run keeps its GPU to itself. It
    counts for all runs of this user on this machine, whatever their results directory.
    """
    among = gpus() if among is None else among
    if not among:
        raise EnvironmentFault("there is no GPU to lease: CUDA shows none to this process")
    leases.mkdir(mode=0o700, exist_ok=True)
    if (owner := leases.lstat().st_uid) != os.getuid():
        raise EnvironmentFault(f"the GPUs' leases belong into {leases}, which is user {owner}'s: have it removed")
    with ExitStack() as held:
        gpu = _first_free(leases, among, held)
        if gpu is None:
            log.warning("all %d GPUs are leased to other jobs: waiting for one of them", len(among))
        while gpu is None:
            time.sleep(_POLL)
            gpu = _first_free(leases, among, held)
        log.info("GPU %d: %s, %.0f GiB, %s", gpu.index, gpu.name, gpu.memory / 2**30, gpu.uuid)
        yield gpu


def load_cuda_libraries() -> None:
    """Load cuBLAS 12 from where pip put it, so that no LD_LIBRARY_PATH is needed.

    Raises EnvironmentFault when one is neither there nor on the system's own path.
    """
    missing = [name for name in _LIBRARIES if not _load(name)]
    if missing:
        raise EnvironmentFault(
            f"CTranslate2 needs {', '.join(missing)} to run on a GPU: pip install nvidia-cublas-cu12 (or set "
            "transcribe.device to cpu)"
        )


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    """Ask the driver API; its calls return 0 for success."""
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    identity = (ctypes.c_ubyte * 16)()
    memory = ctypes.c_size_t()
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetUuid_v2(ctypes.byref(identity), device)  # _v2: of the MIG slice where there is one
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    if failed:
        raise EnvironmentFault(f"the CUDA driver does not answer for GPU {index} (error {failed}): see nvidia-smi")
    text = name.value.decode()
    kind = "MIG" if " MIG " in text else "GPU"
    return Gpu(index=index, uuid=f"{kind}-{uuid.UUID(bytes=bytes(identity))}", name=text, memory=memory.value)


def _first_free(leases: Path, among: Sequence[Gpu], held: ExitStack) -> Gpu | None:
    """Lease the first free GPU into `held`; None when other processes hold them all."""
    for gpu in among:
        with suppress(LockedError):
            held.enter_context(hold(leases / f"{gpu.uuid}.lock", f"GPU {gpu.index}", wait=False))
            return gpu
    return None


def _load(library: str) -> bool:
    """Make `library` known to the dynamic loader under its own name: from pip's packages first, else the system's."""
    package = importlib.util.find_spec("nvidia")
    roots = list(package.submodule_search_locations or ()) if package else []
    candidates = [str(file) for root in roots for file in sorted(Path(root).glob(f"*/lib/{library}"))]
    for candidate in [*candidates, library]:
        with suppress(OSError):
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return True
    return False
