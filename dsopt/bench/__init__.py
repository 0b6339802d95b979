"""Measuring: ceilings of a machine, kernels beside baselines, whole models, and what a step costs besides kernels."""
