"""Every setting of a run and its default, as dataclasses; no other code holds a default.

Each checks itself when it is made. `mama.settings.load` makes them from YAML and `key=value`. The comment beside or
above a field is its reference entry.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mama.errors import ConfigError
from mama.settings.checks import at_least_one, folder_name, one_of, prefixes, probability, weights
from shards.pack.settings import PackConfig

Style = Literal["report", "sentence", "caption"]
Fit = Literal["letterbox", "stretch"]
Norm = Literal["layer", "batch", "published"]
Tokens = Literal["all", "tissue"]
Sentences = Literal["separator", "alone"]
Findings = Literal["image", "crop"]
Pooling = Literal["max", "softmax"]
FACTS = ("density", "birads", "cancer", "pathology", "reason")
PAIRS = ("study", "breast", "contralateral", "augment")
# The shipped tasks, configs/tasks/*.yaml.
TASKS = (
    *("cancer", "malignancy", "birads", "density", "mass", "calcification", "asymmetry", "distortion"),
    "cancer_without_implants",
)
PROTOCOLS = ("zeroshot", "probe", "finetune")
UNITS = ("image", "breast", "exam", "patient")


@dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training images."""

    crop_scale: tuple[float, float] = (0.1, 1.0)  # area of a crop, as a share of the breast's bounding box, in (0, 1]
    crop_ratio: tuple[float, float] = (0.75, 1.3333)  # width / height of a crop relative to the canvas; 1: undistorted
    # Least share of tissue in a crop, in [0, 1]; a crop with less is drawn again; 0 accepts any. The default rejects
    # little but the corners beside the breast: of crops of stretched breasts, as published, 2 in 1,000 hold less.
    min_tissue: float = 0.25
    horizontal_flip: float = 0.5  # probability of mirroring left and right, in [0, 1]; 0: never
    vertical_flip: float = 0.5  # probability of mirroring top and bottom, in [0, 1]; 0: never
    rotation: float = 0.0  # degrees; the angle is drawn from [-rotation, rotation]; 0: no rotation
    jitter: float = 0.8  # probability of changing brightness and contrast, in [0, 1]; 0: never
    jitter_strength: float = 0.4  # factors are drawn from [1 - strength, 1 + strength]; in [0, 1]; 0: no change
    # linear: a factor, then an offset of up to +-strength / 2. factors: one of brightness, then one of contrast about
    # the image's mean, as torchvision's ColorJitter. The background stays black.
    jitter_kind: Literal["linear", "factors"] = "linear"
    blur: float = 0.5  # probability of a Gaussian blur with a 7 x 7 kernel, in [0, 1]; 0: never
    blur_sigma: tuple[float, float] = (0.1, 1.5)  # range of the blur's standard deviation, in pixels, above 0

    def __post_init__(self) -> None:
        for name in ("min_tissue", "horizontal_flip", "vertical_flip", "jitter", "jitter_strength", "blur"):
            probability(f"data.augment.{name}", getattr(self, name))
        for name, largest in (("crop_scale", 1.0), ("crop_ratio", float("inf")), ("blur_sigma", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                raise ConfigError(f"data.augment.{name}: {[low, high]} is not a smallest and a largest value above 0")


@dataclass(frozen=True)
class DataConfig:
    """Shards, image pairs and report texts of training and evaluation."""

    shards: list[str] = field(default_factory=list)  # folders written by `mama pack`, or their http(s) URLs
    shard_weights: list[float] = field(default_factory=list)  # sampling weight per entry of shards; []: by image count
    balance: Literal["none", "cancer", "birads", "density"] = "none"  # label whose classes are sampled equally often
    # Facts that an anchor image must have: density, birads, cancer, pathology, reason. A partner image may lack them.
    require: list[str] = field(default_factory=list)
    cache: str = "~/.cache/mama"  # folder for shards from URLs, and for the labels that balance and require read
    image_size: tuple[int, int] = (518, 518)  # height and width of the canvas in pixels; multiples of the patch size
    fit: Fit = "letterbox"  # letterbox keeps an image's proportions and pads with background; stretch fills the canvas
    # Where the partner of an anchor image comes from, drawn for each pair: study (any other image of the study), breast
    # (the same breast), contralateral (the other breast), or augment (the anchor, augmented again). A study without
    # such an image gives augment.
    pairs: list[str] = field(default_factory=lambda: ["study", "augment"])
    pair_weights: list[float] = field(default_factory=list)  # probability weight per entry of pairs; []: equal
    style: Style = "report"  # report text: the structured report, one natural sentence, or a caption of the labels
    # Whether a report text states the pathology of an image without BI-RADS, findings or a free-text report. Off, as
    # pathology is known only after the biopsy and "zero-shot" would mean a classifier trained on its answers. But then
    # such texts teach nothing about cancer, which `mama eval` reports.
    tell_pathology: bool = False
    # Which findings a training text tells. image: all of the image. crop: those that the random crop shows, as far as
    # their boxes are known. Where no training image has a box, which `mama train` says as it starts, both are the same.
    findings: Findings = "image"
    mask_probability: float = 0.8  # that age, race, ethnicity, image type, side or view each reads "unknown"; in [0, 1]
    max_tokens: int = 144  # tokens of a report text, at least 2; the rest is cut off
    workers: int = 2  # loader processes per rank; 0: load in the training process
    max_corrupt: int = 100  # unreadable samples that one process may replace by others; one more ends the run
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # random augmentation of training images

    def __post_init__(self) -> None:
        weights("data.shard_weights", self.shard_weights, "data.shards", self.shards)
        for fact in self.require:
            one_of("data.require", fact, FACTS)
        if not self.pairs:
            raise ConfigError(f"data.pairs: empty; name at least one of {', '.join(PAIRS)}")
        for policy in self.pairs:
            one_of("data.pairs", policy, PAIRS)
        weights("data.pair_weights", self.pair_weights, "data.pairs", self.pairs)
        probability("data.mask_probability", self.mask_probability)
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
        """`cache`, with `~` expanded."""
        return Path(os.path.expanduser(self.cache))


@dataclass(frozen=True)
class VisionConfig:
    """The image tower."""

    model: str | None = "facebook/dinov2-with-registers-base"  # hub name or local folder; null: random weights
    config: dict[str, Any] = field(default_factory=dict)  # with model null: a transformers config, with `model_type`
    ignore: list[str] = field(default_factory=list)  # name prefixes of tensors that may be missing or left over
    freeze_norm: bool = False  # keep the last norm, which only patch features pass, at its initial weights
    # Which patches of an image are computed. all: each. tissue: those with a pixel brighter than the background, after
    # augmentation; the others are left out before the first block. An image without any keeps them all.
    tokens: Tokens = "all"
    # The block behind which the local term reads its patches, then normed by the tower's last norm: 1 is the first,
    # null the last, as published. 0: the patch embedding, into which nothing but a patch's own pixels and place went.
    # The earlier, the less a patch knows of the rest of the image. The global feature is always that of the last block.
    local_block: int | None = None

    def __post_init__(self) -> None:
        prefixes("vision.ignore", self.ignore)


@dataclass(frozen=True)
class TextConfig:
    """The text tower."""

    # Hub name, local folder, GGUF file, or package:NAME/FILE.gguf in an installed Python package; null: random weights.
    model: str | None = "stanford-crfm/BioMedLM"
    config: dict[str, Any] = field(default_factory=dict)  # with model null: a transformers config, with `model_type`
    layers: int | None = None  # number of transformer blocks to keep, counted from the first; null: all
    # What is trained. lora: adapters. full: all weights. frozen: nothing. Always also the separator and padding token.
    tune: Literal["lora", "full", "frozen"] = "lora"
    lora_rank: int = 8  # rank of the LoRA adapters, at least 1
    lora_alpha: int = 32  # scale of the LoRA update: it is multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.1  # dropout before the LoRA adapters, in [0, 1]
    # Texts of a micro-batch one behind the other in one row, so that nothing is computed on padding; same features.
    packing: bool = False
    # What the local term takes for a sentence. separator: the state at the separator behind it, as published; with a
    # causal model this also tells what the text said before. alone: the mean over the states of the sentence when it is
    # read as a text of its own, so that it is the same in any text and where it is asked for by itself.
    sentences: Sentences = "separator"
    ignore: list[str] = field(default_factory=lambda: ["lm_head."])  # as vision.ignore; the LM head is never used

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ConfigError(f"text.lora_rank: {self.lora_rank} is less than 1; tune=frozen trains no adapters")
        probability("text.lora_dropout", self.lora_dropout)
        prefixes("text.ignore", self.ignore)


@dataclass(frozen=True)
class HeadsConfig:
    """Projection heads from the towers' widths to the shared embedding spaces."""

    embed_dim: int = 512  # width of the shared embeddings
    hidden_dim: int = 2048  # hidden width of the patch and sentence heads
    view_hidden_dim: int = 768  # hidden width of the view head
    # layer: LayerNorm. batch: BatchNorm with the statistics of all ranks. published: the heads of the authors' code,
    # whose BatchNorms see one rank's patches of all images, one view of all images, or the sentences of one text.
    norm: Norm = "layer"

    def __post_init__(self) -> None:
        for name in ("embed_dim", "hidden_dim", "view_hidden_dim"):
            at_least_one(f"heads.{name}", getattr(self, name))


@dataclass(frozen=True)
class LossConfig:
    """Weights and first steps of the four loss terms: L_VV, L_VT(v, t), L_VT(w, t), L_local.

    A term of weight 0 is not computed, and the model has no heads for it. Before its first step a term has weight 0
    and its heads are not updated.
    """

    view: float = 1.0  # weight of L_VV, between the anchor and the partner image; 0: off
    anchor_text: float = 1.0  # weight of L_VT(v, t), between the anchor image and its text; 0: off
    partner_text: float = 1.0  # weight of L_VT(w, t), between the partner image and its text; 0: off
    local: float = 1.0  # weight of L_local, between sentences and patches of the anchor; 0: off
    view_start: int = 0  # first step of the view term
    partner_text_start: int = 0  # first step of the partner_text term
    local_start: int = 8000  # first step of the local term
    # Which ranks negatives come from. global: all ranks. local: this rank. published: all ranks for the view term, this
    # rank for the others.
    negatives: Literal["global", "local", "published"] = "global"
    positives: Literal["instance", "text"] = "instance"  # text: pairs with equal texts are positives of each other
    local_scores: Literal["both", "visual", "textual"] = "both"  # symmetric local alignment, or one side of it only
    # Which sentences of a text take part in the local term. all: each, as published. findings: those that tell findings
    # ("no mass and no calcification" is one); needs data.style=report. Then pairs whose finding sentences are all equal
    # are positives of each other, whatever `positives` says, as those of normal images repeat so often; and a pair
    # whose text tells no findings takes no part, as nobody knows what its image shows. Where no training text tells
    # any, the term is 0, which `mama train` says as it starts.
    local_sentences: Literal["all", "findings"] = "all"
    # Which patches take part in the local term. all: each that the image tower computes, as published. tissue: those
    # that vision.tokens=tissue would keep; the others have no value in maps either. With vision.tokens=tissue both are
    # the same.
    local_patches: Tokens = "all"
    # What the visual score makes of the cosines of a sentence with the patches of an image. max: the highest, as
    # published; it passes gradient to one patch alone. softmax: their mean with the weights softmax(cosine /
    # local_temperature); it passes gradient to every patch.
    local_pooling: Pooling = "max"
    local_temperature: float = 0.1  # of local_pooling=softmax, above 0; towards 0 it becomes max
    local_chunk: int = 4  # images aligned with all texts at a time; fewer need less memory; at least 1
    initial_scale: float = 1 / 0.07  # initial logit scale (1 / temperature), above 0; learnt in training
    max_scale: float = 100.0  # upper bound of the logit scales, above 0
    view_temperature: float = 0.5  # fixed temperature of the view term, above 0

    def __post_init__(self) -> None:
        for name in ("view", "anchor_text", "partner_text", "local"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"loss.{name}: {getattr(self, name)} is not a weight of at least 0")
        if not self.anchor_text and not self.partner_text:
            raise ConfigError("loss.anchor_text: it and loss.partner_text weigh 0; give one of them a weight")
        if not self.anchor_text and self.partner_text_start:
            raise ConfigError(
                f"loss.partner_text_start: {self.partner_text_start}, but with anchor_text=0 no other term trains the "
                "text tower until then; set it to 0"
            )
        for name in ("initial_scale", "max_scale", "view_temperature", "local_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"loss.{name}: {getattr(self, name)} is not a number above 0")
        if self.local_chunk < 1:
            raise ConfigError(f"loss.local_chunk: {self.local_chunk} is less than 1 image")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, with a linear warm-up of the learning rate and a cosine decay."""

    lr: float = 4e-5  # highest learning rate, after the warm-up
    min_lr: float = 1e-8  # learning rate of the last step
    vision_rate: float = 1.0  # factor on the learning rate of the image tower
    text_rate: float = 1.0  # factor on the learning rate of the text tower
    weight_decay: float = 0.1  # AdamW's decoupled weight decay; 0: none
    # What weight decay applies to. matrices: weights of two or more dimensions. all: also norms, biases and logit
    # scales, as PyTorch's AdamW does by default.
    decay: Literal["matrices", "all"] = "matrices"
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates of the first and second moment
    warmup_steps: int = 4000  # steps of the linear warm-up; 0: none
    clip_norm: float = 1.0  # largest norm of the whole gradient; 0: no clipping

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "vision_rate", "text_rate", "weight_decay", "warmup_steps", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"optim.{name}: {getattr(self, name)} is not a number of at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """Length of training, batch sizes, ranks, memory, logs and checkpoints."""

    steps: int = 40000  # optimizer updates, at least 1
    global_batch: int = 288  # pairs per step, on all ranks; a multiple of micro_batch x ranks
    micro_batch: int = 36  # pairs per rank and forward pass; negatives come from all ranks' micro-batches
    # Take negatives from all micro-batches of a step (GradCache); each is encoded twice. Dropout (text.lora_dropout, a
    # tower's own) draws its masks per micro-batch: with it another micro_batch gives other numbers.
    grad_cache: bool = False
    ranks: int = 1  # processes to start on this machine; a launcher (torchrun, srun, a Slurm job) sets its own number
    oversubscribe: bool = False  # start the ranks even if this machine has too few cores or too little memory for them
    zero_stage: Literal[0, 1, 2, 3] = 2  # DeepSpeed's ZeRO stage, which shards state over ranks; bf16 needs 1 to 3
    offload: bool = False  # keep the optimizer state in CPU memory; needs zero_stage 3
    precision: Literal["fp32", "bf16"] = "bf16"  # number format of forward and backward pass
    attention: Literal["auto", "xformers", "sdpa"] = "auto"  # auto: xformers on CUDA before Hopper, else PyTorch's sdpa
    # Recompute activations in the backward pass: less memory, slower. auto: where they would not fit into memory.
    activation_checkpointing: Literal["auto", True, False] = "auto"
    # Compile the image tower's blocks; only on CUDA, with zero_stage below 3, a C compiler and Python.h.
    compile: bool = True
    log_every: int = 10  # steps between two log entries, at least 1
    save_every: int = 500  # steps between two checkpoints, at least 1
    keep_checkpoints: int = 2  # newest checkpoints to keep, at least 1; the best by validation is kept besides
    validate_every: int = 0  # steps between two validations; 0: none
    max_skips: int = 10  # consecutive steps with a non-finite loss or gradient, after which the run ends; at least 1
    timeout: int = 600  # seconds without a batch from a loader, or without a sign of life from a rank, that end the run
    # Minutes in which no rank takes a step, or makes progress in what else it does, that end the run. Its job goes back
    # in the queue, once for each step that it comes to. 0: never.
    patience: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            *("steps", "global_batch", "micro_batch", "ranks", "log_every", "save_every", "keep_checkpoints"),
            *("max_skips", "timeout"),
        ):
            at_least_one(f"train.{name}", getattr(self, name))
        if not 0 <= self.patience < float("inf"):
            raise ConfigError(f"train.patience: {self.patience} is not a number of minutes of at least 0")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError("train.zero_stage: 0 in bf16 would sum gradients in bf16; use stage 1, or precision=fp32")
        if self.offload and self.zero_stage != 3:
            raise ConfigError(f"train.offload: needs zero_stage 3, and it is {self.zero_stage}")

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per step on each of `world_size` ranks. Raises `ConfigError` if `global_batch` has a rest."""
        count, rest = divmod(self.global_batch, self.micro_batch * world_size)
        if rest or not count:
            raise ConfigError(
                f"train.global_batch: {self.global_batch} is not a multiple of micro_batch x ranks = "
                f"{self.micro_batch} x {world_size}; change one of the three"
            )
        return count


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation of a consolidated run on held-out images."""

    # Shipped tasks by name (cancer, malignancy, birads, density, mass, calcification, asymmetry, distortion,
    # cancer_without_implants), and paths of YAML files that define one's own.
    tasks: list[str] = field(default_factory=lambda: ["cancer", "birads", "density"])
    split: Literal["train", "val", "test"] = "test"  # split that is evaluated
    # What is scored: image, breast, exam, patient, each from the same pass. Images always, and the unit of the task.
    units: list[str] = field(default_factory=lambda: list(UNITS))
    # The score of a unit: the mean over its images, or the highest score of the positive class (of more than two
    # classes: the highest of each, made to add up to 1).
    pool: Literal["mean", "max"] = "mean"
    batch: int = 64  # images or texts per forward pass, at least 1
    bootstrap: int = 1000  # resamples of the patients for the 95 % intervals; 0: no intervals
    prevalence: list[float] | None = None  # shares of positive images at which the PPV is told too, such as [0.005]
    intensity_baseline: bool = False  # also evaluate a logistic regression on 31 intensity percentiles
    # Folders of shards, or their URLs, to evaluate on in place of data.shards, each by itself; --on of `mama eval`.
    on: list[str] = field(default_factory=list)
    # CSV files with the boxes of detectors, which are measured beside our maps; columns image, x0, y0, x1, y1, score.
    boxes: list[str] = field(default_factory=list)
    # What to do with images of patients that the model was trained on: refuse ends before anything is measured.
    known_patients: Literal["refuse", "allow"] = "refuse"
    heat_maps: int = 6  # cancer cases to show with the local alignment of their finding's sentence; 0: none
    # zeroshot: class prompts. probe: a logistic regression on frozen features. finetune: the image tower is trained
    # with a linear classifier, see `finetune`.
    protocols: list[str] = field(default_factory=lambda: ["zeroshot", "probe"])
    # standard: as docs/METHOD.md describes it. paper: that of the MaMA paper, which has settings of its own in place of
    # `finetune`, also for the probe, a balanced part of the test images, and prompts with the image's meta-information.
    protocol: Literal["standard", "paper"] = "standard"
    fractions: list[float] = field(default_factory=lambda: [1.0])  # of the training labels, by patient; in (0, 1]
    draws: int = 1  # draws of the patients of each fraction below 1, at least 1

    def __post_init__(self) -> None:
        at_least_one("eval.batch", self.batch)
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise ConfigError(f"eval.bootstrap: {self.bootstrap} gives no interval; give 1000, or 0 for no intervals")
        for share in self.prevalence or []:
            if not 0 < share < 1:
                raise ConfigError(f"eval.prevalence: {share} is no share of images; give numbers between 0 and 1")
        if not self.tasks:
            raise ConfigError(f"eval.tasks: empty; name at least one of {', '.join(TASKS)}")
        for task in self.tasks:
            if not task.endswith((".yaml", ".yml")):
                one_of("eval.tasks", task, (*TASKS, "the path of a YAML file"))
        for unit in self.units:
            one_of("eval.units", unit, UNITS)
        for protocol in self.protocols:
            one_of("eval.protocols", protocol, PROTOCOLS)
        for name, values in (("protocols", self.protocols), ("fractions", self.fractions)):
            if not values:
                raise ConfigError(f"eval.{name}: is empty; name at least one, or leave it out")
            if twice := [value for place, value in enumerate(values) if value in values[:place]]:
                raise ConfigError(f"eval.{name}: {twice[0]} is named twice; name it once")
        if wrong := [fraction for fraction in self.fractions if not 0 < fraction <= 1]:
            raise ConfigError(f"eval.fractions: {wrong[0]} is not above 0 and at most 1, which is all labels")
        at_least_one("eval.draws", self.draws)


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of the image tower with a linear classifier: of `mama eval` with finetune in `eval.protocols`.

    There is one for each task, fraction and draw. Images are augmented as in pre-training (`data.augment`); ranks,
    precision, ZeRO stage and so on are those of `train`.
    """

    steps: int = 2000  # updates, at least 1
    batch: int = 64  # images per step, on all ranks; a multiple of their number
    micro_batch: int = (
        32  # images per rank and forward pass, at most; the largest that divides the rank's share is taken
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw with `optim.betas`; sgd without momentum
    lr: float = 1e-4  # highest learning rate, that of the classifier, after the warm-up
    min_lr: float = 1e-6  # learning rate of the last step, after a cosine decay
    warmup_steps: int = 100  # steps of the linear warm-up; 0: none
    weight_decay: float = 0.05  # as optim.weight_decay, on the matrices
    # Factor on the learning rate from each block of the image tower to the one below it, in (0, 1]; the last block has
    # it once, the patch embedding most often. 1: one rate for all.
    layer_decay: float = 0.75
    clip_norm: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    # balanced: every class is drawn equally often (inverse frequency), then an image of it. natural: each image once an
    # epoch.
    sampling: Literal["balanced", "natural"] = "balanced"
    # Steps between two measurements of the loss on the labelled images of the split val, of which the best step is
    # taken. 0: val is not looked at, and the last step is taken.
    validate_every: int = 0
    patience: int = 0  # measurements in a row without a better one, after which it stops; 0: it takes all steps
    save_every: int = 500  # steps between two checkpoints, at least 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch", "save_every"):
            at_least_one(f"finetune.{name}", getattr(self, name))
        for name in ("lr", "min_lr", "warmup_steps", "weight_decay", "clip_norm", "validate_every", "patience"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"finetune.{name}: {getattr(self, name)} is not a number of at least 0")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"finetune.layer_decay: {self.layer_decay} is not above 0 and at most 1")
        if self.patience and not self.validate_every:
            raise ConfigError(f"finetune.patience: {self.patience}, but validate_every is 0: val is never looked at")

    def share(self, ranks: int) -> int:
        """Images per step on each of the ranks. Raises `ConfigError` if `batch` has a rest."""
        share, rest = divmod(self.batch, ranks)
        if rest or not share:
            raise ConfigError(
                f"finetune.batch: {self.batch} is not a multiple of the {ranks} ranks; change one of the two"
            )
        return share


@dataclass(frozen=True)
class Config:
    """Everything a run needs; `runs/<name>/` is its folder."""

    name: str = "mama"  # the run's name, and that of its folder
    runs: str = "runs"  # folder that holds the run folders
    seed: int = 42  # seed of everything random in a run; at least 0
    pack: PackConfig = field(default_factory=PackConfig)  # packing an archive to shards
    data: DataConfig = field(default_factory=DataConfig)  # shards, image pairs and report texts
    vision: VisionConfig = field(default_factory=VisionConfig)  # the image tower
    text: TextConfig = field(default_factory=TextConfig)  # the text tower
    heads: HeadsConfig = field(default_factory=HeadsConfig)  # the projection heads
    loss: LossConfig = field(default_factory=LossConfig)  # the loss terms
    optim: OptimConfig = field(default_factory=OptimConfig)  # the optimizer
    train: TrainConfig = field(default_factory=TrainConfig)  # the training run
    eval: EvalConfig = field(default_factory=EvalConfig)  # the evaluation
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)  # fine-tuning, of the evaluation

    def __post_init__(self) -> None:
        folder_name("name", self.name)
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed} is less than 0")
        if self.train.grad_cache and self.loss.negatives != "global":
            negatives = self.loss.negatives
            raise ConfigError(f"train.grad_cache: gathers negatives that loss.negatives={negatives} excludes; drop one")
        if self.train.grad_cache and self.heads.norm != "layer":
            raise ConfigError("train.grad_cache: batch norms would take a micro-batch for the batch; heads.norm=layer")
        if self.heads.norm == "published" and self.loss.local and self.data.style != "report":
            raise ConfigError(
                f"heads.norm: published takes the statistics of a text's sentences, and data.style={self.data.style} "
                "has one sentence; choose batch, or style=report"
            )

        if self.loss.local and self.loss.local_sentences == "findings" and self.data.style != "report":
            raise ConfigError(
                f"loss.local_sentences: findings needs data.style=report, and it is {self.data.style}, whose one "
                "sentence tells everything; choose all, or style=report"
            )

    def contrastive_batch(self, ranks: int) -> int:
        """The number of pairs that serve each other as negatives, on `ranks` ranks."""
        if self.loss.negatives != "global":
            return self.train.micro_batch
        return self.train.global_batch if self.train.grad_cache else self.train.micro_batch * ranks

    @property
    def run_folder(self) -> Path:
        """`runs`/`name`, with `~` expanded."""
        return Path(os.path.expanduser(self.runs)) / self.name
