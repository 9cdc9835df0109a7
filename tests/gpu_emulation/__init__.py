"""A strict PTX interpreter on NumPy: executes what Triton and nvcc emit for elementwise and reduction kernels, without a GPU.

::

    memory = Memory()
    x = memory.alloc(4096)
    memory.write(x, array)
    report = Module(ptx).launch("kernel", (8, 1, 1), (128, 1, 1), struct.pack("<Qi", x, 1024), memory, order_seed=1)

What it is strict about: every instruction of a module is understood whole when it is loaded, or loading raises
(:mod:`gpu_emulation.rules`); every access is checked for alignment, bounds, unwritten bytes and races; every register must
have been written, though undefined bytes may be moved about, as compilers do.  :mod:`gpu_emulation.errors` draws the tree of
errors.

What it finds about order: accesses of two threads that nothing orders, at least one a write, whichever came first here
(:mod:`gpu_emulation.order`, :mod:`gpu_emulation.shadow`); barriers in divergent code and ones that never complete; with
``order_seed``, results that depend on who comes first (CTAs, warps between barriers, turns of atomics).

What it does not find: a race that this launch's data did not lead to; a race between two writes of equal values (compilers
make those on purpose); synchronisation through the wrong location; three readers and a writer ordered against the last reader
only, where partial barriers are involved; what a cache does with a stale line, beyond .nc; anything about time.  Numbers: see
:mod:`gpu_emulation.rounding` for what is exact, and :mod:`gpu_emulation.opcodes.floating` for the approximations, which are
better here than on a device.

What it does not know, and refuses: matrix products, bulk and tensor copies, clusters, textures, functions and calls, generic
addresses, f8 and narrower types, f64 rounded other than to nearest, bar.arrive and bar.red.
"""

from gpu_emulation.errors import (
    BarrierDeadlock,
    EmulationError,
    GlobalRace,
    InvalidLaunch,
    InvalidModule,
    MemoryFault,
    Misaligned,
    NoProgress,
    OutOfMemory,
    SharedRace,
    Trap,
    UninitialisedRead,
    UnknownInstruction,
)
from gpu_emulation.memory import Memory
from gpu_emulation.module import Entry, Module
from gpu_emulation.report import Report, Traffic

__all__ = [
    "BarrierDeadlock",
    "EmulationError",
    "Entry",
    "GlobalRace",
    "InvalidLaunch",
    "InvalidModule",
    "Memory",
    "MemoryFault",
    "Misaligned",
    "Module",
    "NoProgress",
    "OutOfMemory",
    "Report",
    "SharedRace",
    "Traffic",
    "Trap",
    "UninitialisedRead",
    "UnknownInstruction",
]
