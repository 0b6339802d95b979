"""Every op, or those named with --op; see --help. The same as `dsopt bench`."""

from dsopt.bench.command import script

HELP = """
Measure kernels beside PyTorch, Inductor and installed peers, and against this machine's measured ceilings.

  python benchmarks/run.py  # every op at V2-Lite's geometry
  python benchmarks/run.py --op rope,moe_route --model v2-lite,v3  # some ops of two models
  python benchmarks/run.py --threads 1,2 --json auto  # a dated result in benchmarks/results
  python benchmarks/run.py --json r.json --resume  # go on where r.json ends
"""

if __name__ == "__main__":
    script(__file__, HELP, None)
