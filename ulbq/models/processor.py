"""The processor that lies beside a model of images: it makes pixel values and placeholders of them."""

import importlib.util

from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from ulbq.errors import InputError, ResourceError
from ulbq.models.skeleton import BUILD_ERRORS, auto_class
from ulbq.models.source import ModelSource
from ulbq.printable import one_line


def load_processor(source: ModelSource) -> ProcessorMixin:
    """The processor of images and text in a model's folder.

    Raises:
        InputError: the model sees no images, or has no processor that transformers can read.
        ResourceError: a package is missing that it needs.
    """
    if auto_class(source.config) is not AutoModelForImageTextToText:
        raise InputError(
            f"'{source.given}' is a model of text: it has no place for images.",
            hint="Give samples of text, or a model of images.",
        )
    if importlib.util.find_spec("PIL") is None:
        raise ResourceError("Reading images needs Pillow.", hint="pip install 'ulbq[images]'")
    try:
        found = AutoProcessor.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except ImportError as error:
        cause = one_line(str(error))
        raise ResourceError(
            f"The processor of '{source.given}' needs another package ({cause[:200]}).",
            hint="pip install 'ulbq[images]'",
        ) from error
    except (OSError, *BUILD_ERRORS) as error:
        raise _without(source) from error
    if not isinstance(found, ProcessorMixin) or getattr(found, "image_token", None) is None:
        raise _without(source)
    return found


def placeholders(source: ModelSource, processor: ProcessorMixin) -> frozenset[int]:
    """The tokens that stand for parts of images, by the model's configuration and by its processor."""
    named = [getattr(source.config, name, None) for name in ("image_token_id", "image_token_index")]
    return frozenset(token for token in (*named, *processor.image_token_ids) if isinstance(token, int))


def _without(source: ModelSource) -> InputError:
    return InputError(
        f"'{source.given}' has no processor of images that transformers can read.",
        hint="Put processor_config.json and preprocessor_config.json of the original model beside its weights. "
        "Some, as Llama 4's, need torchvision: pip install 'ulbq[images]'.",
    )
