"""The paper in plain PyTorch, to be read in one sitting, and the truth that every backend is held against."""
