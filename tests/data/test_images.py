"""Samples that show images: what a file's rows become, and what a model makes of them."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, ProcessorMixin

from tests.data import pictures
from ulbq.blockwise.samples import Samples
from ulbq.blockwise.walk import BlockWalk
from ulbq.data.calibration import Calibration, load_calibration, save_calibration
from ulbq.data.image_rows import names_images
from ulbq.data.images import image_samples
from ulbq.errors import InputError
from ulbq.models.blocks import block_list, skeleton
from ulbq.models.processor import placeholders
from ulbq.models.source import ModelSource, resolve
from ulbq.progress import Silent

pytest.importorskip("PIL", reason="needs Pillow")

_CPU = torch.device("cpu")
_LENGTH = 96


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Source and processor of a family's model, each made once."""
    known: dict[str, tuple[ModelSource, ProcessorMixin]] = {}

    def make(family: str) -> tuple[ModelSource, ProcessorMixin]:
        if family not in pictures.PILLOW_ALONE:
            pytest.importorskip("torchvision")
        if family == "smolvlm":
            pytest.importorskip("num2words")
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            processor = pictures.save_model(family, folder)
            known[family] = (resolve(folder), processor)
        return known[family]

    return make


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_rows(folder: Path) -> Path:
    """Five texts and three chats with an image each, and a text without."""
    names = pictures.save_images(folder, 8)
    texts = [{"text": f"a picture <image> of number {i}", "images": [name]} for i, name in enumerate(names[:5])]
    chats = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": name}, {"type": "text", "text": "this?"}]}
            ]
        }
        for name in names[5:]
    ]
    return write(folder, [*texts, *chats, {"text": "only words, and these are what fills the rest of a sample."}])


def draw(made: tuple[ModelSource, ProcessorMixin], path: Path, **changes: Any) -> Calibration:
    source, processor = made
    settings = {"samples": 4, "length": _LENGTH, "seed": 0, "progress": Silent(), **changes}
    return image_samples(path, processor, placeholders(source, processor), **settings)


def walk(source: ModelSource, samples: Samples, folder: Path) -> BlockWalk:
    model = skeleton(source)
    return BlockWalk(model, source, samples, dtype=torch.float32, device=_CPU, limit=1 << 30, directory=folder)


@torch.no_grad()
def entering(source: ModelSource, drawn: Calibration) -> list[torch.Tensor]:
    """What transformers' own model gives to each of its blocks, ``[samples, length, hidden]``."""
    whole = AutoModelForImageTextToText.from_pretrained(source.path, dtype=torch.float32)
    blocks = block_list(whole)[1]
    seen: list[list[torch.Tensor]] = [[] for _ in blocks]
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen[index].append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    for row, image in enumerate(drawn.images or ()):
        beside = {name: value.float() if value.is_floating_point() else value for name, value in image().items()}
        whole(input_ids=drawn.tokens[row : row + 1], **beside)
    return [torch.cat(states) for states in seen]


@pytest.mark.parametrize("family", pictures.FAMILIES)
def test_blocks_get_what_the_whole_model_gives_them(family: str, made: Any, tmp_path: Path) -> None:
    source, _ = made(family)
    drawn = draw(made(family), some_rows(tmp_path))
    wanted = entering(source, drawn)
    stream = walk(source, drawn.drawn, tmp_path)
    for index, states in enumerate(wanted):
        torch.testing.assert_close(stream.hidden.get(slice(None)), states, atol=1e-6, rtol=1e-5)
        # Three at once, though each is called with positions and masks of its own.
        stream.advance(index, stream.load(index), stream.hidden, stream.hidden, batch_size=3, context=nullcontext)
        stream.add_between(index, stream.hidden)
    plain = walk(source, Samples(drawn.tokens), tmp_path).hidden.get(slice(None))
    moments, without = (states.flatten(0, 1).square().mean(0) for states in (wanted[0], plain))
    assert ((moments - without).abs() > 1e-4 * without).float().mean() > 0.8


def test_samples_are_full_of_whole_images(made: Any, tmp_path: Path) -> None:
    source, processor = made("gemma3")
    heard = Heard()
    drawn = draw((source, processor), some_rows(tmp_path), progress=heard)
    assert drawn.tokens.shape == (4, _LENGTH)
    assert drawn.images is not None
    assert sorted(file.name for sample in drawn.images for file in sample.files) == [f"{i}.png" for i in range(8)]
    (part,) = placeholders(source, processor)
    for tokens, sample in zip(drawn.tokens, drawn.images, strict=True):
        assert (tokens == part).sum() == 4 * len(sample.files)  # four tokens each, none cut off
        inputs = sample()
        assert len(inputs["pixel_values"]) == len(sample.files)
        assert inputs["token_type_ids"].shape == (1, _LENGTH)
        assert "attention_mask" not in inputs
    assert heard.notes == ["4 samples show 8 images: 8% of their tokens are images', 38% text that fills them up."]


def test_a_row_is_cut_behind_its_last_image(made: Any, tmp_path: Path) -> None:
    names = pictures.save_images(tmp_path, 3)
    path = write(tmp_path, [{"text": "<image>" + "word " * 40, "images": [name]} for name in names])
    drawn = draw(made("gemma3"), path, samples=3, length=24)
    assert all(len(sample.files) == 1 for sample in drawn.images or ())
    late = write(tmp_path, [{"text": "word " * 40 + "<image>", "images": [name]} for name in names])
    with pytest.raises(
        InputError, match="3 rows with images, too few for 3 samples, as the images of 3 do not fit into 24 tokens"
    ):
        draw(made("gemma3"), late, samples=3, length=24)


def test_forms_of_rows_that_say_the_same(made: Any, tmp_path: Path) -> None:
    (name,) = pictures.save_images(tmp_path, 1)
    told = {"type": "text", "text": "what is this?"}
    forms: list[dict[str, Any]] = [
        *({"content": [{"type": "image", key: name}, told]} for key in ("image", "path", "url")),
        {"content": [{"type": "image"}, told], "images": [name]},
        {"content": "<image>what is this?", "images": [name]},
    ]
    found = []
    for form in forms:
        row = {"messages": [{"role": "user", "content": form.pop("content")}], **form}
        found.append(draw(made("gemma3"), write(tmp_path, [row]), samples=1))
    assert len({drawn.sha256 for drawn in found}) == 1
    # A text gets the marks that the chat template puts around an image.
    source, processor = made("qwen2_5_vl")
    drawn = draw((source, processor), write(tmp_path, [{"text": "see <image>", "images": [name]}]), samples=1)
    first = source.tokenizer().convert_ids_to_tokens(drawn.tokens[0])
    assert first[4:7] == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


def test_the_hash_knows_the_pixels(made: Any, tmp_path: Path) -> None:
    from PIL import Image

    path = some_rows(tmp_path)
    before, again, other = draw(made("gemma3"), path), draw(made("gemma3"), path), draw(made("gemma3"), path, seed=1)
    assert before.sha256 == again.sha256 != other.sha256
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    after = draw(made("gemma3"), path)
    assert torch.equal(after.tokens, before.tokens)
    assert after.sha256 != before.sha256
    with pytest.raises(InputError, match=r"0\.png' changed while the run read it"):
        [sample() for sample in before.images or ()]
    assert after.record()["images"] == 8


def test_stored_samples_of_images_are_no_text(made: Any, tmp_path: Path) -> None:
    drawn = draw(made("gemma3"), some_rows(tmp_path))
    save_calibration(tmp_path / "c.safetensors", drawn)
    with pytest.raises(InputError, match="show images, of which the file holds the hashes alone"):
        load_calibration(tmp_path / "c.safetensors")


def test_files_of_text_name_no_images(tmp_path: Path) -> None:
    assert not names_images(write(tmp_path, [{"text": "a", "images": []}, {"messages": [{"content": "b"}]}]))
    assert not names_images(tmp_path / "a.txt")
    assert names_images(write(tmp_path, [{"text": "a"}, {"text": "<image>", "images": ["a.png"]}]))
    assert names_images(write(tmp_path, [{"messages": [{"content": [{"type": "image", "url": "a.png"}]}]}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "<image>", "images": ["none.png"]}, r"row 1: there is no image '.*none\.png'"),
        ({"text": "<image>", "images": ["0.png", "0.png"]}, "row 1: 2 images, and 1 places for them"),
        ({"text": "no place", "images": ["0.png"]}, "row 1: 1 images, and 0 places for them"),
        ({"text": "<image>", "images": ["https://a.org/a.png"]}, "images are not fetched"),
        ({"text": "<image>", "images": [{"bytes": "…"}]}, "an image that is not named by a path"),
        ({"text": "<image>", "images": ["rows.jsonl"]}, "is not an image that Pillow can read"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "row 1: an image without a path"),
        ({"messages": [{"content": [{"type": "image", "path": "0.png"}, {"type": "video"}]}]}, "neither text nor an"),
        ({"text": "<image>", "images": ["0.png"]}, "holds no text to fill samples of 96 tokens"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], message: str, made: Any, tmp_path: Path) -> None:
    pictures.save_images(tmp_path, 1)
    path = write(tmp_path, [row])
    with pytest.raises(InputError, match=message):
        draw(made("gemma3"), path, samples=1)


def test_too_few_rows(made: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 8 rows with images, too few for 9 samples"):
        draw(made("gemma3"), some_rows(tmp_path), samples=9)
