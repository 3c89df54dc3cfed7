"""Finding model files that come inside pip packages, without importing those packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ace_core.errors import ModelError


def packaged_file(package: str, relative: str, distribution: str) -> Path:
    """Path of a file or folder inside an installed package.

    Args:
        package: import name.
        relative: path below the package's folder; a glob pattern that matches one entry.
        distribution: what to give to pip, for the remedy.

    Raises:
        ModelError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the package {package} is not installed",
            where="encoders",
            remedy=f"pip install {distribution}, or set encoders.*.kind: transformers with a path of your own.",
        )
    found = sorted(Path(spec.origin).parent.glob(relative))
    if not found:
        raise ModelError(
            f"{package} has no {relative}",
            where=Path(spec.origin).parent,
            remedy=f"Install it again: pip install --force-reinstall {distribution}.",
        )
    return found[0]
