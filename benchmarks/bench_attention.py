"""Attention, latent and dense, decoding and prefill; see --help."""

from dsopt.bench.command import script

HELP = """
Latent attention, grouped-query attention and the rotary embedding: decoding over a cache, and a prompt.

  python benchmarks/bench_attention.py  # V2-Lite, 128 to 8192 cached, and a prompt
  python benchmarks/bench_attention.py --model v3 --context 4096 --batch 1,8  # V3, one and eight sequences
  python benchmarks/bench_attention.py --tokens 512,2048 --context 2048  # prompts
  python benchmarks/bench_attention.py --backend cpu --plot roofline.png  # one backend, with a roofline
"""

if __name__ == "__main__":
    script(__file__, HELP, "mla_attention,attention,rope")
