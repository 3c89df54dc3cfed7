"""Frozen feature encoders behind one protocol. Nothing is loaded when this is imported."""

from __future__ import annotations

from ace_core.config import LimitSettings, MediaEncoderSettings, TextEncoderSettings
from ace_core.encoders.protocol import MediaEncoder, TextEncoder, TextFeatures
from ace_core.errors import SettingsError
from ace_core.items import Modality

__all__ = ["MediaEncoder", "TextEncoder", "TextFeatures", "load_media_encoder", "load_text_encoder", "text_model_path"]

_MODALITY_OF = {"efficientnet-lite0": Modality.IMAGE, "log-mel": Modality.AUDIO, "frames": Modality.VIDEO}


def load_text_encoder(settings: TextEncoderSettings, device: str = "cpu") -> TextEncoder:
    """The text encoder that the settings name.

    Raises:
        ModelError: its files cannot be had.
        SettingsError: a setting does not fit the model.
    """
    if settings.kind == "minilm":
        from ace_core.encoders.minilm import MiniLM

        return MiniLM(settings, device)
    from ace_core.encoders.text import TransformersText

    return TransformersText(text_model_path(settings), settings, device)


def text_model_path(settings: TextEncoderSettings) -> str:
    """The folder or hub name of the text model that the settings name.

    Raises:
        ModelError: its package is not installed.
        SettingsError: none is named.
    """
    if settings.kind == "minilm":
        from ace_core.encoders.minilm import minilm_folder

        return str(minilm_folder())
    if settings.path is None:
        raise SettingsError("no text model is named", where="encoders.text", remedy="Set encoders.text.path.")
    return settings.path


def load_media_encoder(
    modality: Modality, settings: MediaEncoderSettings, limits: LimitSettings, device: str = "cpu"
) -> MediaEncoder:
    """The encoder of one modality that the settings name.

    Raises:
        ModelError: its files cannot be had.
        SettingsError: the kind is of another modality, or a setting does not fit the model.
    """
    expected = _MODALITY_OF.get(settings.kind, modality)
    if expected is not modality:
        raise SettingsError(
            f"{settings.kind!r} encodes {expected}, not {modality}",
            where=f"encoders.{modality}.kind",
            remedy="Choose transformers or the kind of this modality.",
        )
    if settings.kind == "efficientnet-lite0":
        from ace_core.encoders.lite0 import Lite0Images

        return Lite0Images(limits, device)
    if settings.kind == "frames":
        from ace_core.encoders.frames import FrameVideos

        return FrameVideos(settings.frames, limits, device, settings.sampling)
    if settings.kind == "log-mel":
        from ace_core.encoders.logmel import LogMelSounds

        return LogMelSounds(limits)
    if settings.path is None:
        raise SettingsError("no model is named", where=f"encoders.{modality}", remedy=f"Set encoders.{modality}.path.")
    from ace_core.encoders import pretrained

    if modality is Modality.VIDEO:
        return pretrained.PretrainedVideos(settings.path, settings.frames, limits, device, settings.sampling)
    if modality is Modality.AUDIO:
        return pretrained.PretrainedSounds(settings.path, limits, device)
    return pretrained.PretrainedImages(settings.path, limits, device)
