"""Whole models with random weights; see --help."""

from dsopt.bench.command import script

HELP = """
Whole models with random weights in eager, Inductor and dsopt: prefill and decoding in tokens per second, first steps
of a process with cold and warm caches, peak memory, and what a decode step costs besides its kernels.

  python benchmarks/bench_model.py  # V2-Lite, 3 layers, 128 to 8192 cached
  python benchmarks/bench_model.py --context 4096 --baseline dsopt  # dsopt alone
  python benchmarks/bench_model.py --layers 3,10 --json m.json --resume  # go on where m.json ends
  python benchmarks/bench_model.py --quick  # tiny widths: shows that it runs
"""

if __name__ == "__main__":
    script(__file__, HELP, "model")
