"""Fixtures for all test files. The helper functions are in common.py, the markers in pytest.ini."""
import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where there is no CUDA GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """cli(*arguments, script="sample") -> (exit status, stdout, stderr), run in an empty folder.

    `script` is the name of any module with a main(argv), for example "train" or "tools.film".
    """
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*arguments, script="sample"):
        # imported here: some tests set environment variables before `kernels` is imported
        main = importlib.import_module(script).main
        try:
            main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call
