"""Every setting of a run, with its default: dataclasses, and nothing else knows a default.

They check themselves where they are made. `mama.settings.load` makes them from YAML and `key=value`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards.pack.settings import PackConfig

Style = Literal["report", "sentence", "caption"]
Fit = Literal["letterbox", "stretch"]
Norm = Literal["layer", "batch", "published"]
LONGEST_NAME = 200  # bytes of a run's name; file systems end at 255, and its jobs have longer names
FACTS = ("density", "birads", "cancer", "pathology", "reason")
PAIRS = ("study", "breast", "contralateral", "augment")


class ConfigError(ValueError):
    """A user's mistake, told in one line: the field, its value, and how to mend it."""


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image; every probability or range at 0 switches its part off."""

    crop_scale: tuple[float, float] = (0.1, 1.0)  # share of the breast's rectangle, by area, that a crop keeps
    crop_ratio: tuple[float, float] = (0.75, 1.3333)  # its width to height, relative to the canvas: 1 distorts nothing
    # A crop of which less is tissue is drawn again. Of breasts stretched to the square, as published, 2 crops in 1,000
    # hold less than a quarter: so the default takes the corners beside the breast away and little else.
    min_tissue: float = 0.25
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.5
    rotation: float = 0.0  # degrees, drawn from [-rotation, rotation]
    jitter: float = 0.8  # probability of changing brightness and contrast
    jitter_strength: float = 0.4  # factors are drawn from [1 - strength, 1 + strength]
    # linear: a factor, and an offset of up to strength / 2; factors: one of brightness, then one of contrast about the
    # view's mean, as torchvision's ColorJitter has them. Air stays black.
    jitter_kind: Literal["linear", "factors"] = "linear"
    blur: float = 0.5  # probability of a Gaussian blur by 7 x 7 pixels
    blur_sigma: tuple[float, float] = (0.1, 1.5)  # pixels

    def __post_init__(self) -> None:
        for name in ("min_tissue", "horizontal_flip", "vertical_flip", "jitter", "jitter_strength", "blur"):
            _probability(f"data.augment.{name}", getattr(self, name))
        for name, largest in (("crop_scale", 1.0), ("crop_ratio", float("inf")), ("blur_sigma", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                raise ConfigError(f"data.augment.{name}: {[low, high]} is not a smallest and a largest value above 0")


@dataclass(frozen=True)
class DataConfig:
    """What a training or evaluation sample is made of."""

    shards: list[str] = field(default_factory=list)  # folders written by `mama pack`, or http(s) URLs of such
    shard_weights: list[float] = field(default_factory=list)  # of each of `shards`; empty: by their numbers of images
    balance: Literal["none", "cancer", "birads", "density"] = "none"  # the label whose classes are equally likely
    # Facts without which an image is no anchor: of density, birads, cancer, pathology, reason. It may be a partner.
    require: list[str] = field(default_factory=list)
    cache: str = "~/.cache/mama"  # for shards from http(s) addresses, and the labels that `balance` and `require` need
    image_size: tuple[int, int] = (518, 518)  # (height, width) in pixels
    fit: Fit = "letterbox"  # keeps an image's proportions, with air beside it; stretch fills the canvas, as published
    # Where the partner comes from, drawn for each pair: study, breast, contralateral, or augment, a second
    # augmentation of the anchor, which also serves where a study has no such partner.
    pairs: list[str] = field(default_factory=lambda: ["study", "augment"])
    pair_weights: list[float] = field(default_factory=list)  # one for each of `pairs`; empty: equal
    style: Style = "report"  # of the texts, see mama/data/report_text.py
    # Does a text tell the pathology of an image of which neither BI-RADS, findings nor a report are known? No
    # radiologist sees it there, it is known after the biopsy only, and "zero-shot" then means a classifier trained on
    # its answers: hence not by default. But without it such texts teach nothing of cancer, and `mama eval` says so.
    tell_pathology: bool = False
    mask_probability: float = 0.8  # each piece of meta-information becomes "unknown"
    max_tokens: int = 144
    workers: int = 2  # loader processes per rank
    max_corrupt: int = 100  # samples that one process replaces by others because they cannot be read; more end the run
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _weights("data.shard_weights", self.shard_weights, "data.shards", self.shards)
        for fact in self.require:
            _one_of("data.require", fact, FACTS)
        if not self.pairs:
            raise ConfigError(f"data.pairs: empty; name at least one of {', '.join(PAIRS)}")
        for policy in self.pairs:
            _one_of("data.pairs", policy, PAIRS)
        _weights("data.pair_weights", self.pair_weights, "data.pairs", self.pairs)
        _probability("data.mask_probability", self.mask_probability)
        if self.workers < 0:
            raise ConfigError(f"data.workers: {self.workers} is less than 0, which decodes in the training process")
        if self.max_corrupt < 0:
            raise ConfigError(f"data.max_corrupt: {self.max_corrupt} is less than 0, which allows no sample to fail")
        if self.max_tokens < 2:
            raise ConfigError(f"data.max_tokens: {self.max_tokens} is less than 2, a token and its separator")
        if min(self.image_size) < 1:
            raise ConfigError(f"data.image_size: {list(self.image_size)} is not a height and a width in pixels")

    @property
    def cache_folder(self) -> Path:
        return Path(os.path.expanduser(self.cache))


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: pretrained weights from `model`, or random ones of the shape in `config`."""

    model: str | None = "facebook/dinov2-with-registers-base"  # hub name or local folder
    config: dict[str, Any] = field(default_factory=dict)  # a transformers configuration, with `model_type`
    ignore: list[str] = field(default_factory=list)  # prefixes of tensors that may be missing or left over
    freeze_norm: bool = False  # the norm behind the last block, which only patches go through, stays as it came

    def __post_init__(self) -> None:
        _prefixes("vision.ignore", self.ignore)


@dataclass(frozen=True)
class TextConfig:
    """The text tower: pretrained weights from `model`, or random ones of the shape in `config`."""

    model: str | None = "stanford-crfm/BioMedLM"  # hub name, local folder, GGUF file, or package:NAME/FILE.gguf
    config: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None  # keep only this many of the first transformer blocks
    tune: Literal["lora", "full", "frozen"] = "lora"  # `frozen` still trains our two tokens
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    ignore: list[str] = field(default_factory=lambda: ["lm_head."])  # as vision.ignore; the LM head is never used

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ConfigError(f"text.lora_rank: {self.lora_rank} is less than 1; tune=frozen trains no adapters")
        _probability("text.lora_dropout", self.lora_dropout)
        _prefixes("text.ignore", self.ignore)


@dataclass(frozen=True)
class HeadsConfig:
    """Projections from the towers' widths to the shared spaces."""

    embed_dim: int = 512
    hidden_dim: int = 2048
    view_hidden_dim: int = 768
    # layer: LayerNorm. batch: BatchNorm in its place, with the statistics of all ranks. published: the heads of the
    # authors' code, whose BatchNorms see at once, on one rank, the patches of all images, one view of all, or one text.
    norm: Norm = "layer"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "hidden_dim", "view_hidden_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"heads.{name}: {getattr(self, name)} is less than 1")


@dataclass(frozen=True)
class LossConfig:
    """Weights and first steps of the four terms (METHOD: L_VV, L_VT(v,t), L_VT(w,t), L_local).

    A term of weight 0 is not computed, and the model has no heads that only it would move. Before its first
    step a term weighs nothing and its heads do not move.
    """

    view: float = 1.0
    anchor_text: float = 1.0
    partner_text: float = 1.0
    local: float = 1.0
    view_start: int = 0
    partner_text_start: int = 0
    local_start: int = 8000
    # Of all ranks, or of this rank alone; published: the view term's of all ranks, the others' of this rank.
    negatives: Literal["global", "local", "published"] = "global"
    positives: Literal["instance", "text"] = "instance"  # do equal texts count as positives of each other?
    local_scores: Literal["both", "visual", "textual"] = "both"  # symmetric local alignment, or one side of it
    local_chunk: int = 4  # images whose alignment with all texts is in memory at once
    initial_scale: float = 1 / 0.07
    max_scale: float = 100.0
    view_temperature: float = 0.5

    def __post_init__(self) -> None:
        for name in ("view", "anchor_text", "partner_text", "local"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"loss.{name}: {getattr(self, name)} is not a weight of at least 0")
        if not self.anchor_text and not self.partner_text:
            raise ConfigError("loss.anchor_text: it and loss.partner_text weigh 0; give one of them a weight")
        if not self.anchor_text and self.partner_text_start:
            raise ConfigError(
                f"loss.partner_text_start: {self.partner_text_start}, but with anchor_text=0 no other term moves the "
                "text tower until then; set it to 0"
            )
        for name in ("initial_scale", "max_scale", "view_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"loss.{name}: {getattr(self, name)} is not a number above 0")
        if self.local_chunk < 1:
            raise ConfigError(f"loss.local_chunk: {self.local_chunk} is less than 1 image")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine to `min_lr`."""

    lr: float = 4e-5
    min_lr: float = 1e-8
    vision_rate: float = 1.0  # factor on the rate of the image tower; the heads have 1
    text_rate: float = 1.0  # of the text tower
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"  # all: norms, biases and logit scales too, as PyTorch does unasked
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 4000
    clip_norm: float = 1.0  # 0 does not clip

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "vision_rate", "text_rate", "weight_decay", "warmup_steps", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"optim.{name}: {getattr(self, name)} is not a number of at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how large, on how many ranks. One step is one update by `global_batch` pairs."""

    steps: int = 40000
    global_batch: int = 288
    micro_batch: int = 36  # pairs per rank and forward pass; negatives come from all ranks' micro-batches
    # Negatives come from all micro-batches of the step; each is encoded twice. Dropout draws its masks by micro-batch:
    # where there is some (text.lora_dropout, a tower's own), another micro_batch is another draw, not the same numbers.
    grad_cache: bool = False
    ranks: int = 1  # local processes, when no launcher has started this one
    oversubscribe: bool = False  # start them even where the cores or the memory of this machine are too few
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: bool = False  # optimizer state in CPU memory; needs stage 3
    precision: Literal["fp32", "bf16"] = "bf16"
    # auto: xformers on CUDA before Hopper, where it runs; elsewhere sdpa, PyTorch's own.
    attention: Literal["auto", "xformers", "sdpa"] = "auto"
    activation_checkpointing: bool = True
    compile: bool = True  # the blocks of the image tower, on CUDA below ZeRO stage 3, with a C compiler and Python.h
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2  # the newest; the best by validation is kept besides
    validate_every: int = 0  # steps; 0 does not validate
    max_skips: int = 10  # steps in a row with a loss or gradient that is not finite, after which the run stops
    timeout: int = 600  # seconds without a batch of a loader, or a sign of life of a rank, after which the run ends

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "global_batch",
            "micro_batch",
            "ranks",
            "log_every",
            "save_every",
            "keep_checkpoints",
            "max_skips",
            "timeout",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}: {getattr(self, name)} is less than 1")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError("train.zero_stage: 0 in bf16 would sum gradients in bf16; use stage 1, or precision=fp32")
        if self.offload and self.zero_stage != 3:
            raise ConfigError(f"train.offload: needs zero_stage 3, and it is {self.zero_stage}")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per step on each of `world_size` ranks."""
        count, rest = divmod(self.global_batch, self.micro_batch * world_size)
        if rest or not count:
            raise ConfigError(
                f"train.global_batch: {self.global_batch} is not a multiple of micro_batch x ranks = "
                f"{self.micro_batch} x {world_size}; change one of the three"
            )
        return count


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on which held-out images."""

    tasks: list[str] = field(default_factory=lambda: ["cancer", "birads", "density"])
    split: Literal["train", "val", "test"] = "test"
    batch: int = 64
    bootstrap: int = 1000  # resamples of the patients for the 95 % intervals
    intensity_baseline: bool = False  # also a logistic regression on 31 intensity percentiles
    heat_maps: int = 6  # positives shown with the local alignment of their finding's sentence

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"eval.batch: {self.batch} is less than 1")
        if self.bootstrap < 0:
            raise ConfigError(f"eval.bootstrap: {self.bootstrap} is less than 0, which gives no intervals")
        if not self.tasks:
            raise ConfigError("eval.tasks: empty; name at least one of cancer, malignancy, birads, density")
        if unknown := set(self.tasks) - {"cancer", "malignancy", "birads", "density"}:
            raise ConfigError(f"eval.tasks: {sorted(unknown)[0]!r} is not one of cancer, malignancy, birads, density")


@dataclass(frozen=True)
class Config:
    """Everything a run needs; `runs/<name>/` is its folder."""

    name: str = "mama"
    runs: str = "runs"
    seed: int = 42
    pack: PackConfig = field(default_factory=PackConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _folder_name("name", self.name)
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is less than 0")
        if self.train.grad_cache and self.loss.negatives != "global":
            negatives = self.loss.negatives
            raise ConfigError(
                f"train.grad_cache: gathers negatives that loss.negatives={negatives} does not want; drop one"
            )
        if self.train.grad_cache and self.heads.norm != "layer":
            raise ConfigError("train.grad_cache: batch norms would take a micro-batch for the batch; heads.norm=layer")
        if self.heads.norm == "published" and self.loss.local and self.data.style != "report":
            raise ConfigError(
                f"heads.norm: published takes the statistics of a text's sentences, and data.style={self.data.style} "
                "has one sentence; choose batch, or style=report"
            )

    def contrastive_batch(self, ranks: int) -> int:
        """Pairs among which each finds its negatives, on so many ranks."""
        if self.loss.negatives != "global":
            return self.train.micro_batch
        return self.train.global_batch if self.train.grad_cache else self.train.micro_batch * ranks

    @property
    def run_folder(self) -> Path:
        return Path(os.path.expanduser(self.runs)) / self.name


def _folder_name(name: str, value: str) -> None:
    """One plain folder name: what a run writes and deletes must stay in its folder, and job logs expand a `%`."""
    if value in ("", ".", "..") or set(value) & set("/\\"):
        reason = "is not the name of one folder; the folder that holds it is runs=..."
    elif not value.isprintable() or "%" in value:
        reason = "holds a control character or a %; take it out"
    elif value[0] in "-. " or value[-1] == " ":
        reason = "begins with '-', '.' or a blank, or ends with a blank; take it away"
    elif len(value.encode()) > LONGEST_NAME:
        reason = f"is longer than {LONGEST_NAME} bytes"
    else:
        return
    raise ConfigError(f"{name}: {value[:80]!r} {reason}")


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: {value} is not between 0 and 1")


def _prefixes(name: str, values: list[str]) -> None:
    if "" in values:
        raise ConfigError(f"{name}: {values} holds an empty prefix, with which every tensor could be missing")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(known)}")


def _weights(name: str, weights: list[float], of: str, named: list[str]) -> None:
    """Empty, or a weight of at least 0 for each entry of the list `of`, and one of them above 0."""
    if weights and len(weights) != len(named):
        raise ConfigError(f"{name}: {weights} has {len(weights)} weights, but {of} has {len(named)} entries")
    if weights and not (all(0 <= w < float("inf") for w in weights) and any(weights)):
        raise ConfigError(f"{name}: {weights} holds no weight above 0, or one that is not a number of at least 0")
