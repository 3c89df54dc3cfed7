"""Settings: read from YAML, overridden, and refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from ace_core.config import Settings
from ace_core.errors import SettingsError
from ace_core.settings_file import load_settings


def test_defaults_need_no_file() -> None:
    changed = {"store", "corpus"}  # their folders become absolute
    assert load_settings().model_dump(exclude=changed) == Settings().model_dump(exclude=changed)


def test_relative_folders_become_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    changes = ("store=here", "corpus.path=s3://bucket/media", "serve.keys_file=keys")
    encoders = (
        "encoders.text={kind: transformers, path: clip}",
        "encoders.image={kind: transformers, path: openai/clip}",
    )
    settings = load_settings(None, (*changes, *encoders))
    assert settings.store == str(tmp_path / "here") and settings.corpus.path == "s3://bucket/media"
    assert settings.serve.keys_file == str(tmp_path / "keys")
    assert settings.encoders.text.path == str(tmp_path / "clip") and settings.encoders.image.path == "openai/clip"
    assert load_settings(None, ("store=s3://bucket/ace",)).store == "s3://bucket/ace"
    monkeypatch.chdir(tmp_path / "clip")
    assert load_settings(None, ("corpus.path=../media/",)).corpus.path == str(tmp_path / "media")


def test_a_way_up_behind_a_link_leads_where_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "v3").mkdir(parents=True)
    (tmp_path / "cur").symlink_to("real/v3")
    for written, meant in {"cur/../media": "real/media", "real/../media": "media", "cur/media": "cur/media"}.items():
        assert load_settings(None, (f"corpus.path={written}",)).corpus.path == str(tmp_path / meant)


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "ace.yaml"
    path.write_text("store: s3://bucket/prefix\nquantizer: {coarse: 32, fine_levels: 2}\n")
    settings = load_settings(path, ("quantizer.coarse=16", "search.mode=beam"))
    assert settings.store == "s3://bucket/prefix"
    assert (settings.quantizer.coarse, settings.quantizer.fine_levels) == (16, 2)
    assert settings.search.mode == "beam"


def test_empty_file_is_defaults(tmp_path: Path) -> None:
    (tmp_path / "ace.yaml").write_text("")
    assert load_settings(tmp_path / "ace.yaml") == load_settings()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("quantizer.corse=8", "Did you mean 'coarse'"),
        ("quantiser.coarse=8", "Did you mean 'quantizer'"),
        ("quantizer.coarse=1", "quantizer.coarse"),
        ("quantizer.coarse=many", "quantizer.coarse"),
        ("generator.width=30", "not a multiple"),
        ("serve.replicas=4", "max_replicas"),
        ("encoders.image.path=openai/clip", "encoders.image.kind=transformers too"),
        ("encoders.text.path=some/model", "kind is minilm"),
        ("store.path=x", "store"),
        ("nonsense", "section.key=value"),
        ("quantizer.coarse=[", "not YAML"),
    ],
)
def test_bad_settings_are_refused_by_name(override: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as failure:
        load_settings(None, (override,))
    assert failure.value.exit_code == 2 and failure.value.remedy


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load_settings(tmp_path / "none.yaml")
    for text, says in {"- a list": "not a mapping", "a: [": "not YAML"}.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SettingsError, match=says) as failure:
            load_settings(tmp_path / "bad.yaml")
        assert "`ace settings`" in failure.value.remedy


def test_an_error_is_located_where_the_value_was_given(tmp_path: Path) -> None:
    path = tmp_path / "ace.yaml"
    path.write_text("quantizer: {coarse: 1}\n")
    with pytest.raises(SettingsError, match="greater than or equal to 2") as failure:
        load_settings(path, ("quantizer.fine_levels=2",))
    assert failure.value.where == str(path)
    path.write_text("quantizer: {fine_levels: 2}\n")
    for wrong in ("quantizer.coarse=1", "quantizer.corse=8", "quantizer=x"):
        with pytest.raises(SettingsError) as failure:
            load_settings(path, (wrong,))
        assert failure.value.where == "--set"


def test_settings_that_do_not_fit_together_are_located_where_one_of_them_was_given(tmp_path: Path) -> None:
    path = tmp_path / "ace.yaml"
    path.write_text("corpus: {path: x}\n")
    for wrong in (
        ("encoders.image.path=foo",),
        ("encoders={image: {path: foo}}",),
        ("serve.replicas=3", "serve.max_replicas=2"),
    ):
        with pytest.raises(SettingsError) as failure:
            load_settings(path, wrong)
        assert failure.value.where == "--set"
    path.write_text("serve: {replicas: 3, max_replicas: 2}\n")
    with pytest.raises(SettingsError, match="max_replicas is below") as failure:
        load_settings(path, ("serve.port=80",))
    assert failure.value.where == str(path)


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Settings().quantizer.coarse = 3  # type: ignore[misc]
