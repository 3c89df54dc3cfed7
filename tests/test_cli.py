"""The command line as a newcomer meets it: help, exit codes, errors with a remedy."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ace_core.errors import AceError, MediaError, QualityError, QueryError, StoreError
from ace_core.settings_file import load_settings
from ace_store import Store
from pipelines import cli
from pipelines.cluster import reraise
from pipelines.commands import build
from pipelines.describe import describe_settings
from pipelines.search import Answer, parse_filters

COMMANDS = ["ingest", "publish", "search", "evaluate", "serve", "demo", "settings", "fit"]


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help_is_fast_and_names_every_command() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "--help"], capture_output=True, text=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert "ace demo" in done.stdout
    heavy = (
        "import sys, pipelines.cli; print([m for m in ('ray', 'torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
    assert min(times) < 3  # seconds of processor time, also where others take most of it


def test_the_commands_are_listed_in_the_order_of_use() -> None:
    command: Any = typer.main.get_command(cli.app)
    order = "ingest caption fit publish add remove rollback status gc search evaluate serve demo settings"
    assert " ".join(command.list_commands(None)) == order


@pytest.mark.parametrize("command", [*COMMANDS, "fit aligner", "fit quantizer", "fit generator", "fit all"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = _run(capsys, *command.split(), "--help")
    assert code == 0
    assert "Usage" in out and len(out.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["serch"], 2, "search"),
        (["search"], 2, "Missing argument 'TEXT'"),
        (["search", "x", "--bogus"], 2, "bogus"),
        (["publish", "--set", "quantiser.coarse=3"], 2, "quantizer"),
        (["publish", "--set", "quantizer.coarse=none"], 2, "quantizer.coarse"),
        (["publish", "--set", "nonsense"], 2, "section.key=value"),
        (["publish", "--config", "nowhere.yaml"], 2, "does not exist"),
        (["ingest", "--set", "corpus.path=nowhere"], 3, "corpus folder does not exist"),
        (["fit", "aligner"], 5, "ace ingest"),
        (["fit", "quantizer"], 5, "ace fit aligner"),
        (["fit", "generator"], 5, "ace fit quantizer"),
        (["publish"], 5, "ace ingest"),
        (["search", "x"], 5, "ace publish"),
        (["search", "x", "--store", "mistyped"], 5, "or check --store"),
        (["search", "two", "words", "-k", "3"], 5, "ace publish"),
        (["status", "--store", "/dev/null/store"], 5, "nothing in this store"),
        (["gc", "--store", "/dev/null/store"], 5, "nothing in this store"),
        (["gc"], 5, "nothing in this store"),
        (["evaluate"], 5, "ace publish"),
        (["serve"], 5, "ace publish"),
        (["add"], 5, "ace publish"),
        (["rollback"], 5, "ace publish"),
        (["remove", "x"], 5, "ace publish"),
        (["status"], 5, "nothing in this store"),
    ],
)
def test_mistakes_are_answered_with_a_remedy_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = _run(capsys, *arguments)
    assert (got, said in err) == (code, True), err
    assert err.startswith("error: ") and "Traceback" not in err and out == ""


@pytest.mark.parametrize("command", [[], ["fit"]])
def test_no_command_is_answered_with_the_help_alone(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, err = _run(capsys, *command)
    assert code == 2 and "Commands" in out + err and "error:" not in err


def test_the_words_of_a_search_need_no_quotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pipelines.search.search_once", lambda *args, **_: asked.append(args[2]) or Answer([], 0.0))
    assert cli.main(["search", "a", "red fruit", "-k", "3", "--store", str(tmp_path)]) == 0
    assert asked == ["a red fruit"]


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ("when=2024-01-02", "2024-01-02"),
        ("when={gte: 2024-01-02}", {"gte": "2024-01-02"}),
        ("at=12:30:45", "12:30:45"),
        ("left=no", "no"),
        ("code=007", "007"),
        ("name=null", "null"),
        ("name=", ""),
        ("year=2010", 2010),
        ("year=[2010, -1]", [2010, -1]),
        ("price=.5", 0.5),
        ("price=1e-3", 0.001),
        ("new=true", True),
        ("like=trueish", "trueish"),
        ("colour=#ff0000", "#ff0000"),  # as a comment it would be nothing, and remove what has no colour
        ("title=Picture #17: a bridge", "Picture #17: a bridge"),
        ("name=*", "*"),
        ("name=- 3", "- 3"),
        ("name='[a]'", "[a]"),
    ],
)
def test_conditions_are_read_as_json_reads_values(condition: str, value: object) -> None:
    [read] = parse_filters([condition]).values()
    assert read == value and type(read) is type(value)


def test_a_condition_that_is_no_condition_is_refused() -> None:
    for condition in ("colour", "colour={gte: 1"):
        with pytest.raises(QueryError, match="is not NAME=VALUE"):
            parse_filters([condition])


def test_an_attribute_that_is_asked_for_twice_is_refused() -> None:
    """The second would silently take the place of the first."""
    with pytest.raises(QueryError, match="colour is asked for twice") as error:
        parse_filters(["colour=red", "year=2010", " colour =blue"])
    assert "[a, b]" in error.value.remedy


def test_commands_are_listed_in_the_order_of_their_use(capsys: pytest.CaptureFixture[str]) -> None:
    listed = _run(capsys, "--help")[1].partition("Commands")[2]
    names = ["ingest", "caption", "fit ", "publish", "add", "search", "serve"]
    places = [listed.index(f"│ {name}") for name in names]
    assert places == sorted(places)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(capsys, "--version") == (0, f"ace {version('ace-retrieval')}\n", "")


def test_a_store_of_another_version_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Store.open(tmp_path).write_json("STORE.json", {"format_version": 7})
    code, _, err = _run(capsys, "publish", "--store", str(tmp_path))
    assert code == 5 and "version 7" in err and "remedy:" in err


def test_settings_come_from_the_file_here_and_the_command_line_wins(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ace.yaml").write_text("store: from-file\nsearch: {k: 7, beam: 33}\n")
    code, out, _ = _run(capsys, "settings", "--set", "search.k=9", "--store", "s3://bucket/x")
    shown = yaml.safe_load(out)
    assert code == 0
    assert (shown["store"], shown["search"]["k"], shown["search"]["beam"]) == ("s3://bucket/x", 9, 33)


def test_printed_settings_read_back_equal(tmp_path: Path) -> None:
    changed = load_settings(None, ("split.held_out=[a, b]", "corpus.captions='a: # b'", "serve.port=0"))
    for settings in (load_settings(), changed):
        (tmp_path / "all.yaml").write_text(describe_settings(settings))
        assert load_settings(tmp_path / "all.yaml") == settings


def test_an_unexpected_failure_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(build, "context_of", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["publish"])


def test_stopping_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "context_of", stopped)
    code, _, err = _run(capsys, "publish")
    assert code == 130 and "goes on from here" in err


def test_errors_from_workers_come_out_as_they_were() -> None:
    class Wrapped(MediaError):  # as Ray makes a class that is both its own error and ours
        pass

    inner = Wrapped("truncated", "it ends early", where="a.mp4", remedy="Copy it again.")
    outer = RuntimeError("task failed")
    outer.__cause__ = inner
    with pytest.raises(MediaError) as media:
        reraise(outer)
    assert type(media.value) is MediaError and media.value.cause == "truncated" and media.value.where == "a.mp4"

    class Failed(Exception):
        def __init__(self) -> None:
            self.worker_failures = {0: QualityError("collapsed", remedy="Use fewer codes.")}

    with pytest.raises(AceError, match="collapsed") as quality:
        reraise(Failed())
    assert type(quality.value) is QualityError
    full = RuntimeError("task failed")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
    with pytest.raises(StoreError, match=r"the disk is full .*Make room there"):
        reraise(full)
    with pytest.raises(ValueError, match="other"):
        reraise(ValueError("other"))


def test_a_full_disk_is_said_wherever_it_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")

    monkeypatch.setattr(build, "context_of", full)
    code, _, err = _run(capsys, "publish")
    assert code == StoreError.exit_code and "the disk is full" in err and "where:  /tmp/x" in err
