"""Bytes to arrays: pictures, sounds, videos. Limits and errors in one place; one file's failure is one error."""

from ace_core.media.audio import decode_audio
from ace_core.media.causes import Cause
from ace_core.media.image import decode_image
from ace_core.media.kinds import SUFFIXES, mime_of, modality_of, sniff
from ace_core.media.video import VideoClip, decode_video

__all__ = [
    "SUFFIXES",
    "Cause",
    "VideoClip",
    "decode_audio",
    "decode_image",
    "decode_video",
    "mime_of",
    "modality_of",
    "sniff",
]
