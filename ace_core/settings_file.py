"""Settings as a user gives them: one YAML file and ``section.key=value`` overrides, checked when they are read.

Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError

from ace_core.config import EncoderSettings, Settings
from ace_core.errors import SettingsError

Override = Annotated[str, "section.key=value"]
_SHOWN = "`ace settings` prints every setting as it is written, with what it does."


def load_settings(path: Path | None = None, overrides: tuple[Override, ...] = ()) -> Settings:
    """Read settings from YAML, then apply ``section.key=value`` overrides (values are YAML).

    Raises:
        SettingsError: the file is missing or malformed, or a key or value is refused; names the nearest key.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise SettingsError(
                "the settings file does not exist", where=path, remedy="Check --config, or leave it out for defaults."
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise SettingsError(f"the settings file is not YAML: {e}", where=path, remedy=_SHOWN) from None
        if loaded is not None and not isinstance(loaded, dict):
            raise SettingsError("the settings file is not a mapping", where=path, remedy=_SHOWN)
        raw = loaded or {}
    for override in overrides:
        key, eq, value = override.partition("=")
        if not eq:
            raise SettingsError(f"{override!r} is not section.key=value", where="--set", remedy=_SHOWN)
        *sections, leaf = key.strip().split(".")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise SettingsError(f"{section!r} is not a section", where=f"--set {override}", remedy=_SHOWN)
        try:
            node[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            remedy = "Put quotes around a text: --set 'section.key=\"...\"'."
            raise SettingsError(f"the value is not YAML: {e}", where=f"--set {override}", remedy=remedy) from None
    try:
        return _absolute(Settings.model_validate(_over(Settings().model_dump(), raw)))
    except ValidationError as e:
        raise _readable(e, path, overrides) from None


def _absolute(settings: Settings) -> Settings:
    """Relative folders are taken from the working directory here, once: Ray's workers have others."""

    def of(path: str | None) -> str | None:
        if path is None or "://" in path:
            return path
        # Without "..": the same corpus has the same name wherever a command is called from. What ".." leads to behind
        # a link is for the file system to say.
        parts = Path(path).expanduser().absolute().parts
        up = len(parts) - parts[::-1].index("..") if ".." in parts else 0
        return str(Path(os.path.realpath(Path(*parts[:up])), *parts[up:])) if up else str(Path(*parts))

    def model(path: str | None) -> str | None:  # a folder, or else the name of a model on a hub
        return of(path) if path is not None and Path(path).expanduser().exists() else path

    encoders = {
        name: (section := getattr(settings.encoders, name)).model_copy(update={"path": model(section.path)})
        for name in EncoderSettings.model_fields
    }
    captioners = {name: model(getattr(settings.caption, name)) for name in ("image", "audio")}
    return settings.model_copy(
        update={
            "caption": settings.caption.model_copy(update=captioners),
            "store": of(settings.store),
            "corpus": settings.corpus.model_copy(
                update={"path": of(settings.corpus.path), "root": of(settings.corpus.root)}
            ),
            "encoders": settings.encoders.model_copy(update=encoders),
            "serve": settings.serve.model_copy(update={"keys_file": of(settings.serve.keys_file)}),
        }
    )


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Defaults with what is given in their place, section by section: one key of a section can be set alone."""
    merged = dict(defaults)
    for key, value in given.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _readable(error: ValidationError, path: Path | None, overrides: tuple[Override, ...]) -> SettingsError:
    first = error.errors()[0]
    location = ".".join(str(p) for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = [override.partition("=")[0].strip() for override in overrides]
    # What does not fit together has no location: the message names the settings.
    named = [location] if location else re.findall(r"\w+(?:\.\w+)+", message)
    from_override = any(f"{n}.".startswith(f"{key}.") or key.startswith(f"{n}.") for key in given for n in named)
    where = "--set" if from_override else path or "settings"
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0.75)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
        return SettingsError(f"unknown setting {location!r}", where=where, remedy=hint)
    found = f"{location}: {message} (found {first['input']!r})" if location else message
    return SettingsError(found, where=where, remedy=_SHOWN)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location:
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(model.model_fields)
