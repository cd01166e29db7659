"""Tiny random models of images with their processors, saved as Hugging Face folders; and images for them."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, ProcessorMixin

ROOT = Path(__file__).resolve().parents[2]
PILLOW_ALONE = ("gemma3", "idefics3", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Families whose images need no torchvision."""
FAMILIES = (*PILLOW_ALONE, "smolvlm", "mistral3", "llama4")

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)
_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
_IDEFICS = (
    *("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
_LLAMA4 = (
    *("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>"),
)
# Special tokens, the one that a chat template writes for an image, and the one that stands for a part of it.
_TOKENS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "gemma3": (("<boi>", "<soft>", "<eoi>"), "<boi>", "<soft>"),
    "idefics3": (_IDEFICS, "<image>", "<image>"),
    "smolvlm": (_IDEFICS, "<image>", "<image>"),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), (_QWEN, "".join((*_QWEN[:2], _QWEN[3])), "<|image_pad|>")),
    "mistral3": (("[IMG]", "[IMG_BREAK]", "[IMG_END]"), "[IMG]", "[IMG]"),
    "llama4": (_LLAMA4, "<|image|>", "<|patch|>"),
}


def families() -> Any:
    """The benchmark that has tiny configurations of all families."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(family: str, folder: Path) -> ProcessorMixin:
    """A model of images with its tokenizer and its processor, which is given back.

    Those of Qwen are without their part for videos, which needs torchvision, and are not saved.
    """
    known = families()
    tokenizer = _tokenizer(family)
    part = tokenizer.convert_tokens_to_ids(_TOKENS[family][2])
    config = known.tiny("smolvlm" if family == "idefics3" else family)
    if family == "idefics3":
        config = type(config).from_dict({**config.to_dict(), "model_type": "smolvlm"})
        config = known.CONFIG_MAPPING["idefics3"](
            text_config=config.text_config.to_dict(),
            vision_config={**config.vision_config.to_dict(), "model_type": "idefics3_vision"},
            image_token_id=part,
            scale_factor=2,
        )
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 512
    for name in ("image_token_id", "image_token_index"):
        if hasattr(config, name):
            setattr(config, name, part)
    for name, token in (("video", _QWEN[2]), ("vision_start", _QWEN[0]), ("vision_end", _QWEN[3])):
        if family.startswith("qwen"):
            setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    known.random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = _processor(family, tokenizer, config)
    if getattr(made, "video_processor", True) is not None:
        made.save_pretrained(folder)
    return made


def save_images(folder: Path, count: int) -> list[str]:
    """Names of images of random pixels, of several sizes."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    names = []
    for number in range(count):
        size = ((40, 40), (64, 32), (32, 56))[number % 3]
        pixels = generator.integers(0, 256, (*size, 3), dtype=numpy.uint8)
        names.append(f"{number}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones."""
    special, shown, _ = _TOKENS[family]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters]
    backend = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"boi_token": "<boi>", "image_token": "<soft>", "eoi_token": "<eoi>"} if family == "gemma3" else {}
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )
    found.add_special_tokens({"additional_special_tokens": list(special)})
    found.chat_template = _TEMPLATE.replace("IMAGE", shown)
    return found


def _processor(family: str, tokenizer: PreTrainedTokenizerFast, config: Any) -> ProcessorMixin:
    """The family's own, for small images."""
    import transformers as t
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"height": 28, "width": 28}
    images: Any
    given: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    if family == "gemma3":
        images = Gemma3ImageProcessorPil(size=size, image_seq_length=4)
        return t.Gemma3Processor(image_processor=images, image_seq_length=4, **given)
    if family == "idefics3":
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
        )
        return t.Idefics3Processor(image_processor=images, image_seq_len=1, **given)
    if family == "smolvlm":
        images = t.SmolVLMImageProcessor(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
        )
        return t.SmolVLMProcessor(
            image_processor=images, video_processor=t.SmolVLMVideoProcessor(), image_seq_len=1, **given
        )
    if family == "mistral3":
        images = t.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
        return t.PixtralProcessor(image_processor=images, patch_size=14, spatial_merge_size=2, **given)
    if family == "llama4":
        images = t.Llama4ImageProcessor(size=size, max_patches=2, resize_to_max_canvas=False)
        return t.Llama4Processor(image_processor=images, patch_size=14, pixel_shuffle_ratio=0.5, **given)
    vision = config.vision_config
    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    pixels = {"min_pixels": 28 * 28, "max_pixels": 64 * 64, "merge_size": vision.spatial_merge_size}
    images = Qwen2VLImageProcessorPil(**sizes, **pixels)
    kind = t.Qwen2_5_VLProcessor if family == "qwen2_5_vl" else t.Qwen3VLProcessor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "check_argument_for_proper_class", lambda *given: None)
        return kind(image_processor=images, video_processor=None, **given)
