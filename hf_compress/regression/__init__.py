"""Least squares on what calibration learned: what pruning and quantization both solve."""
