"""What every program of the benchmarks is asked with."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import benchmarks

_FOLDER = Path(benchmarks.__file__).parent
_OTHERS = {"ingest_run", "plots"}  # a process that `ingest` starts; the drawings of what `retrieval` measured
PROGRAMS = sorted({path.stem for path in _FOLDER.glob("*.py") if "__main__" in path.read_text()} - _OTHERS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_benchmark_can_be_quick_and_writes_its_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "--quick" in said and "--json" in said


def test_no_benchmark_is_missed() -> None:
    assert {"change", "decoding", "ingest", "paper", "publish", "retrieval", "search", "serving"} <= set(PROGRAMS)
