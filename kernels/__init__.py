"""Triton twins of the fused operations; this directory installs as ``advrad_fast.kernels``.

Empty in this version: the Triton kernels are not written yet.  The operations exist in plain PyTorch
(``advrad_fast.reference``) and in C++ for CPUs (``csrc/``, ``advrad_fast._native``).
"""
