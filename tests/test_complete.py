"""`dsopt demo --generate`: every way completes the prompt, greedily and sampled, and its rate is shown."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dsopt import cli, complete
from dsopt.models import presets, tiny

pytest.importorskip("transformers")


def test_bytes_are_printed_as_text_when_they_are_whole():
    out = io.StringIO()
    printer = complete.Printer(Console(file=out))
    printer.put(tiny.encode("é ["))
    shown = []
    for byte in "é]".encode():
        printer.put(torch.tensor([byte]))
        shown.append(out.getvalue())
    printer.end()
    assert shown == ["é [", "é [é", "é [é]"] and out.getvalue() == "é [é]\n"
    printer.times = [0.0, 10.0, 10.5, 11.0]  # the prompt, then three tokens
    assert printer.rate == 2.0


def test_every_way_completes(tmp_path, fresh_dynamo):
    config = {**presets.tiny(presets.v3()), "num_hidden_layers": 1}
    presets.random_model(presets.config(config)).save_pretrained(tmp_path)
    out = io.StringIO()
    found = complete.show(Console(file=out, width=120), "def f", tokens=8, folder=tmp_path)
    runs = {(run["way"], run["how"]): run for run in found["completions"]}
    assert list(runs) == [
        (way, how) for way in ("eager", "dsopt", complete.NARROW) for how in ("greedy", "sampled")
    ]
    assert found["prompt"] == "def f" and all(run["tokens_per_s"] > 0 for run in runs.values())
    assert out.getvalue().count("def f") == 6 and "Tokens a second" in out.getvalue()
    assert "DeepSeek-V3: a token takes 656 bytes a layer in an FP8 cache, 81920 as" in out.getvalue()


def test_the_command_hands_over_what_was_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(complete, "show", lambda console, *given: asked.append(given) or {})
    for options in ((), ("--prompt", "import", "--new-tokens", "5")):
        assert CliRunner().invoke(cli.app, ["demo", "--generate", *options]).exit_code == 0
    assert asked == [(complete.PROMPT, 200), ("import", 5)]
