"""The model card: `README.md` of a model folder."""

from __future__ import annotations

import json

from mama.run.portable import portable
from mama.settings.schema import Config
from shards.read.manifest import load_manifest
from shards.read.remote import local_folder

CARD = """\
# {name}

MaMA image-text model, step {step} of {steps}.

Trained on:

{data}

The licences of these data sets decide whether you may share this model. EMBED's licence, for example, forbids it.
Not for clinical use.

```json
{settings}
```
"""


def model_card(config: Config, step: int) -> str:
    """Markdown: training data, training steps, image size and towers; it names no path of this machine."""
    named = portable(config)
    manifests = [load_manifest(local_folder(folder, config.data.cache_folder)) for folder in config.data.shards]
    data = [
        f"- `{manifest.source}` ({sum(s.samples for s in manifest.shards if s.split == 'train')} studies)"
        for manifest in manifests
    ]
    settings = {
        "image_size": list(config.data.image_size),
        "seed": config.seed,
        "vision": named.vision.model,
        "text": named.text.model,
    }
    return CARD.format(
        name=config.name,
        step=step,
        steps=config.train.steps,
        data="\n".join(data),
        settings=json.dumps(settings, indent=2),
    )
