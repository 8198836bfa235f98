"""What pytest hands to tests by name."""
import pytest


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """cli(*arguments) -> (exit status, stdout, stderr), run in an empty folder."""
    import sample                                  # not above: some tests set the environment before kernels is imported
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*arguments):
        try:
            sample.main([str(a) for a in arguments])
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err
    return call
