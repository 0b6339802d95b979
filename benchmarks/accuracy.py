"""Perplexity and decode steps of the small trained model; see --help."""

from dsopt.bench.accuracy_command import main
from dsopt.bench.command import run_script

HELP = """
Perplexity of the small trained model on source that it was not trained on, in eager, dsopt, with FP8 weights and with
an FP8 cache, and how often a decode step with an FP8 cache picks the same token.

  python benchmarks/accuracy.py  # the whole text: minutes
  python benchmarks/accuracy.py --tokens 20000 --steps 32  # a part of it
  python benchmarks/accuracy.py --json auto  # and a dated result
"""

if __name__ == "__main__":
    run_script(__file__, HELP, main, {})
