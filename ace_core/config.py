"""Typed settings, by section. Every one has a test that it changes something."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ace_core.items import Modality


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CorpusSettings(Section):
    """Where the media are."""

    path: str = Field("corpus", description="folder (or s3:// prefix) of media or of tar shards, or a table's file")
    format: Literal["auto", "folder", "webdataset", "table"] = Field("auto", description="what path is; auto looks")
    root: str | None = Field(
        None, description="folder or prefix that a table's uris are in; by default the one that the table is in"
    )
    captions: str | None = Field(
        None, description="captions file of a folder; by default captions.jsonl, .csv or .parquet in it"
    )
    media_column: str | None = Field(
        None, description="column of a table that names the media, or holds their bytes; by default a usual name"
    )
    caption_columns: tuple[str, ...] = Field(
        (), description="columns with captions; by default captions, caption, text"
    )
    id_column: str = Field("item_id", description="column with the item's id; without one, it is the path or the row")
    listed_only: bool = Field(False, description="leave out media that the captions file does not name")
    tries: int = Field(
        3, ge=1, description="ingestions that try a file that timed out, crashed its decoder or ran out of memory"
    )
    shard_items: int = Field(2048, ge=1, description="items written together: what a killed ingestion may repeat")
    shard_seconds: float = Field(10, gt=0, description="a shard is written at least this often")


class LimitSettings(Section):
    """What a media file may cost before it is refused."""

    max_bytes: int = Field(2_000_000_000, gt=0, description="bytes of one file")
    max_pixels: int = Field(178_000_000, gt=0, description="pixels of a picture or of one video frame")
    max_seconds: float = Field(4 * 3600, gt=0, description="duration of a sound or video")
    decode_seconds: float = Field(60, gt=0, description="time to decode one file (with isolate)")
    isolate: bool = Field(True, description="decode in child processes: a crash or a hang costs one file, not the job")


class SegmentSettings(Section):
    """Long sounds and videos are cut into segments, each an item of its own with a start and an end."""

    audio_seconds: float = Field(60, ge=0, description="length of a sound's segments; 0 leaves sounds whole")
    video_seconds: float = Field(30, ge=0, description="length of a video's segments; 0 leaves videos whole")
    overlap: float = Field(0.1, ge=0, le=0.9, description="share of a segment that the next one has too")

    def seconds(self, modality: Modality) -> float:
        """Length of the segments of a modality; 0 for none."""
        return {Modality.AUDIO: self.audio_seconds, Modality.VIDEO: self.video_seconds}.get(modality, 0.0)


class TextEncoderSettings(Section):
    """The text encoder that queries and captions go through."""

    kind: Literal["minilm", "transformers"] = "minilm"
    path: str | None = Field(None, description="model folder or hub name (kind: transformers)")
    max_tokens: int = Field(32, ge=4, le=512, description="tokens of a query that are read")
    fusion_layers: int = Field(3, ge=1, description="how many of the last layers the generator fuses")

    def in_folder(self, folder: Path) -> TextEncoderSettings:
        """The same reading of a model that lies in a folder."""
        return self.model_copy(update={"kind": "transformers", "path": str(folder)})


class TextTuningSettings(Section):
    """Training of the text encoder on the corpus' captions (`ace fit text`)."""

    layers: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0, description="how many of its last layers are trained; 0 leaves it frozen, all trains its embeddings too"
    )
    epochs: int = Field(8, ge=1)
    batch_size: int = Field(512, ge=2)
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class MediaEncoderSettings(Section):
    """The frozen encoder of one modality."""

    kind: Literal["efficientnet-lite0", "log-mel", "frames", "transformers"]
    path: str | None = Field(None, description="model folder or hub name (kind: transformers)")
    frames: int = Field(4, ge=2, le=64, description="frames sampled from a video (kind: frames, transformers)")
    sampling: Literal["uniform", "scenes"] = Field(
        "uniform", description="which frames: at equal distances, or of each scene of the video (decodes it twice)"
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="items encoded together; auto tries on the device what is fastest"
    )


class EncoderSettings(Section):
    """One encoder a modality, one for text. One corpus has one encoder set."""

    text: TextEncoderSettings = TextEncoderSettings()
    image: MediaEncoderSettings = MediaEncoderSettings(kind="efficientnet-lite0")
    audio: MediaEncoderSettings = MediaEncoderSettings(kind="log-mel")
    video: MediaEncoderSettings = MediaEncoderSettings(kind="frames")

    def media(self, modality: Modality) -> MediaEncoderSettings:
        return getattr(self, modality.value)


class SplitSettings(Section):
    """Which items and captions are kept out of training, for an honest evaluation."""

    attribute: str = Field("split", description="attribute that names an item's split")
    held_out: tuple[str, ...] = Field(("val", "test"), description="its values whose captions are never trained on")
    validation: str = Field("val", description="the value that the ranking mix and the calibration are fitted on")
    keep_one_caption: bool = Field(
        True, description="keep the last caption of a trained item (with two or more) as a query for seen items"
    )
    fraction: float = Field(
        0.1, ge=0, le=0.5, description="share of captioned items held out where no item names its split"
    )


class AlignerSettings(Section):
    """Projection heads into the space that text and media share; also the dual-tower baseline."""

    dim: int = Field(256, ge=8, description="dimensions of the shared space; the last one holds an item's popularity")
    hidden: int = Field(512, ge=0, description="width of a head's hidden layer; 0 for linear heads")
    dropout: float = Field(0.5, ge=0, lt=1)
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(512, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.2, ge=0)
    caption_memory: float = Field(0.4, ge=0, lt=1, description="most weight of an item's own captions in its vector")
    popularity: float = Field(
        0.75, ge=0, description="most weight of the correction for items that attract every query"
    )
    bank: int = Field(4096, ge=1, description="training captions that an item's popularity is measured on")


class QuantizerSettings(Section):
    """The semantic identifier: coarse token (K-Means), fine tokens (RQ-VAE)."""

    coarse: int = Field(64, ge=2, le=65536, description="K-Means clusters")
    fine_levels: int = Field(3, ge=1, le=8, description="fine tokens of an identifier")
    fine_codes: int = Field(256, ge=2, le=65536, description="codes of one fine level")
    beam: int = Field(4, ge=1, le=64, description="sequences of tokens kept while an item's identifier is sought")
    kmeans_iterations: int = Field(25, ge=1)
    epochs: int = Field(20, ge=0, description="passes of the RQ-VAE over the corpus")
    batch_size: int = Field(1024, ge=8)
    learning_rate: float = Field(1e-3, gt=0)
    commitment: float = Field(0.25, ge=0, description="weight of the commitment loss")
    max_collision_rate: float = Field(0.5, ge=0, le=1, description="gate: share of items that share an identifier")
    min_perplexity: float = Field(0.1, ge=0, le=1, description="gate: perplexity of a level over its code count")


class GeneratorSettings(Section):
    """The seq2seq model that spells identifiers."""

    width: int = Field(128, ge=16, description="width of the decoder")
    heads: int = Field(4, ge=1, description="attention heads; the width is a multiple of them")
    layers: int = Field(2, ge=1, description="decoder layers")
    dropout: float = Field(0.2, ge=0, lt=1)
    epochs: int = Field(3, ge=1, description="passes over the captions (over the items, where there are none)")
    batch_size: int = Field(256, ge=2, description="queries of an optimiser step, over all workers")
    accumulate: int = Field(1, ge=1, description="parts that a step's batch is computed in, to save memory")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    r_drop: float = Field(0.1, ge=0, description="weight of the R-Drop term (a second pass); 0 for one pass")
    item_loss: float = Field(1.0, ge=0, description="weight of the loss that trains the refined query against items")
    item_smoothing: float = Field(
        0.3, ge=0, le=1, description="share of the item loss' target that goes to items similar in the aligned space"
    )
    soft_targets: float = Field(
        1.0, ge=0, le=1, description="share of what the decoder learns to spell that the refined query finds itself"
    )
    sharpness: float = Field(1.5, gt=0, description="how much those favour the nearest items; 1 is as calibrated")
    steering: float = Field(
        0.5, ge=0, le=1, description="share of the decoder's corrections that a search follows; less trusts the heads"
    )
    candidates: int = Field(8192, ge=2, description="items that a step's targets are spread over")
    virtual_queries: float = Field(0.5, ge=0, le=1, description="share of a batch that are virtual queries")
    virtual_noise: float = Field(
        1.0, ge=0, description="noise of a virtual query, as a factor on a caption's gap (its norm, without captions)"
    )
    coarse_fusion: bool = True
    fine_fusion: bool = True


class SearchSettings(Section):
    """How a query is answered."""

    mode: Literal["beam", "one-shot", "verify"] = Field(
        "one-shot",
        description="all tokens at once (the fastest, and with stored vectors the best); drafted so and scored "
        "exactly by the decoder (verify); or token by token (beam)",
    )
    beam: int = Field(20, ge=1, le=1000, description="identifiers kept at each level (mode: beam)")
    draft: int = Field(200, ge=1, le=10_000, description="identifiers kept at each level (mode: one-shot, verify)")
    pool: int = Field(
        200,
        ge=0,
        le=10_000,
        description="drafted identifiers ranked beside the beam's; 0 for none (mode: beam, rerank)",
    )
    scoring: Literal["vocabulary", "children"] = Field(
        "vocabulary",
        description="what a token's probability is a share of (mode: beam): its level's tokens, or what follows a row "
        "(children: faster, for the decoder is not asked where one item is left, but by itself it finds less)",
    )
    k: int = Field(20, ge=1, le=1000, description="results returned by default")
    rerank: bool = Field(True, description="combine the generator's score with the similarity of the rebuilt item")


class PublishSettings(Section):
    """What a snapshot stores."""

    vectors: Literal["none", "int8"] = Field(
        "int8", description="what candidates are re-ranked with: what codes leave, in 8 bits, or (none) codes alone"
    )


class EvaluationSettings(Section):
    """What `ace evaluate` measures."""

    max_queries: int = Field(2000, ge=1, description="queries of each kind, drawn with a fixed seed")
    bootstrap: int = Field(1000, ge=10, description="resamples of the confidence intervals")


class CaptionSettings(Section):
    """What `ace caption` writes about items that have no caption."""

    image: str | None = Field(
        None, description="captioner of pictures and video frames, a model folder or hub name (BLIP, GIT, ...)"
    )
    audio: str | None = Field(None, description="captioner of sounds, of a speech-to-text class (Whisper and its like)")
    per_item: int = Field(3, ge=1, le=20, description="captions sampled for one item (of a video: frames captioned)")
    max_tokens: int = Field(30, ge=2, description="tokens of a caption")
    top_p: float = Field(0.9, gt=0, le=1, description="share of the likeliest tokens that a word is drawn from")
    similarity: float = Field(0.95, ge=-1, le=1.01, description="captions of an item as similar as this count as one")
    batch_size: int = Field(8, ge=1, description="items captioned together")


class ServeSettings(Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 only together with keys_file")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    proxies: bool = Field(
        False,
        description="`ace serve`: Ray Serve's proxy on the head node listens, not the (faster) ingress",
    )
    replicas: int = Field(1, ge=1, description="decoding replicas, at least")
    max_replicas: int = Field(1, ge=1, description="decoding replicas that the autoscaler may start")
    scale_down_seconds: float = Field(60, ge=0, description="how long replicas are not needed before they go")
    max_batch: int = Field(16, ge=1, description="queries that a replica decodes together")
    batch_wait_seconds: float = Field(
        0.0, ge=0, description="how long an idle replica waits for a batch to fill; a busy one fills it anyway"
    )
    max_queued: int = Field(256, ge=1, description="searches in flight; more are answered 429")
    max_wait_seconds: float = Field(
        0.15, gt=0, description="searches that would wait longer are answered 429; while overloaded, even shorter"
    )
    request_seconds: float = Field(10, gt=0, description="deadline of a search; later it is answered 504")
    watch_seconds: float = Field(2, gt=0, description="how often replicas look whether another snapshot is published")
    threads: int = Field(1, ge=1, description="torch threads of a replica")
    gpus: float = Field(0, ge=0, description="GPUs of a replica")
    keys_file: str | None = Field(None, description="file of hashed API keys; none leaves the server open")
    max_body_bytes: int = Field(20_000_000, gt=0, description="size of an uploaded file")
    max_k: int = Field(200, ge=1, description="results of one query")
    max_texts: int = Field(32, ge=1, description="texts of one search")


class ComputeSettings(Section):
    """How much of the cluster a stage takes."""

    address: str | None = Field(None, description="Ray address; none starts an embedded Ray")
    workers: int = Field(1, ge=1, description="training workers")
    encoders: int | None = Field(None, ge=1, description="encoder actors; by default as many as the CPUs allow")
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each worker and encoder; by default a worker takes what a node has"
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each training worker and encoder")
    max_failures: int = Field(2, ge=0, description="times a fit resumes from its checkpoint after losing a worker")
    seed: int = Field(0, description="seed of every random choice")

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What workers and encoders compute on."""
        return "cuda" if self.gpus_per_worker else "cpu"


class Settings(Section):
    """Everything one corpus needs, from ingestion to serving."""

    store: str = Field("store", description="folder or s3:// prefix for everything ACE writes")
    corpus: CorpusSettings = CorpusSettings()
    limits: LimitSettings = LimitSettings()
    segments: SegmentSettings = SegmentSettings()
    encoders: EncoderSettings = EncoderSettings()
    split: SplitSettings = SplitSettings()
    text_tuning: TextTuningSettings = TextTuningSettings()
    aligner: AlignerSettings = AlignerSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    generator: GeneratorSettings = GeneratorSettings()
    search: SearchSettings = SearchSettings()
    publish: PublishSettings = PublishSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    caption: CaptionSettings = CaptionSettings()
    serve: ServeSettings = ServeSettings()
    compute: ComputeSettings = ComputeSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        if self.generator.width % self.generator.heads:
            raise ValueError(
                f"generator.width {self.generator.width} is not a multiple of generator.heads {self.generator.heads}"
            )
        if self.serve.max_replicas < self.serve.replicas:
            raise ValueError("serve.max_replicas is below serve.replicas")
        for name in EncoderSettings.model_fields:
            encoder = getattr(self.encoders, name)
            if encoder.path is not None and encoder.kind != "transformers":
                raise ValueError(
                    f"encoders.{name}.path is set, and encoders.{name}.kind is {encoder.kind}, which reads none: "
                    f"set encoders.{name}.kind=transformers too"
                )
        return self
