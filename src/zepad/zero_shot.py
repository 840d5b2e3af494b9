"""Zero-shot classification: the text embeddings of the class names become the head of a CLIP image encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigError, InputError
from .modes import evaluating

IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The subset of seven ImageNet prompts recommended by CLIP's authors (github.com/openai/CLIP, notebooks)."""

_BATCH = 256  # number of texts per forward pass


class ZeroShotHead(nn.Module):
    """A linear head on normalised features: the cosine similarity to each class's text, times `scale`, plus `bias`.

    It maps features `(N, D)` to logits `(N, K)`. All tensors are buffers, which are saved and moved with the module and
    never trained. Half-precision features are normalised and compared in float32, also under autocast: logits are
    float32, or float64 for float64 features.

    Args:
        weight: Embedding of each class, `(K, D)`; its rows are normalised to length one.
        scale: Factor of the cosines, `logit_scale.exp()` in CLIP.
        bias: Offset of the logits, `logit_bias` in SigLIP.

    Attributes:
        features: Number of features, `D`.
        classes: Number of classes, `K`.

    Raises:
        InputError: If the embeddings are not a matrix, or a row of them is zero or not finite, or if scale or bias is
            not a finite number.

    Examples:
        >>> import torch
        >>> ZeroShotHead(torch.eye(2), scale=10)(torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision (CLIP), ICML 2021;
        Zhai et al., Sigmoid Loss for Language Image Pre-Training (SigLIP), ICCV 2023.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, *, scale: float | Tensor = 1.0, bias: float | Tensor = 0.0) -> None:
        super().__init__()
        if not (weight.ndim == 2 and weight.numel() and weight.is_floating_point()):
            raise InputError(
                "the embeddings of the classes must be floating-point of shape (K, D); "
                f"got {weight.dtype} of shape {tuple(weight.shape)}."
            )
        weight = weight.detach().float()
        lengths = weight.norm(dim=1)
        if not (lengths.isfinite() & (lengths > 0)).all():
            raise InputError("the embeddings of the classes must be finite and not zero; got one that is not.")
        self.classes, self.features = weight.shape
        self.register_buffer("weight", F.normalize(weight))
        for name, value in (("scale", scale), ("bias", bias)):
            number = torch.as_tensor(value, dtype=torch.float32, device=weight.device).detach().clone()
            if number.numel() != 1 or not number.isfinite():
                raise InputError(f"{name} must be one finite number; got {value!r}.")
            self.register_buffer(name, number.reshape(()))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits `(N, K)` of features `(N, D)`."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.normalize(features.to(dtype), dim=-1) @ self.weight.to(dtype).T
            return cosines * self.scale.to(dtype) + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Show the number of features and classes, and the scale."""
        return f"features={self.features}, classes={self.classes}, scale={self.scale.item():g}"

    @classmethod
    def from_text(
        cls,
        model: nn.Module,
        tokenizer: Callable[..., Any],
        class_names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> ZeroShotHead:
        """Build the head from the names of its classes.

        The embedding of a class is the mean over all templates of the normalised text embeddings, normalised again
        (CLIP, section 3.1.4, prompt ensembling).

        Args:
            model: Model with an image and a text tower: one of open_clip, or a transformers `CLIPModel` or
                `SiglipModel`. It is not modified, and the head is on its device.
            tokenizer: Tokenizer of the model: `open_clip.get_tokenizer(name)` or `AutoTokenizer.from_pretrained(name)`.
            class_names: Distinct names of the classes, in the order of the labels.
            templates: Prompts with `{}` in place of the name, such as `IMAGENET_TEMPLATES`.

        Raises:
            InputError: If there is no name or template, a name occurs twice, a template has no `{}`, the model has
                no text tower, or the tokens or embeddings of the texts are not one row per text.
        """
        names, sentences = _texts(class_names, "class_names"), _texts(templates, "templates")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"class_names must differ; {twice[0]!r} occurs {names.count(twice[0])} times.")
        unfilled = [sentence for sentence in sentences if "{}" not in sentence]
        if unfilled:
            raise InputError(
                f'a template must hold {{}} where the name goes, as "a photo of a {{}}."; got {unfilled[0]!r}.'
            )
        scale = getattr(model, "logit_scale", None)
        if not (hasattr(model, "encode_text") or hasattr(model, "get_text_features")) or not isinstance(scale, Tensor):
            raise InputError(
                f"{type(model).__name__} has no text tower. Pass the whole model: one of open_clip, or a CLIPModel or "
                "SiglipModel of transformers."
            )
        bias = getattr(model, "logit_bias", None)
        with torch.no_grad(), evaluating(model):
            total = sum(
                F.normalize(_embed(model, tokenizer, [sentence.replace("{}", name) for name in names]))
                for sentence in sentences
            )
            return cls(total, scale=scale.float().exp(), bias=0.0 if bias is None else bias)  # type: ignore[arg-type]


def check_heads(
    heads: Mapping[str, object], roles: Sequence[str], features: Mapping[str, int]
) -> dict[str, ZeroShotHead]:
    """Return the heads of the given roles after checking that they fit their encoders and each other.

    Args:
        heads: Heads by role.
        roles: Roles that must have a head. Heads of other roles in `features` are not returned.
        features: Number of features of each encoder, by role.

    Raises:
        ConfigError: If a head is missing or does not fit its encoder, or the heads differ in the number of classes.
    """
    checked = {role: head for role in roles if isinstance(head := heads.get(role), ZeroShotHead)}
    if len(checked) < len(roles) or set(heads) - set(features):
        raise ConfigError(
            f"zero-shot heads must be a mapping of {', '.join(roles)} to ZeroShotHead; got "
            f"{', '.join(f'{role} {type(head).__name__}' for role, head in heads.items()) or 'none'}. "
            "Make each with ZeroShotHead.from_text."
        )
    for role, head in checked.items():
        if head.features != features[role]:
            raise ConfigError(
                f"the zero-shot head of {role} takes {head.features} features and the encoder gives "
                f"{features[role]}. Make it with the text tower of that very encoder."
            )
    if len({head.classes for head in checked.values()}) != 1:
        each = ", ".join(f"{role} {head.classes}" for role, head in checked.items())
        raise ConfigError(f"zero-shot heads must agree on the number of classes; got {each}.")
    return checked


def _texts(texts: Sequence[str], name: str) -> list[str]:
    listed = [] if isinstance(texts, str) else list(texts)
    if not listed or not all(isinstance(text, str) and text for text in listed):
        raise InputError(f"{name} must be a list of one or more strings; got {texts!r}.")
    return listed


def _embed(model: Any, tokenizer: Callable[..., Any], texts: list[str]) -> Tensor:
    """Return the embeddings `(len(texts), D)` in float32."""
    return torch.cat([_embed_batch(model, tokenizer, texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)])


def _embed_batch(model: Any, tokenizer: Callable[..., Any], texts: list[str]) -> Tensor:
    of_transformers = hasattr(model, "get_text_features")
    tokens = _tokenize_for_transformers(model, tokenizer, texts) if of_transformers else {"text": tokenizer(texts)}
    for name, value in tokens.items():
        if not (isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(texts)):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the tokenizer must make a tensor ({len(texts)}, L) of {len(texts)} texts; {name} is {got}."
            )
    device = next(model.parameters()).device
    tokens = {name: value.to(device) for name, value in tokens.items()}
    try:
        output = model.get_text_features(**tokens) if of_transformers else model.encode_text(**tokens)
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = {name: tuple(value.shape) for name, value in tokens.items()}
        raise InputError(
            f"the text tower of {type(model).__name__} did not take tokens of shape {shapes}: {error} Pass the "
            "tokenizer that belongs to the model."
        ) from error
    embeddings: Tensor = getattr(output, "pooler_output", output)  # transformers 5 returns a record
    return embeddings.float()


def _tokenize_for_transformers(model: Any, tokenizer: Callable[..., Any], texts: list[str]) -> dict[str, Any]:
    config = model.config
    # SigLIP was trained on texts padded to full length and takes its embedding from the last position.
    padding = "max_length" if config.model_type.startswith("siglip") else True
    length = config.text_config.max_position_embeddings
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
    if not isinstance(tokens, Mapping):
        return {"input_ids": tokens}
    return {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
