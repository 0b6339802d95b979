"""Training the small model: the text, steps that resume bit for bit, experts that balance, a checkpoint that loads."""

import json

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dsopt.models import presets, tiny, train_tiny
from dsopt.models.train_tiny import Run, Settings

SMALL = {**presets.tiny(presets.v3()), "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
SETTINGS = Settings(steps=4, batch=2, context=16, warmup=2)
TEXT = tiny.text(["bisect", "heapq"])


def run(**changes) -> Run:
    return Run(Settings(**{**vars(SETTINGS), **changes}), TEXT, SMALL)


def test_text_is_whole_files_between_ends():
    train, heldout = tiny.text(tiny.MODULES), tiny.text(tiny.HELDOUT)
    for text in (train, heldout):
        assert int((text.tokens == tiny.END).sum()) == len(text.files) + 1
        assert text.tokens[0] == text.tokens[-1] == tiny.END
    assert not set(train.files) & set(heldout.files) and len(heldout.files) > 15
    assert "json/decoder.py" in heldout.files and "asyncio/events.py" in train.files
    assert tiny.text(["heapq"]).sha256 != tiny.text(["bisect"]).sha256
    assert tiny.text(["heapq", "no_such_module"]).sha256 == tiny.text(["heapq"]).sha256
    with pytest.raises(FileNotFoundError, match="no source"):
        tiny.text(["no_such_module"])


def test_strings_are_bytes_behind_an_end():
    assert tiny.encode("é\n").tolist() == [[0, 0xC3, 0xA9, 10]]
    assert tiny.decode(tiny.encode("def f(é):")) == "def f(é):"
    assert tiny.decode(torch.tensor([0xC3])) == "\ufffd"


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path):
    whole, first = run(), run()
    losses = [whole.step()[0] for _ in range(4)]
    for _ in range(2):
        first.step()
    first.save(tmp_path)
    second = run()
    assert second.resume(tmp_path) and second.done == 2
    assert [second.step()[0] for _ in range(2)] == losses[2:]
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match=r"is of a run with settings .*'seed': 0.*, not .*'seed': 1"):
        run(seed=1).resume(tmp_path)
    assert not run().resume(tmp_path / "elsewhere")
    shorter = run(steps=3)
    assert shorter.resume(tmp_path) and shorter.schedules == [[0, 4], [2, 3]]


def test_the_rate_rises_then_falls_to_its_last():
    rates = [SETTINGS.lr_at(step) for step in range(4)]
    assert rates[0] == SETTINGS.lr / 2 and rates[1] == rates[2] == SETTINGS.lr > rates[3]
    assert Settings().lr_at(Settings.steps) == pytest.approx(Settings.lr * Settings.last_lr)


def test_bias_moves_against_the_load():
    trained = run()
    (router,) = trained.balance.routers
    trained.balance.loads[0].copy_(torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5]))
    worst = trained.balance.update(0.5)
    assert worst == pytest.approx(9 / 5) and not trained.balance.loads[0].any()
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    trained.step()
    assert router.e_score_correction_bias.tolist() != [-0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_what_is_published_loads_in_bfloat16(tmp_path):
    trained = run()
    trained.step()
    trained.publish(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, value in trained.model.state_dict().items():
        kept = model.state_dict()[name]
        assert kept.dtype == (torch.float32 if "correction_bias" in name else torch.bfloat16), name
        assert torch.equal(kept, value.to(kept.dtype)), name


def test_the_command_trains_and_writes_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "CONFIG", SMALL)
    monkeypatch.setattr(tiny, "MODULES", ["bisect"])
    monkeypatch.setattr(tiny, "HELDOUT", ["heapq"])
    command = typer.Typer()
    command.command()(train_tiny.main)
    options = [str(tmp_path), "--steps", "3", "--batch", "1", "--context", "16", "--save-every", "1"]
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 0, done.output
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["tokens"] == 48 and [entry["step"] for entry in log["log"]] == [1, 2, 3]
    assert log["text"]["sha256"] == tiny.text(["bisect"]).sha256 and log["heldout"]["files"] == ["heapq.py"]
    assert not (tmp_path / train_tiny.RESUME).exists()
