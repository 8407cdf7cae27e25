"""The network of a model folder at work: pictures and texts -> embeddings and maps, in batches.

Letters: t texts, b images of a batch, s sentences, H x W canvas, gh x gw patches of it, D shared width, d width of the
image tower.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mama.data.augment import normalise
from mama.data.batches import tokenise
from mama.data.tokenizer import Tokenizer
from mama.errors import ConfigError
from mama.evaluate.arrays import Float32s
from mama.evaluate.class_prompts import SENTENCE_END
from mama.model.mama_model import MamaModel
from mama.predict import arguments
from mama.predict.document import MapFacts
from mama.predict.exams import Embedded
from mama.predict.heat_map import asked_vectors, embed_with_maps, has_maps
from mama.predict.pictures import Input, Pictured, Recipe, pictures
from mama.settings.schema import DataConfig
from shards.pack.sample import Refusal
from shards.progress import progress

BATCH = {"cpu": 8, "cuda": 64}  # images per forward pass: on a CPU few, so that decoding goes on beside it
TEXTS = 64  # texts per forward pass, as in an evaluation
NO_PIXELS: NDArray[np.uint8] = np.zeros((0, 0), np.uint8)

# Pictures, their embeddings [b, D] and cosines with sentences by patch [b, s, gh, gw] (or [b, 0], where there are none)
# -> the heat maps of each picture, by sentence
Draw = Callable[[Sequence[Pictured], Float32s, Float32s], list[dict[str, MapFacts]]]


class Encoder:
    """A model in evaluation mode on a device, its tokenizer, and the settings of texts that it was trained with."""

    def __init__(self, model: MamaModel, tokenizer: Tokenizer, data: DataConfig, device: torch.device) -> None:
        self.model, self.tokenizer, self.data, self.device = model, tokenizer, data, device
        self._embedded: dict[tuple[str, ...], Float32s] = {}  # text -> its embedding

    def embed_sentences(self, texts: Sequence[list[str]]) -> Float32s:
        """Unit embeddings [t, D] of texts given as lists of sentences; each distinct one is computed once."""
        new = list(dict.fromkeys(tuple(text) for text in texts if tuple(text) not in self._embedded))
        for start in range(0, len(new), TEXTS):
            part = new[start : start + TEXTS]
            tokens = tokenise(self.tokenizer, [list(text) for text in part], self.data.max_tokens)
            with torch.inference_mode():
                vectors = self.model.embed_texts(tokens.to(self.device)).float().cpu().numpy()
            self._embedded.update(zip(part, vectors, strict=True))
        return np.stack([self._embedded[tuple(text)] for text in texts])

    def embedded(
        self,
        images: Sequence[Input],
        recipe: Recipe,
        workers: int,
        refused: list[Refusal],
        sentences: Sequence[str] = (),
        draw: Draw | None = None,
    ) -> Generator[Embedded, None, None]:
        """Embed images in their order, and decode the next ones meanwhile; those without a picture go to `refused`."""
        asked = self.embed_sentences([self.split(text, "ask") for text in sentences]) if sentences else None
        mapped = self.asked(sentences) if draw and sentences and has_maps(self.model) else None
        made = pictures(recipe, images, workers)
        with closing(_wanted(made, len(images), refused)) as wanted:
            while batch := list(islice(wanted, BATCH.get(self.device.type, BATCH["cuda"]))):
                embeddings, tower, values = self.forward(np.stack([one.canvas for one in batch]), mapped)
                maps = draw(batch, embeddings, values) if draw else [{} for _ in batch]
                for one, embedding, features, own in zip(batch, embeddings, tower, maps, strict=True):
                    cosines = (asked.astype(np.float64) @ embedding).tolist() if asked is not None else []
                    light = replace(one, data=b"", canvas=NO_PIXELS)
                    yield Embedded(light, embedding, features, dict(zip(sentences, cosines, strict=True)), own)

    @torch.inference_mode()
    def forward(self, canvases: NDArray[np.uint8], asked: Tensor | None = None) -> tuple[Float32s, Float32s, Float32s]:
        """uint8 [b, H, W] -> unit embeddings [b, D], features of the image tower [b, d], maps [b, s, gh, gw].

        The maps are those of the sentences `asked` [s, D], from the same pass; without any [b, 0].
        """
        pixels = normalise(torch.from_numpy(canvases)[:, None].to(self.device))
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if asked is None:
            unit, tower = self.model.embed_images(pixels)
            maps: Float32s = np.zeros((len(canvases), 0), np.float32)
        else:
            unit, tower, maps = embed_with_maps(self.model, pixels, asked)
        return unit.float().cpu().numpy(), tower.float().cpu().numpy(), maps

    def asked(self, sentences: Sequence[str]) -> Tensor:
        """`asked_vectors` [s, D] of this model."""
        data = self.data
        return asked_vectors(self.model, self.tokenizer, sentences, data.max_tokens, self.device, data.style)

    def sentences(self, ask: Sequence[str]) -> list[str]:
        """The distinct sentences asked for. Raises `ConfigError` for one that is empty, or too long for the model."""
        sentences = list(dict.fromkeys(text.strip() for text in arguments.texts("ask", ask)))
        for text in sentences:
            self.split(text, "ask")
        return sentences

    def split(self, text: str, what: str) -> list[str]:
        """The sentences of a text. Raises `ConfigError` if there is none, or more than the model can read."""
        sentences = [part for part in SENTENCE_END.split(text.strip()) if part]
        if not sentences:
            raise ConfigError(f"{what}: {text!r} is an empty text; write a sentence")
        if special := [token for token in self.tokenizer.base.all_special_tokens if token in text]:
            raise ConfigError(f"{what}: {special[0]!r} is a mark of the tokenizer and no word; take it out")
        most = self.data.max_tokens
        if len(self.tokenizer.encode(sentences, 2**31).tokens) > most:
            raise ConfigError(
                f"{what}: {text[:40]!r}... has more than the {most} tokens that the model reads; shorten it"
            )
        return sentences


def _wanted(
    made: Generator[Pictured | Refusal, None, None], count: int, refused: list[Refusal]
) -> Generator[Pictured, None, None]:
    """The pictures, without a second file of a SOP Instance UID; the reasons against the others go to `refused`."""
    first: dict[tuple[str | None, ...], str] = {}
    with closing(made):
        for one in progress(made, count, "reading", "images"):
            if isinstance(one, Refusal):
                refused.append(one)
                continue
            own = (one.patient, one.exam, one.instance)  # some archives have one UID for all images
            if one.instance and not one.in_shards and own in first:
                message = f"{first[own]} has the same SOP Instance UID"
                refused.append(Refusal(one.file, "duplicate", message))
            else:
                first.setdefault(own, one.file)
                yield one
