"""A CUDA driver without a GPU: a ``libcuda.so.1`` behind which the real pycuda runs the real launch path.

:class:`FakeDriver` is the driver and its GPUs; ``library`` builds the shared object and loads it before pycuda is imported;
``entry_points`` is the table that its C source is made from.  Kernels run on the PTX emulator of :mod:`gpu_emulation`.
It is for tests only, and never on the path of anything else.
"""

from gpu_emulation.driver.codes import Code
from gpu_emulation.driver.devices import A100, H100, L4, ORIN, RTX5090, T4, DeviceSpec
from gpu_emulation.driver.fake import FakeDriver, launch_into_nothing
from gpu_emulation.driver.library import CannotFake
from gpu_emulation.driver.modules import Launch

__all__ = [
    "A100",
    "H100",
    "L4",
    "ORIN",
    "RTX5090",
    "T4",
    "CannotFake",
    "Code",
    "DeviceSpec",
    "FakeDriver",
    "Launch",
    "launch_into_nothing",
]
