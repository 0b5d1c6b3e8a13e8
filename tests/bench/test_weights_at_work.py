"""`ollm bench weights` from end to end, with a checkpoint of a few MB. The processes of cases are tested
elsewhere; here all cases run in this one."""

from __future__ import annotations

import json

import attrs
import cattrs
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig
from typer.testing import CliRunner

from ollm.cli import app
from ollm.errors import ConfigurationError
from ollm_bench import run as runner
from ollm_bench.records import Outcome
from ollm_bench.weights import checkpoints
from ollm_bench.weights.checkpoints import Llama, checkpoint_geometry, generated_geometry, write_checkpoint
from ollm_bench.weights.records import Report

LLAMA = Llama(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=2, vocabulary=64, dtype="float32")
SIZES = [
    "--layers", "4", "--hidden", "256", "--intermediate", "512", "--heads", "4", "--kv-heads", "2",
    "--vocabulary", "64", "--dtype", "float32",
]  # fmt: skip
LAYER = 4 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512 + 2 * 256)
OTHER = 4 * (2 * 64 * 256 + 256)


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(LLAMA, tmp_path / "model", lambda share: None)
    return tmp_path / "model"


def test_a_generated_checkpoint_is_what_its_geometry_says(checkpoint):
    planned = generated_geometry(LLAMA)
    assert planned.layer_bytes == [LAYER] * 4
    assert planned.other_bytes == OTHER
    assert planned.kv_bytes_per_token == 4 * 2 * 2 * 64 * 4
    found = checkpoint_geometry(checkpoint, fillable=True)
    assert attrs.evolve(found, name=planned.name, model="") == planned
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert sum(weight.nbytes for weight in model.parameters()) == planned.model_bytes
    assert all(weight.float().std() > 0.01 for weight in model.parameters() if weight.dim() == 2)


def test_a_checkpoint_is_written_in_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "_SHARD_BYTES", LAYER)
    shares = []
    write_checkpoint(LLAMA, tmp_path / "model", shares.append)
    shards = sorted(tmp_path.glob("model/*.safetensors"))
    assert len(shards) == len(shares) > 4
    assert shares[-1] == 1
    assert max(path.stat().st_size for path in shards) < LAYER + 8192
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "model")(torch.tensor([[1, 2]])).logits).all()


@pytest.mark.timeout(120)
def test_a_small_run(in_this_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["bench", "weights", *SIZES, "--steps", "2", "--kv-tokens", "1500", "--prompt", "20", "--json", "r.json"]
    )
    assert result.exit_code == 0, result.output
    assert "writing a checkpoint of random weights: 100%" in result.stderr
    report = cattrs.structure(json.loads((tmp_path / "r.json").read_text()), Report)
    by_label = {outcome.case.label: outcome for outcome in report.outcomes}
    assert by_label["accelerate, disk offload"].measured.first_seconds > 0
    assert {outcome.status for outcome in by_label.values()} == {"done"}
    measured = {label: outcome.measured for label, outcome in by_label.items()}
    per_step = {label: one.bytes_per_step - one.kv_bytes_per_step for label, one in measured.items()}
    # a step begins with what was read ahead in the one before, in up to three slots
    assert abs(per_step["ollm, nothing resident"] - 4 * LAYER) <= 3 * LAYER
    assert abs(per_step["ollm, 2 layers resident"] - 2 * LAYER) <= 2 * LAYER
    assert per_step["ollm, fit"] == 0
    assert measured["ollm, fit"].remark == "4 of 4 layers resident"
    # counted when nothing is read ahead; disks are read in whole blocks
    assert 4 * LAYER <= per_step["ollm, nothing resident, prompt of 20"] <= 1.02 * 4 * LAYER
    kv = measured["ollm, nothing resident, 1,500 tokens of KV"]
    assert kv.kv_bytes_per_step >= 1024 * report.geometry.kv_bytes_per_token
    assert len(measured["in memory"].step_seconds) == 2
    assert "of accelerate's time" in [verdict.what for verdict in by_label["ollm, nothing resident"].verdicts]
    (once,) = by_label["ollm, nothing resident, prompt of 20"].verdicts
    assert once.what == "of one reading of every weight"
    assert {path.name for path in tmp_path.iterdir()} <= {"r.json", "drop_caches"}, "the checkpoint is gone"


def test_a_checkpoint_of_ones_own_stays_as_it_is(in_this_process, checkpoint, tmp_path, monkeypatch):
    before = {path: path.stat() for path in checkpoint.iterdir()}
    monkeypatch.setattr(runner, "_run", lambda _, request, *__: in_this_process.append(request) or Outcome(
        case=request.case, status="failed", reason="not run"
    ))  # fmt: skip
    result = CliRunner().invoke(app, ["bench", "weights", "--model", str(checkpoint), "--cache-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert {request.geometry.model for request in in_this_process} == {str(checkpoint)}
    after = {path: path.stat() for path in checkpoint.iterdir()}
    assert {path: (one.st_ino, one.st_mtime_ns) for path, one in before.items()} == {
        path: (one.st_ino, one.st_mtime_ns) for path, one in after.items()
    }


def test_layers_that_cannot_be_filled_are_refused(tmp_path, checkpoint):
    Gemma3TextConfig(
        num_hidden_layers=4, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64, layer_types=["sliding_attention", "full_attention"] * 2,
    ).save_pretrained(tmp_path / "other")  # fmt: skip
    for name in ("model-00000.safetensors", "model.safetensors.index.json", "tokenizer.json"):
        (tmp_path / "other" / name).symlink_to(checkpoint / name)
    with pytest.raises(ConfigurationError, match="2 of its 4 layers have full attention"):
        checkpoint_geometry(tmp_path / "other", fillable=True)
    assert len(checkpoint_geometry(tmp_path / "other", fillable=False).layer_bytes) == 4
