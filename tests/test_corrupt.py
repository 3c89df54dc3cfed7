"""What can be wrong with files, kind by kind: every one is refused for the right reason, and no good one is."""

from __future__ import annotations

import pytest

from ace_core.config import LimitSettings
from ace_core.errors import MediaError
from ace_core.items import Modality
from ace_core.media.decoders import AudioDecoder, Decoder, ImageDecoder, VideoDecoder
from ace_core.media.kinds import modality_of
from benchmarks.corrupt import DAMAGES, clip, picture, sound

LIMITS = LimitSettings()
DECODERS: dict[Modality | None, Decoder] = {
    Modality.IMAGE: ImageDecoder(LIMITS, min_side=64, side=32),
    Modality.AUDIO: AudioDecoder(LIMITS, 16_000),
    Modality.VIDEO: VideoDecoder(LIMITS, 4, 32),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_has_its_cause(kind: str) -> None:
    damage = DAMAGES[kind]
    for number in (0, 1, 2, 1_000_842):  # the last one's JPEG, cut, once looked corrupt
        with pytest.raises(MediaError) as error:
            DECODERS[modality_of(f"x.{damage.suffix}")](damage.make(number))
        assert error.value.cause in damage.causes


def test_good_files_are_decoded() -> None:
    for number in range(3):
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
            DECODERS[Modality.IMAGE](picture(number, kind))
        for kind in ("FLAC", "WAV", "OGG"):
            DECODERS[Modality.AUDIO](sound(number, kind))
        for kind, codec in (("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")):
            DECODERS[Modality.VIDEO](clip(number, kind, codec))
