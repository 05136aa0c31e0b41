"""A GPU for tensors without values, where there is none.

`FakeTensorMode` computes shapes and types on a "cuda" device anywhere. Indexing and autograd ask further: for the
device's guard, and whether PyTorch is built for it. A few lines of C++ answer, as long as a test runs.

https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/impl/DeviceGuardImplInterface.h (`NoOpDeviceGuardImpl`)
https://github.com/pytorch/pytorch/blob/v2.13.0/aten/src/ATen/detail/CUDAHooksInterface.h
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

static const Device first(DeviceType::CUDA, 0);

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return first; }
  Device exchangeDevice(Device) const override { return first; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, first); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, first); }
};

struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

static const Guard guard;
static const Hooks hooks;
static const impl::DeviceGuardImplInterface* guard_before;
static void* hooks_before;

static void*& functions_of(const at::CUDAHooksInterface& hooks) { return *(void**)&hooks; }

extern "C" void install() {
  guard_before = impl::device_guard_impl_registry[(int)DeviceType::CUDA].exchange(&guard);
  hooks_before = functions_of(at::detail::getCUDAHooks());
  functions_of(at::detail::getCUDAHooks()) = functions_of(hooks);
}

extern "C" void remove_again() {
  impl::device_guard_impl_registry[(int)DeviceType::CUDA].store(guard_before);
  functions_of(at::detail::getCUDAHooks()) = hooks_before;
}
"""


@cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("not run: no C++ compiler")
    pytorch, folder = Path(torch.__file__).parent, Path(tempfile.mkdtemp(prefix="fake-gpu-"))
    (folder / "guard.cpp").write_text(SOURCE)
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{pytorch / 'include'}", "-o", "guard.so"]
    libraries = [f"-L{pytorch / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([compiler, *options, "guard.cpp", *libraries], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "guard.so"))
    shutil.rmtree(folder)
    return library


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """Within, tensors without values may be on the device and have gradients, and autocast is as on a GPU."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    library = _library()
    library.install()
    try:
        with (
            patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            patch.object(torch.cuda, "is_bf16_supported", lambda: True),
        ):
            yield torch.device("cuda")
    finally:
        library.remove_again()
