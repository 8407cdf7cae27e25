"""The image tower with a linear classifier, for fine-tuning. Letters: b images, d width of the tower, K classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mama.model.backbones import blocks_of
from mama.model.vision_tower import VisionTower


class Classifier(nn.Module):
    """A linear classifier on the tower's global feature, the one that a linear probe sees; it starts at 0."""

    def __init__(self, vision: VisionTower, classes: int) -> None:
        super().__init__()
        self.vision = vision
        self.head = nn.Linear(vision.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        vision.norm.requires_grad_(False)  # the global feature is read before it

    def forward(self, images: Tensor) -> Tensor:
        """[b, 1, H, W] in [-1, 1] -> logits [b, K] in fp32."""
        logits: Tensor = self.head(self.vision(images).pooled)
        return logits.float()

    def depths(self) -> dict[str, int]:
        """How many layers lie above each parameter, by name: 0 the head, 1 the last block, the most the embedding."""
        place = {id(p): n for n, block in enumerate(blocks_of(self.vision)) for p in block.parameters()}
        blocks = max(place.values()) + 1
        return {
            name: 0 if name.startswith("head.") else blocks - place.get(id(p), -1)
            for name, p in self.named_parameters()
        }


@torch.no_grad()
def log_probabilities(model: Classifier, images: Tensor) -> Tensor:
    """[b, 1, H, W] in [-1, 1] -> natural logarithms of the probabilities, fp32 [b, K]."""
    return torch.log_softmax(model(images.to(model.head.weight.dtype)), dim=1)
