"""What can go wrong when PTX is loaded or executed.

::

    EmulationError
      InvalidModule        the text is not the PTX that this package knows: syntax, declarations, operands
        UnknownInstruction   an opcode, modifier or type without a rule here
      InvalidLaunch        no such entry, wrong parameter buffer, block or shared memory over the limit
      OutOfMemory          an allocation over the memory's size limit
      MemoryFault          an address outside every living allocation; use after free; double free
      Misaligned           an address that is no multiple of the access's width
      UninitialisedRead    a register, shared or global byte that nobody has written; a shuffle from a lane that takes no part
      SharedRace           two threads, one shared address, at least one write, nothing that orders them (two writes of one
                           value pass)
      GlobalRace           the same in global memory
      BarrierDeadlock      a barrier that can never complete, or one in divergent code
      NoProgress           the launch took more steps than its limit: an endless loop, most likely
      Trap                 the kernel executed ``trap``

Errors raised while a kernel runs carry a note (``__notes__``) with the entry, the line and text of the instruction.
"""

from __future__ import annotations


class EmulationError(Exception):
    """Base of everything that this package raises on purpose."""


class InvalidModule(EmulationError):
    """The text is no PTX module that this package can read."""


class UnknownInstruction(InvalidModule):
    """An opcode, modifier, type or directive without a rule here.  Never skipped, never guessed."""


class InvalidLaunch(EmulationError):
    """The launch does not fit the entry: name, grid, block, parameter buffer or shared memory."""


class OutOfMemory(EmulationError):
    """An allocation over the memory's size limit."""


class MemoryFault(EmulationError):
    """An access outside every living allocation.

    Attributes:
        address: first address of the access that failed.
        nbytes: its width.
        space: "global", "shared", "local", "const" or "param".
        nearest: the nearest allocation in words ("" where there is none).
    """

    def __init__(self, reason: str, *, address: int, nbytes: int, space: str = "global", nearest: str = "") -> None:
        where = f"; nearest: {nearest}" if nearest else ""
        super().__init__(f"{reason}: {nbytes} bytes at {space} address {address:#x}{where}")
        self.address = address
        self.nbytes = nbytes
        self.space = space
        self.nearest = nearest


class Misaligned(EmulationError):
    """An address that is no multiple of the access's width."""


class UninitialisedRead(EmulationError):
    """A value that nobody has written was used."""


class SharedRace(EmulationError):
    """Two threads of a CTA touched the same shared bytes, at least one wrote, and nothing orders them."""


class GlobalRace(EmulationError):
    """Two threads touched the same global bytes, at least one wrote, and nothing orders them."""


class BarrierDeadlock(EmulationError):
    """A barrier (of the CTA or of a warp) that cannot complete, or that divergent threads reached."""


class NoProgress(EmulationError):
    """The launch took more steps than its limit."""


class Trap(EmulationError):
    """The kernel executed ``trap``."""
