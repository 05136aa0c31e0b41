"""Settings on a CPU without units for bfloat16, unless a test says otherwise."""

from collections.abc import Iterator

import pytest

from tests.gpu_host import cpu_host


@pytest.fixture(autouse=True)
def _cpu_without_bf16() -> Iterator[None]:
    with cpu_host(bf16=False):
        yield
