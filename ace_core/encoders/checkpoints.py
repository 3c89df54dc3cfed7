"""Opening transformers checkpoints, from a local folder or a hub name, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ace_core.encoders.protocol import precision as precision
from ace_core.errors import ModelError

# The other towers of dual encoders: dropped after loading, they would only hold memory.
TEXT_PARTS = ("text_model", "text_projection", "prompts_generator")
MEDIA_PARTS = ("vision_model", "visual_projection", "audio_model", "audio_projection", "mit")


def load_checkpoint(path: str, *loaders: Any, setting: str) -> tuple[Any, ...]:
    """``loader.from_pretrained(path)`` for each loader (transformers' Auto classes).

    A model is loaded in float32 and set to evaluation. Only safetensors weights are read.

    Args:
        path: a local folder when it looks like a path or exists; a hub name otherwise.
        setting: the setting that named it, for errors.

    Raises:
        ModelError: the folder is missing or holds no checkpoint, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    local = folder.is_dir()
    # transformers takes a missing folder for a hub name and reports a malformed repository: say it ourselves.
    if not local and (folder.is_absolute() or path.startswith((".", "~")) or len(folder.parts) > 2):
        raise ModelError("the model folder does not exist", where=folder, remedy=f"Check {setting}.")
    if local and not (folder / "config.json").is_file():
        raise ModelError(
            "the folder holds no model (config.json is missing)",
            where=folder,
            remedy=f"Point {setting} at a folder that transformers' save_pretrained wrote.",
        )
    source = str(folder) if local else path
    loaded = []
    show_bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        for loader in loaders:
            loaded.append(_load(loader, source, local, setting))
    finally:
        if show_bars:
            enable_progress_bar()
    return tuple(loaded)


def _load(loader: Any, source: str, local: bool, setting: str) -> Any:
    is_model = "Model" in loader.__name__
    extra: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True} if is_model else {}
    try:
        part = loader.from_pretrained(source, **extra)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as e:
        remedy = (
            f"Check the files in that folder, or {setting}."
            if local
            else f"Check the name in {setting} and the network (HF_HUB_OFFLINE, HF_TOKEN), or download the model "
            "and give its folder."
        )
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ModelError(f"cannot load {loader.__name__}: {reason}", where=source, remedy=remedy) from None
    return part.eval() if is_model else part


def drop_parts(model: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Forget the named submodules."""
    for name in names:
        if isinstance(getattr(model, name, None), torch.nn.Module):
            setattr(model, name, None)


def pooled_output(output: Any) -> torch.Tensor:
    """The feature tensor of a ``get_*_features`` call (a tensor in transformers 4, a model output in 5)."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
