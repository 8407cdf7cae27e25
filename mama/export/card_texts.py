"""The fixed texts of a model card."""

from __future__ import annotations

HEAD = """\
# {name}

**Not for clinical use.** This is a research model; nothing that it says is a diagnosis.

A vision-language model for mammograms of the views CC and MLO: it maps images and English report texts into one space,
so that words find images and images find words. Made with mama (the Python package `mama-clip`), step {step} of
{steps}, for images of {size} pixels (height x width)."""

NO_RELEASE = """\
> **Do not release this model.** It was trained on {name}, whose agreement forbids to release models, weights or
> embeddings that were trained on it. Keep this folder where the data are."""

NOT_EVALUATED = """\
It has not been evaluated yet: `mama eval` writes its figures here, those of the test split of the shards that it was
trained on."""

HOW_MEASURED = """\
Intervals are over patients. Of more than two classes the AUC is the mean over each against the rest."""

POINTED = """\
Heat maps: the highest patch of the map of the sentence that names a finding lay in the finding's box or next to it in
{rate} of {findings} findings of {patients} patients{beside}."""

CALIBRATED = """\
`calibration.json` turns zero-shot scores into calibrated probabilities; it was fitted on the split `val`."""

FROM_PYTHON = """\
With mama, from a DICOM file (or PNG, JPEG, TIFF) to scores:

```python
import mama

model = mama.load("path/to/this/folder")
scores = model.predict(["left_cc.dcm", "left_mlo.dcm"])
```

or `mama predict path/to/this/folder FILES --out predictions`."""

PLAIN = """\
With transformers alone. `pixels` [b, 1, H, W] are prepared as [below](#images); a text is a list of sentences, each
ends in the token `<|sentence|>`. Both features are means over tokens, that of images before the tower's last
norm{tokens}:

```python
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, {functions}normalize
from transformers import AutoModel, AutoTokenizer{imports}

folder = "path/to/this/folder"
heads = {{name: tensor.float() for name, tensor in load_file(f"{{folder}}/heads.safetensors").items()}}
vision = AutoModel.from_pretrained(f"{{folder}}/vision", dtype=torch.float32).eval()
{text}
tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/tokenizer")
vision.{norm} = torch.nn.Identity()


{images}


@torch.no_grad()
def embed_text(sentences):
    words = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in sentences]
    end = tokenizer.convert_tokens_to_ids("<|sentence|>")
    tokens = [token for of_sentence in words for token in [*of_sentence, end]][:{max_tokens}]
    states = text(input_ids=torch.tensor([tokens])).last_hidden_state
    return normalize(linear(states.mean(1), heads["text_head.weight"], heads["text_head.bias"]), dim=-1)


similarity = embed_images(pixels) @ embed_text(["Impression: BI-RADS 5."]).T
```"""

ALL_PATCHES = """\
@torch.no_grad()
def embed_images(pixels):
    channels = vision.config.num_channels
    tokens = vision(pixel_values=pixels.expand(-1, channels, -1, -1){arguments}).last_hidden_state
    return normalize(linear(tokens.mean(1), heads["image_head.weight"], heads["image_head.bias"]), dim=-1)"""

TISSUE_ONLY = """\
def feature(image):
    tissue = max_pool2d(image, vision.config.patch_size).flatten() > {darkest}  # of each patch
    kept = tissue if tissue.any() else ~tissue
    image = image.expand(-1, vision.config.num_channels, -1, -1)
    tokens = vision.embeddings(image{arguments})
    first = tokens.shape[1] - len(kept)  # class token and registers come before the patches
    tokens = torch.cat([tokens[:, :first], tokens[:, first:][:, kept]], dim=1)
    for block in vision.{blocks}:
        tokens = block(tokens{turned})
    return tokens.mean(1)


@torch.no_grad()
def embed_images(pixels):
    features = torch.cat([feature(image) for image in pixels.split(1)])
    return normalize(linear(features, heads["image_head.weight"], heads["image_head.bias"]), dim=-1)"""

MERGED = """text = AutoModel.from_pretrained(f"{folder}/text", dtype=torch.float32).eval()"""

ADAPTED = """\
base = AutoModel.from_pretrained({base}, dtype=torch.float32)  # or the folder where it lies
base.resize_token_embeddings({vocabulary}, mean_resizing=False)
{cut}text = PeftModel.from_pretrained(base, f"{{folder}}/text").eval()"""

CUT = """base.{blocks} = base.{blocks}[:{layers}]\n"""

PREPARED = """\
`preprocessing.json` has how a picture is made of an image file; `mama predict` does it. Each was:"""
