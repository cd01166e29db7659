"""The process that trials are forked from: everything imported, nothing opened, one thread.

Reads one JSON object a line, ``{"scenario": "module:function", "arguments": {…}}``, and answers with one: ``{"result":
…}`` or ``{"failure": …}``. Started by :class:`tests.campaign.pool.Pool`, with ``calls.c`` in between and, where that
can be had, a namespace of mounts of its own.
"""

import importlib
import json
import os
import pkgutil
import sys
import threading
import traceback
from typing import Any

_MODELS = ("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto")
_LIBRARIES = (
    "torch",
    "datasets",
    "gguf",
    "peft",
    "safetensors.torch",
    "compressed_tensors",
    "torch._dynamo",
    "lm_eval",
    "lm_eval.tasks",
)


def warm() -> None:
    """Import what any command imports, so that no trial has to."""
    import ulbq
    import ulbq.commands

    for package in (ulbq, ulbq.commands):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__") and "triton" not in found.name:
                importlib.import_module(found.name)
    for name in (*_LIBRARIES, *_MODELS):
        importlib.import_module(name)


def serve() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warm()
    threads = threading.active_count()
    answers.write(json.dumps({"result": threads}) + "\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(_answer(asked["scenario"], asked["arguments"])) + "\n")
        answers.flush()


def _answer(scenario: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, function = scenario.partition(":")
    try:
        return {"result": getattr(importlib.import_module(module), function)(**arguments)}
    except Exception:
        return {"failure": traceback.format_exc()}


if __name__ == "__main__":
    serve()
