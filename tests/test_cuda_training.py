"""Training on a pretended CUDA device: every stage runs, and in a step the host never waits.

Losses are read every few steps. The restart of unused codes is every 50 steps. Saving, encoding
and the start of a stage may wait.
"""
import pytest
import torch
from pretended_cuda import pretended_cuda
from tiny_training import command, copy_run, losses, shrink

import meissonic
import train

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a PyTorch with CUDA")
MAY_WAIT = ("engine/log.py", "to_host",                     # losses, every READ_EVERY steps
            "engine/distributed.py",                        # full_tensor, for saving
            "engine/checkpoint.py", 'moments["step"]',      # the checks of loading and saving
            "engine/hub.py",                                # the choice of the device
            "engine/data.py", "cell_of", "torch.unique", "bincount(nearest")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Modules that move to the device get new parameters, and cached tables stay in one test."""
    def clear():
        meissonic.rope_table.cache_clear()
        meissonic.sinusoid_frequencies.cache_clear()

    clear()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    clear()


@pytest.mark.parametrize("stage, flags", (
    ("1", []), pytest.param("vq", [], marks=pytest.mark.slow),
    pytest.param("3", ["--accumulate", 2], marks=pytest.mark.slow),
    pytest.param("4", ["--checkpointing"], marks=pytest.mark.slow),
    pytest.param("4", ["--lora", 2], marks=pytest.mark.slow)), ids=str)
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch, stage, flags):
    shrink(monkeypatch)
    monkeypatch.setattr(train, "CAPTIONS_EVERY", 3)
    train.PRESETS["tiny"]["vq"].update(quantize_from=2, adversary_from=4)
    out = copy_run(tmp_path / "run", "*.checkpoint.*", *(["vqvae"] if stage == "vq" else []))
    steps = 6
    with pretended_cuda() as counts:
        command("--out", out, "--stage", stage, "--steps", steps, *flags)
    assert [step for _, step in losses(out)] == list(range(1, steps + 1))
    waits = [line for line in counts.syncs if not any(word in line for word in MAY_WAIT)]
    assert not waits, waits
    copies = {line: n for line, n in counts.copies.items() if n >= steps}
    expected = ("engine/distributed.py",                    # Run.to_device, from pinned memory
                ".to(run.device)", "random_points", "points[")        # at the start of a stage
    assert all(any(word in line for word in expected) for line in copies), copies
