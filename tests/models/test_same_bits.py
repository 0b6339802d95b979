"""Decoding whole models: a sequence's logits have the same bits in any batch, on any number of threads, every time."""

import pytest
import torch

import dsopt
from dsopt.models.decoder import Decoder, make_decoder

pytestmark = pytest.mark.slow

BATCHES = ((0,), (3, 1, 15), tuple(range(16)))
STEPS = (1, 2, 3, 4)
CACHED = 1020  # so that the new tokens cross from the second split of keys into the third
REPEATS = 20
# wide enough that every op but the router is worth two threads, even for one token
WIDTHS = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 3001,
    "num_hidden_layers": 2,
}


def lively(preset: str, dtype: torch.dtype) -> Decoder:
    """Weights large enough that every part of the model moves the logits."""
    model = make_decoder(preset, tiny=True, dtype=dtype, **WIDTHS)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7 * p.shape[-1] ** -0.5) if p.ndim > 1 else p.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["v2-lite", "v3"])
@torch.inference_mode()
def test_decoding_has_the_same_bits_in_any_batch_on_any_threads(preset, dtype, threads):
    model = lively(preset, dtype)
    fast = dsopt.compile(model, strict=True)
    ids = torch.randint(0, WIDTHS["vocab_size"], (16, sum(STEPS)))
    filled = model.new_cache(16, CACHED + sum(STEPS))
    for layer in filled:
        for x in filter(torch.is_tensor, layer):
            x.normal_()

    def decode(rows: tuple[int, ...]) -> torch.Tensor:
        cache = [type(layer)(*(x if x is None else x[list(rows)] for x in layer)) for layer in filled]
        logits, end = [], CACHED
        for length in STEPS:
            start, end = end, end + length
            new = ids[list(rows), start - CACHED : end - CACHED]
            logits.append(fast(new, torch.arange(start, end), cache))
        return torch.cat(logits, 1)

    # Dynamo compiles for a number of threads, and for one row or token apart from several
    with torch._dynamo.config.patch(recompile_limit=16):
        want = None
        for count in (1, 2):
            threads(count)
            for rows in reversed(BATCHES):
                for _ in range(REPEATS):
                    got = decode(rows)
                    want = got if want is None else want
                    assert torch.equal(got, want[list(rows)]), (count, rows)
    report = dsopt.report(fast)
    assert not report.fallbacks and all(k.backend == "cpu" for g in report.graphs for k in g.kernels)
    assert want.isfinite().all() and not torch.equal(want[0], want[1])
