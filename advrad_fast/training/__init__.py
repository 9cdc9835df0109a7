"""Training: from a folder of good parts to one model file (needs the ``[train]`` extra: PyTorch)."""
