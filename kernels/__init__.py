"""Triton twins of the fused operations; this directory installs as ``advrad_fast.kernels``.  Loading it loads nothing else.

- ``noise``, ``reconstruction_error``, ``votes``: one operation each, its kernels and a host function for tensors on a GPU, with
  the arguments of the C++ twins (``advrad_fast._native``).  These need Triton, and in practice PyTorch for the tensors.
- ``philox``: the noise stream as device functions.  ``arguments``: the checks of the host functions.
- ``aot``: compiles every kernel for every GPU, on a machine with none.  ``resources``: what the assembler made of it.
- ``manifest``: reads what ``aot`` wrote, without Triton: all that a launcher needs.

The numbers are tested in Triton's interpreter and by executing the compiled PTX on an interpreter of its own; the speed on a
GPU is **not yet measured**.  benchmarks/kernels.md has what can be computed without one.
"""
