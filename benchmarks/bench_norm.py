"""RMS norms, alone and behind a residual add; see --help."""

from dsopt.bench.command import script

HELP = """
RMS norm, alone and behind a residual add.

  python benchmarks/bench_norm.py  # V2-Lite's width, 1 to 512 tokens
  python benchmarks/bench_norm.py --model v3 --tokens 4096  # V3's width, a long prompt
  python benchmarks/bench_norm.py --device cuda  # on the GPU
"""

if __name__ == "__main__":
    script(__file__, HELP, "rms_norm,add_rms_norm")
