"""Projections that share an input, and gated MLPs; see --help."""

from dsopt.bench.command import script

HELP = """
The first projections of attention, which share their input, and gated MLPs.

  python benchmarks/bench_linear.py  # V2-Lite, from 1 token
  python benchmarks/bench_linear.py --op gated_mlp --dtype float32  # one op in another dtype
  python benchmarks/bench_linear.py --tokens 1 --baseline eager  # without waiting for Inductor
  python benchmarks/bench_linear.py --plot roofline.png  # with a roofline
"""

if __name__ == "__main__":
    script(__file__, HELP, "multi_linear,gated_mlp")
