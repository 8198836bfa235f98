"""The published sizes, 1.5 B parameters: they load and make a picture on a CPU, in 16 GB."""
import json
import resource
import shutil
import struct
import subprocess
import sys

from common import GOLDEN, ROOT

LAYOUT = json.loads((ROOT / "tests" / "public_layout.json").read_text())


def sparse_safetensors(path, shapes):
    """A whole safetensors file of float32 zeros that takes no room on the disk: a header, then a hole."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, size = end, 4
        for n in shape:
            size *= n
        end += size
        header[name] = dict(dtype="F32", shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def full_size_checkpoint(folder):
    total = 0
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("vqvae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        entry = LAYOUT[f"MeissonFlow/Meissonic/{part}"]
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(entry["config"]))
        total += sparse_safetensors(folder / part / f"{stem}.safetensors", entry["tensors"])
    shutil.copytree(GOLDEN / "compressed" / "tokenizer", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"mask_token_id": 8255}')
    return total // 4


def test_the_published_size_makes_a_step_in_16_gb(tmp_path):
    parameters = full_size_checkpoint(tmp_path / "model")
    assert parameters > 1.5e9
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", tmp_path / "model", "--steps", "1", "--size", "512",
                           "--device", "cpu", "--out", tmp_path / "picture.png"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "picture.png").is_file(), done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 16e9, f"{peak / 1e9:.1f} GB"
