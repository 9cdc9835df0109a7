"""A strict PTX interpreter on NumPy: executes what Triton and nvcc emit for elementwise and reduction kernels, without a GPU."""

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
