"""Packed artifacts of ulbq in vLLM (0.32), which calls :func:`register` in each of its processes."""


def register() -> None:
    """Tell vLLM of ``quant_method: ulbq``; a second time changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ulbq_vllm.packed import PackedConfig

    register_quantization_config("ulbq")(PackedConfig)
