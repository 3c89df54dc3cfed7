"""``ace settings``: every setting with its value and what it does, as YAML."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel

from ace_core.config import Settings


def describe_settings(settings: Settings) -> str:
    """YAML that :func:`ace_core.settings_file.load_settings` reads back to equal settings, with comments."""
    return "\n".join(_lines(settings, 0)) + "\n"


def _lines(section: BaseModel, depth: int) -> list[str]:
    out = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        indent = "  " * depth
        if isinstance(value, BaseModel):
            purpose = (type(value).__doc__ or "").strip().partition("\n")[0]
            out += ["", f"{indent}# {purpose}"] if depth == 0 else []
            out += [f"{indent}{name}:", *_lines(value, depth + 1)]
        else:
            comment = f"  # {field.description}" if field.description else ""
            out.append(f"{indent}{name}: {_inline(value)}{comment}")
    return out


def _inline(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()
