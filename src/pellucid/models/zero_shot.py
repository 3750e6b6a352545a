"""Which of these labels is in the picture: CLIP without training (arXiv 2103.00020, section 3.1).

    zero_shot("openai/clip-vit-base-patch32", "cat.jpg", ["cat", "dog"])     tensor([0.99, 0.01])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pellucid.errors import BadInput
from pellucid.models.embedding import Model, embed_texts, listed
from pellucid.models.hub import load, local_folder
from pellucid.models.images import Image, Preprocess, clip_preprocess, read_preprocess
from pellucid.nn import DualEncoder
from pellucid.tokenizers import Tokenizer

TEMPLATE = "a photo of a {}."


def zero_shot(
    model: Model, images: Image | Sequence[Image], labels: Sequence[str], *, template: str | Sequence[str] = TEMPLATE,
    tokenizer: Tokenizer | None = None, preprocess: Preprocess | None = None, batch_size: int = 32, device: str = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Tensor:
    """Probabilities of the labels: (labels,) for one picture, (N, labels) for a list of them; float32 on the CPU.

    model: a folder or Hub id, or a `DualEncoder`; then give its tokenizer.   images: see `images.Image`.
    template: the sentence around a label; the vectors of several are averaged.   preprocess: default the folder's, or CLIP's.
    """
    labels = listed(labels, "labels")
    templates = [template] if isinstance(template, str) else list(template)
    if not labels or not templates or not all("{}" in t for t in templates):
        raise BadInput("zero-shot classification needs labels, and templates with {} for the label",
                       next=f'for example ["cat", "dog"] and "{TEMPLATE}"')
    many = isinstance(images, list | tuple)
    pictures: list[Image] = list(images) if many else [images]  # type: ignore[arg-type, list-item]
    module: nn.Module
    if isinstance(model, nn.Module):
        module = model
    else:
        folder = local_folder(model)
        module, tokenizer = load(folder, dtype=dtype, device=device), tokenizer or Tokenizer.load(folder)
        if isinstance(module, DualEncoder):
            preprocess = preprocess or read_preprocess(folder, module.spec.vision.image)
    if not isinstance(module, DualEncoder):
        raise BadInput(f"{type(module).__name__} does not compare texts with pictures", next="use a CLIP checkpoint")
    preprocess = preprocess or clip_preprocess(module.spec.vision.image)
    texts = label_vectors(module, tokenizer, labels, templates)
    scale = float(module.logit_scale.detach().exp())
    probabilities = torch.cat([
        torch.softmax(scale * image_vectors(module, preprocess, pictures[i : i + batch_size]) @ texts.mT, -1)
        for i in range(0, len(pictures), batch_size)]) if pictures else torch.empty(0, len(labels))
    return probabilities if many else probabilities[0]


def label_vectors(model: DualEncoder, tokenizer: Tokenizer | None, labels: list[str], templates: list[str]) -> Tensor:
    """(labels, P): the mean of each label's sentences, of length 1."""
    sentences = [t.replace("{}", label) for label in labels for t in templates]
    vectors = embed_texts(model, sentences, tokenizer=tokenizer)
    return F.normalize(vectors.view(len(labels), len(templates), -1).mean(1), dim=-1)


@torch.inference_mode()
def image_vectors(model: DualEncoder, preprocess: Preprocess, images: Sequence[Image]) -> Tensor:
    """(N, P) float32 on the CPU, of length 1."""
    pixels = preprocess(images).to(model.logit_scale.device)
    if pixels.shape[1] != model.spec.vision.channels:
        raise BadInput(f"this model reads pictures of {model.spec.vision.channels} channels", "pictures are made RGB")
    return F.normalize(model.encode_image(pixels).float(), dim=-1).cpu()
