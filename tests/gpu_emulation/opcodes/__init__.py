"""The rules of all opcodes, by family; importing this package registers them."""

from gpu_emulation.opcodes import arithmetic, bits, compare, control, convert, floating, integer, memory, move, warp

__all__ = ["arithmetic", "bits", "compare", "control", "convert", "floating", "integer", "memory", "move", "warp"]
