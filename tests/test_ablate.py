"""tools/ablate.py: each part is really taken out, and the loss is reported."""
import numpy as np
import pytest
import torch
from tiny_training import copy_parts, losses, shrink

import meissonic
import train
from common import tiny_transformer
from tools import ablate


def inputs(time=0.1, score=6.0):
    ids = torch.zeros(1, 4, 4, dtype=torch.int64)
    return (ids, torch.ones(1, 5, 12), torch.ones(1, 16), torch.full((1, 5), score),
            torch.tensor([time]))


@pytest.mark.parametrize("part, changed", (("rate", dict(time=0.9)), ("micro", dict(score=2.0))))
def test_a_condition_that_is_taken_out_changes_nothing(part, changed):
    model = tiny_transformer()
    assert not torch.equal(model(*inputs()), model(*inputs(**changed)))
    ablate.change_model(part, model)
    assert torch.equal(model(*inputs()), model(*inputs(**changed)))


def test_without_rope_positions_are_learned():
    """On a picture of equal tokens nothing but positions tells the places apart."""
    model = tiny_transformer()
    ablate.change_model("rope", model)

    def block_positions():
        return model.features(*inputs())[0, ::2, ::2].flatten(0, 1)           # one of each 2 x 2

    features = block_positions()
    torch.testing.assert_close(features, features[:1].expand_as(features))
    learned = model.project_to_hidden_norm
    for table in (learned.rows, learned.columns):
        torch.nn.init.normal_(table.weight)
    features = block_positions()
    assert (features - features[:1]).abs().amax(1)[1:].min() > 1e-4


def test_without_qk_norm_the_size_of_queries_matters():
    """With QK-norm doubling q changes nothing."""
    g = torch.Generator().manual_seed(0)
    text, image = torch.randn(1, 3, 3, 2, 8, generator=g), torch.randn(1, 4, 3, 2, 8, generator=g)
    ones, cos, sin = (torch.ones(8),) * 2, torch.ones(4, 4), torch.zeros(4, 4)
    double = torch.tensor([2.0, 1, 1]).view(3, 1, 1)

    def change(part):
        attention = ablate.attention_of(part)
        plain = attention(text, image, ones, ones, cos, sin)
        other = attention(text * double, image * double, ones, ones, cos, sin)
        return (plain - other).abs().max()

    assert change("none") < 1e-5 and change("qk-norm") > 0.1


def test_changes_of_the_config():
    configs = train.MODELS["paper"]
    changed, compress = ablate.change_config("multimodal", configs, True)
    config = meissonic.Config(**changed["transformer"])
    assert (config.num_layers, config.num_single_layers) == (0, 42) and compress
    assert ablate.change_config("compression", configs, True) == (configs, False)
    assert train.MODELS["paper"]["transformer"] == {}


@pytest.mark.slow
def test_a_run_for_each_part(tmp_path, monkeypatch, capsys):
    """On the same pictures each model has another loss. No model is left."""
    shrink(monkeypatch)
    copy_parts(tmp_path / "parts")
    ablate.main([*ablate.PARTS, "--preset", "tiny", "--stage", "3", "--steps", "10", "--lr",
                 "0.1", "--init", str(tmp_path / "parts"), "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index("without          loss") + 1:]]
    assert [part for part, _ in table] == list(ablate.PARTS)
    seen = {part: tuple(losses(tmp_path / "run", part).values()) for part in ablate.PARTS}
    assert len(set(seen.values())) == len(ablate.PARTS)
    for part, mean in table:                      # of the last fifth
        assert float(mean) == pytest.approx(np.mean(seen[part][-2:]), abs=2e-4)
    assert not (tmp_path / "run" / "transformer").exists()


def test_an_unknown_part(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        ablate.main(["colour", "--out", str(tmp_path / "run")])
    assert caught.value.code == 2 and "rope" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
