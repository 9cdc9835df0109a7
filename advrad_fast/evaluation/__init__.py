"""Measuring a detector: the data sets, the metrics, and what the numbers are worth."""
