"""Zero-shot heads agree with the logits of open_clip and transformers."""

from __future__ import annotations

import copy
import string
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zepad.errors import InputError
from zepad.zero_shot import IMAGENET_TEMPLATES, ZeroShotHead

NAMES = ["cat", "dog", "small boat", "a hat of felt"]
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
TEXT = {"width": 16, "heads": 2, "layers": 2}
LENGTH = 24
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def shaken(model: Any) -> Any:
    """Move every weight: those of a fresh model are so small that all texts look alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP", "SigLIP", "CoCa"])
def of_open_clip(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
    if request.param == "CLIP":
        return shaken(open_clip.CLIP(**sizes))
    if request.param == "CoCa":
        sizes["vision_cfg"] = {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
        sizes["text_cfg"] = {**TEXT, "embed_cls": True, "output_tokens": True}
        return shaken(open_clip.CoCa(**sizes, multimodal_cfg={**TEXT, "attn_pooler_heads": 4}))
    bias = -10.0 if request.param == "SigLIP" else None
    return shaken(open_clip.CustomTextCLIP(**sizes, init_logit_bias=bias))


@pytest.fixture(scope="module")
def words() -> Any:
    return open_clip.SimpleTokenizer()


def tokenizer() -> Any:
    """One token per letter: no vocabulary can be downloaded here."""
    letters = sorted({*string.ascii_lowercase, ".", ","})
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[])


def of_transformers(kind: str) -> Any:
    spelled = tokenizer()
    text = {
        **SMALL,
        "vocab_size": len(spelled),
        "max_position_embeddings": LENGTH,
        "eos_token_id": spelled.eos_token_id,
        "projection_size": 16,
    }
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    if kind == "CLIP":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        return shaken(transformers.CLIPModel(config))
    return shaken(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))


def from_text(model: Any, tokenize: Any, names: Any = NAMES, templates: Any = ("a photo of a {}.",)) -> ZeroShotHead:
    return ZeroShotHead.from_text(model, tokenize, names, templates)


# the numbers ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.floats(0.1, 100), st.floats(-20, 20))
def test_logits_are_scaled_cosines(count: int, classes: int, width: int, scale: float, bias: float) -> None:
    generator = np.random.default_rng(count * 100 + classes * 10 + width)
    features, weight = generator.normal(size=(count, width)), generator.normal(size=(classes, width)) * 3
    head = ZeroShotHead(torch.from_numpy(weight).float(), scale=scale, bias=bias)
    assert (head.features, head.classes) == (width, classes)
    expected = np.empty((count, classes))
    for i in range(count):
        for k in range(classes):
            lengths = np.linalg.norm(features[i]) * np.linalg.norm(weight[k])
            expected[i, k] = scale * (features[i] @ weight[k]) / lengths + bias
    logits = head(torch.from_numpy(features))
    assert logits.dtype == torch.float64
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("templates", [("a photo of a {}.",), IMAGENET_TEMPLATES], ids=["one", "seven"])
def test_the_weight_is_that_of_open_clips_own_classifier(of_open_clip: Any, words: Any, templates: Any) -> None:
    head = from_text(of_open_clip, words, templates=templates)
    own = open_clip.build_zero_shot_classifier(of_open_clip, words, NAMES, templates)
    torch.testing.assert_close(head.weight, own.T)


def test_the_weight_is_the_mean_over_templates_of_unit_embeddings(of_open_clip: Any, words: Any) -> None:
    head = from_text(of_open_clip, words, templates=IMAGENET_TEMPLATES)
    for name, row in zip(NAMES, head.weight, strict=True):
        total = torch.zeros(12)
        for template in IMAGENET_TEMPLATES:
            with torch.no_grad():
                embedding = of_open_clip.encode_text(words([template.format(name)]))[0]
            total += embedding / embedding.norm()
        torch.testing.assert_close(row, total / total.norm())


def test_the_logits_are_those_of_the_open_clip_model(of_open_clip: Any, words: Any) -> None:
    images = torch.rand(5, 3, 16, 16)
    head = from_text(of_open_clip, words)
    with torch.no_grad():
        image = of_open_clip.encode_image(images)
        text = of_open_clip.encode_text(words([f"a photo of a {name}." for name in NAMES]), normalize=True)
        expected = of_open_clip.logit_scale.exp() * nn.functional.normalize(image) @ text.T
        if of_open_clip.logit_bias is not None:
            expected = expected + of_open_clip.logit_bias
    torch.testing.assert_close(head(image), expected)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_the_logits_are_those_of_the_transformers_model(kind: str) -> None:
    model, tokenize = of_transformers(kind), tokenizer()
    head = from_text(model, tokenize)
    padding: Any = "max_length" if kind == "SigLIP" else True
    texts = [f"a photo of a {name}." for name in NAMES]
    tokens = tokenize(texts, padding=padding, max_length=LENGTH, truncation=True, return_tensors="pt")
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = model(**tokens, pixel_values=images).logits_per_image
        features = model.get_image_features(pixel_values=images).pooler_output
    assert expected.std() > 1e-2
    torch.testing.assert_close(head(features), expected)


def test_siglip_texts_are_padded_to_full_length() -> None:
    seen: list[Tensor] = []

    def tokenize(*texts: Any, **arguments: Any) -> Any:
        seen.append(tokenizer()(*texts, **arguments)["input_ids"])
        return seen[-1]

    with_tensor = from_text(of_transformers("SigLIP"), tokenize, ["a", "b"], ["{}"])
    assert seen[0].shape == (2, LENGTH)
    assert with_tensor.classes == 2


# what must not change them --------------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3))
def test_the_length_of_features_does_not_count(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    head = ZeroShotHead(torch.randn(3, 6, generator=generator), scale=10.0)
    features = torch.randn(4, 6, generator=generator)
    torch.testing.assert_close(head(features * factor), head(features))


@given(st.permutations(range(len(NAMES))))
@settings(deadline=None, max_examples=6)
def test_permuted_names_permute_the_logits(order: list[int]) -> None:
    torch.manual_seed(0)
    model, words = shaken(open_clip.CLIP(12, VISION, {**TEXT, "layers": 1})), open_clip.SimpleTokenizer()  # type: ignore[arg-type]
    features = torch.randn(3, 12)
    permuted = from_text(model, words, [NAMES[i] for i in order])
    torch.testing.assert_close(permuted(features), from_text(model, words)(features)[:, order])


def test_a_template_counts_once_however_often_it_is_given_alone(of_open_clip: Any, words: Any) -> None:
    once = from_text(of_open_clip, words)
    torch.testing.assert_close(from_text(of_open_clip, words, templates=["a photo of a {}."] * 3).weight, once.weight)
    assert not torch.allclose(from_text(of_open_clip, words, templates=IMAGENET_TEMPLATES).weight, once.weight)


def test_texts_are_encoded_in_batches_to_the_same_weight(
    of_open_clip: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = from_text(of_open_clip, words)
    lengths: list[int] = []

    def counted(texts: list[str]) -> Tensor:
        lengths.append(len(texts))
        tokens: Tensor = words(texts)
        return tokens

    monkeypatch.setattr("zepad.zero_shot._BATCH", 3)
    torch.testing.assert_close(from_text(of_open_clip, counted).weight, whole.weight)
    assert lengths == [3, 1]


def test_a_name_may_hold_braces(of_open_clip: Any) -> None:
    seen: list[str] = []

    def tokenize(texts: list[str]) -> Tensor:
        seen.extend(texts)
        tokens: Tensor = open_clip.tokenize(texts)
        return tokens

    from_text(of_open_clip, tokenize, ["{0}", "{x"], ["the {}, {{x}}"])
    assert seen == ["the {0}, {{x}}", "the {x, {{x}}"]


def test_the_model_is_left_as_found(of_open_clip: Any, words: Any) -> None:
    model = copy.deepcopy(of_open_clip).train()
    model.visual.eval()
    modes, before = [part.training for part in model.modules()], copy.deepcopy(model.state_dict())
    head = from_text(model, words)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not head.weight.requires_grad


def test_texts_are_encoded_in_evaluation_mode_without_gradients(words: Any) -> None:
    class Seen(Exception):  # noqa: N818 - no error
        pass

    model = open_clip.CLIP(12, VISION, TEXT).train()  # type: ignore[arg-type]

    def encode_text(text: Tensor) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        raise Seen

    model.encode_text = encode_text  # type: ignore[method-assign,assignment]
    with pytest.raises(Seen):
        from_text(model, words)
    assert model.training


# as a module ----------------------------------------------------------------------------------------------------


def test_there_is_nothing_to_train_and_everything_to_save() -> None:
    head = ZeroShotHead(torch.randn(3, 4), scale=7.0, bias=-2.0)
    assert list(head.parameters()) == []
    assert set(head.state_dict()) == {"weight", "scale", "bias"}
    other = ZeroShotHead(torch.ones(3, 4))
    other.load_state_dict(head.state_dict())
    features = torch.randn(2, 4)
    assert torch.equal(other(features), head(features))


def test_gradients_reach_the_features() -> None:
    features = torch.randn(2, 4, requires_grad=True)
    ZeroShotHead(torch.randn(3, 4))(features)[:, 0].sum().backward()
    assert features.grad is not None
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype: torch.dtype) -> None:
    head = ZeroShotHead(torch.randn(3, 64), scale=100.0)
    features = (torch.randn(5, 64) * 1000).to(dtype)  # their squares overflow half precision
    exact = head(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, exact)
    assert torch.equal(head(features), exact)
    torch.testing.assert_close(copy.deepcopy(head).to(dtype)(features), exact, rtol=0, atol=1.0)


def test_a_head_of_a_half_precision_model_is_float32(words: Any) -> None:
    model = open_clip.CLIP(12, VISION, TEXT).bfloat16()  # type: ignore[arg-type]
    head = from_text(model, words)
    assert {value.dtype for value in head.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(len(NAMES)))


def test_it_shows_its_sizes() -> None:
    assert str(ZeroShotHead(torch.randn(3, 4), scale=7)) == "ZeroShotHead(features=4, classes=3, scale=7)"


# bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.randn(4), {}, r"shape \(K, D\); got torch.float32 of shape \(4,\)"),
        (torch.randn(0, 4), {}, r"got torch.float32 of shape \(0, 4\)"),
        (torch.ones(2, 3, dtype=torch.int64), {}, "got torch.int64"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), {}, "finite and not zero"),
        (torch.tensor([[1.0, float("nan")]]), {}, "finite and not zero"),
        (torch.tensor([[1.0, float("inf")]]), {}, "finite and not zero"),
        (torch.ones(2, 3), {"scale": float("nan")}, "scale must be one finite number; got nan"),
        (torch.ones(2, 3), {"bias": torch.ones(2)}, "bias must be one finite number"),
    ],
)
def test_a_weight_that_is_none_is_refused(weight: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ZeroShotHead(weight, **arguments)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "class_names must be a list of one or more strings"),
        ("cat", ["{}"], "class_names must be a list of one or more strings; got 'cat'"),
        (["cat", ""], ["{}"], "class_names must be"),
        (["cat", 3], ["{}"], "class_names must be"),
        (["cat", "dog", "cat"], ["{}"], "class_names must differ; 'cat' occurs 2 times"),
        (["cat"], [], "templates must be"),
        (["cat"], "a photo of a {}.", "templates must be a list of one or more strings; got 'a photo"),
        (["cat"], ["{}", "a photo"], "a template must hold {} .*; got 'a photo'"),
    ],
)
def test_names_and_templates_are_checked(names: Any, templates: Any, message: str, words: Any) -> None:
    with pytest.raises(InputError, match=message):
        from_text(open_clip.CLIP(12, VISION, TEXT), words, names, templates)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 4),
        lambda: open_clip.CLIP(12, VISION, TEXT).visual,  # type: ignore[arg-type]
        lambda: of_transformers("CLIP").vision_model,
        lambda: of_transformers("CLIP").text_model,
    ],
    ids=["foreign", "open_clip image tower", "transformers image tower", "transformers text tower"],
)
def test_a_model_without_both_towers_is_refused(make: Any, words: Any) -> None:
    with pytest.raises(InputError, match="has no text tower. Pass the whole model"):
        from_text(make(), words)


@pytest.mark.parametrize(
    ("tokenize", "message"),
    [
        (
            lambda texts: torch.zeros(len(texts), dtype=torch.int64),
            r"make a tensor \(4, L\) of 4 texts; .*shape \(4,\)",
        ),
        (lambda _: torch.zeros(1, 77, dtype=torch.int64), r"make a tensor \(4, L\) of 4 texts; .*shape \(1, 77\)"),
        (lambda texts: [[1, 2]] * len(texts), "make a tensor .* is list"),
        (lambda texts: torch.zeros(len(texts), 5, dtype=torch.int64), r"did not take tokens of shape .*\(4, 5\)"),
        (lambda texts: torch.full((len(texts), 77), 10**6), r"did not take tokens .*Pass the tokenizer that belongs"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tokenize: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_text(open_clip.CLIP(12, VISION, TEXT), tokenize)  # type: ignore[arg-type]


def test_a_transformers_tokenizer_of_more_entries_is_refused() -> None:
    def tokenize(texts: list[str], **_: Any) -> dict[str, Tensor]:
        return {"input_ids": torch.full((len(texts), 5), 10**6)}

    with pytest.raises(InputError, match="Pass the tokenizer that belongs"):
        from_text(of_transformers("CLIP"), tokenize)
