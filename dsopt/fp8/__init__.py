"""FP8: formats, quantization and dequantization. Every backend's tests compare with what is computed here."""

from dsopt.fp8.arithmetic import check_scale, dequantize, quantize, scale_shape
from dsopt.fp8.formats import FP8Block, FP8Group, FP8Row

__all__ = ["FP8Block", "FP8Group", "FP8Row", "check_scale", "dequantize", "quantize", "scale_shape"]
