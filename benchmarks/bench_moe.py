"""Routing and experts; see --help."""

from dsopt.bench.command import script

HELP = """
The choice of experts, and the experts that were chosen; bytes are those of the weights a call needs, each once.

  python benchmarks/bench_moe.py  # V2-Lite, 1 to 128 tokens
  python benchmarks/bench_moe.py --model v3 --tokens 1,8  # V3's experts, as many as fit in memory
  python benchmarks/bench_moe.py --op moe_experts --threads 1,2  # one op with one and two threads
  python benchmarks/bench_moe.py --json new.json --compare old.json  # ratios to an older result
"""

if __name__ == "__main__":
    script(__file__, HELP, "moe_route,moe_experts")
