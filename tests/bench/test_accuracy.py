"""The accuracy benchmark at tiny sizes: its formulas, its table, and what would show a wrong cache."""

from __future__ import annotations

import json
import math

import pytest
import torch

import dsopt
from dsopt.bench import accuracy, accuracy_command
from dsopt.models import presets, tiny

pytest.importorskip("transformers")
CONFIG = {**presets.tiny(presets.v3()), "num_hidden_layers": 1, "first_k_dense_replace": 0}
TOKENS = torch.randint(1, 256, (130,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WAYS = ["eager float32", accuracy.BASE, "dsopt bfloat16", *accuracy.TARGETS]


@pytest.fixture
def model():
    made = presets.random_model(presets.config(CONFIG))
    made.lm_head.weight.data *= 20  # so that predictions differ
    return made


def test_windows_cover_each_token_once():
    tokens = torch.arange(23)
    pairs = list(accuracy.windows(tokens, context=5, batch=2))
    assert torch.equal(torch.cat([x.flatten() for x, _ in pairs]), tokens[:20])
    assert torch.equal(torch.cat([y.flatten() for _, y in pairs]), tokens[1:21])
    with pytest.raises(ValueError, match="more than 2 x 12"):
        next(accuracy.windows(tokens, context=12, batch=2))


def test_a_loss_is_that_of_each_token_behind_those_before_it(model):
    model = model.float()
    got = accuracy.predict(model, TOKENS[:41], context=10, batch=2)
    losses, best = [], []
    for place in range(40):
        start = place // 10 * 10
        with torch.no_grad():
            logits = model(TOKENS[None, start : place + 1].long(), use_cache=False).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[TOKENS[place + 1].long()].item())
        best.append(logits.argmax().item())
    assert got.loss == pytest.approx(sum(losses) / 40, rel=1e-5) and got.best.tolist() == best


def test_the_command_compares_all_ways(model, tmp_path, fresh_dynamo, capsys):
    model.save_pretrained(tmp_path)
    file = tmp_path / "result.json"
    accuracy_command.main(
        tmp_path, tokens=130, steps=4, context=16, batch=2, threads=None, json_file=str(file)
    )
    found = json.loads(file.read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert list(rows) == WAYS and found["text"]["sha256"] == tiny.text(tiny.HELDOUT).sha256
    base = rows[accuracy.BASE]
    assert base["over_base"] == 0 and base["same_token"] == 1 and base["perplexity"] > 2
    for row in found["rows"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["over_base"] == pytest.approx(row["perplexity"] / base["perplexity"] - 1, abs=1e-9)
        assert abs(row["over_base"]) < 0.05 and row["same_token"] > 0.8
    # each way is another one
    assert len({row["loss"] for row in found["rows"]}) == len(WAYS)
    assert found["steps"]["steps"] == 4 and 0 <= found["steps"]["same_token"] <= 1
    printed = capsys.readouterr().out
    assert all(way in printed for way in WAYS) and "of 4 steps" in printed


def test_wrong_input_is_told(tmp_path, model, capsys):
    import typer

    for folder, tokens, text in ((tmp_path / "none", None, "none"), (tmp_path, 20, "more than 4 x 512")):
        model.save_pretrained(tmp_path)
        with pytest.raises(typer.Exit):
            accuracy_command.main(folder, tokens=tokens)
        assert text in " ".join(capsys.readouterr().err.split())


def test_steps_tell_a_right_cache_from_a_wrong_one(model, monkeypatch):
    prompts, true = TOKENS[:40].view(2, 20).long(), dsopt.LatentCache

    class Forgetful(true):
        def update(self, key_states, value_states, layer_idx):
            return super().update(torch.zeros_like(key_states), value_states, layer_idx)

    monkeypatch.setattr(dsopt, "LatentCache", lambda config, dtype, room: true(config, "bf16", room))
    assert accuracy.same_steps(model, prompts, 6) == 1
    wrong = {"bf16": true, "fp8": Forgetful}
    monkeypatch.setattr(dsopt, "LatentCache", lambda config, dtype, room: wrong[dtype](config, "bf16", room))
    assert accuracy.same_steps(model, prompts, 6) < 0.9
