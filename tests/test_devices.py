"""GPUs: seen through the driver, leased one to a job. There is no GPU here, so the driver is a stand-in in C."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from cuepoint import devices
from cuepoint.devices import Gpu, lease
from cuepoint.errors import EnvironmentFault

PAIR = [Gpu(0, "GPU-a", "first", 2**30), Gpu(1, "GPU-b", "second", 2**30)]

DRIVER = r"""
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
  strcpy(name, device ? "Some GPU MIG 1g.5gb" : "Some GPU"); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { memset(uuid, 0xa0 + device, 16); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 8ul << 30; return 0; }
"""

HOLDER = """
import sys
from pathlib import Path
from cuepoint.devices import Gpu, lease
with lease([Gpu(0, "GPU-a", "first", 2**30), Gpu(1, "GPU-b", "second", 2**30)], Path(sys.argv[1])) as gpu:
    print(gpu.uuid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def fresh():
    devices.gpus.cache_clear()
    yield
    devices.gpus.cache_clear()


def test_without_a_driver_everything_runs_on_the_cpu_and_asking_for_cuda_says_what_to_do(monkeypatch):
    monkeypatch.setattr(devices, "DRIVER", "libthere-is-no-such-driver.so.1")
    assert (devices.count(), devices.choose("auto"), devices.choose("cpu")) == (0, "cpu", "cpu")
    with pytest.raises(EnvironmentFault, match="CUDA_VISIBLE_DEVICES"):
        devices.choose("cuda")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stand-in driver")
def test_gpus_are_what_the_driver_shows(tmp_path, monkeypatch):
    (tmp_path / "cuda.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, tmp_path / "cuda.c"], check=True)
    monkeypatch.setattr(devices, "DRIVER", str(library))
    assert devices.gpus() == (
        Gpu(0, "GPU-a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0", "Some GPU", 8 * 2**30),
        Gpu(1, "MIG-a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1", "Some GPU MIG 1g.5gb", 8 * 2**30),
    )
    assert devices.choose("auto") == "cuda"
    assert devices.choose("cpu") == "cpu"


def test_two_jobs_get_two_gpus_and_the_third_waits_for_an_orphan_to_end(tmp_path):
    leases = tmp_path / "leases"
    command = [sys.executable, "-c", HOLDER, str(leases)]
    orphan = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert orphan.stdout.readline() == "GPU-a\n"
    with lease(PAIR, leases) as second:
        assert second.uuid == "GPU-b"
        third = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "waiting" in third.stderr.readline()
        orphan.kill()
        orphan.wait()
        assert third.stdout.readline() == "GPU-a\n"
        third.communicate()


@pytest.mark.skipif(os.getuid() != 0, reason="needs a directory of another user")
def test_leases_that_another_user_prepared_are_not_used(tmp_path):
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(EnvironmentFault, match="user 12345's: have it removed"), lease(PAIR, tmp_path):
        pass


def test_a_missing_cuda_library_is_named_with_the_package_that_brings_it(monkeypatch):
    monkeypatch.setattr(devices, "_LIBRARIES", ("libcublas.so.0",))
    with pytest.raises(EnvironmentFault, match=r"libcublas\.so\.0.*pip install nvidia-cublas-cu12"):
        devices.load_cuda_libraries()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stand-in libraries")
def test_cuda_libraries_are_found_where_pip_puts_them(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    (tmp_path / "empty.c").write_text("")
    names = ("libcublasLt-stand-in.so.12", "libcublas-stand-in.so.12")
    for name in names:
        subprocess.run(["cc", "-shared", "-o", folder / name, f"-Wl,-soname,{name}", tmp_path / "empty.c"], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(devices, "_LIBRARIES", names)
    devices.load_cuda_libraries()
    for name in names:
        ctypes.CDLL(name)  # as CTranslate2 opens them: by name, from where they are loaded already
