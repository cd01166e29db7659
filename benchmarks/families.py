"""Tiny random models of transformers' own classes through quantize, reload and exports: which families ulbq takes.

    python benchmarks/families.py                  all of them; some minutes on one core
    python benchmarks/families.py qwen3 mixtral    these alone; nothing is stored, unless --renew puts their rows in

All of them go to benchmarks/results/families.json, from which docs/supported-models.md is made.
"""

import argparse
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import ulbq  # noqa: F401 - lets transformers load packed models
from ulbq import __version__, formats
from ulbq.config.convert import ConvertRequest
from ulbq.config.quantize import QuantizeRequest
from ulbq.errors import UlbqError
from ulbq.models.load import load_model
from ulbq.models.source import ModelSource, resolve
from ulbq.pipeline.convert import convert
from ulbq.pipeline.quantize import quantize

RESULTS = Path(__file__).parent / "results" / "families.json"
EXPORTS = ("gptq", "compressed-tensors", "gguf")
_LARGEST = 20_000_000
_TOKENS = torch.randint(8, 200, (2, 16), generator=torch.Generator().manual_seed(0))

# What a configuration calls its sizes; those that a class has no field for are left out.
_TEXT: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 64, "d_model": 64, "n_embd": 64, "intermediate_size": 128, "ffn_dim": 128},
    **{"num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "n_inner": 128, "head_dim": 16},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "sliding_window": 8, "initializer_range": 0.1},
    # experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2},
    **{"topk_group": 1, "num_expert_group": 2, "moe_topk": 2, "first_k_dense_replace": 1, "num_dense_layers": 1},
    **{"shared_intermediate_size": 64, "moe_k": 2, "num_shared_experts": 1, "intermediate_size_mlp": 128},
    # compressed attention
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"index_n_heads": 2, "index_head_dim": 32, "index_topk": 8, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 128},
    # states
    **{"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    **{"mamba_d_ssm": 128, "mamba_dt_rank": 4, "use_mamba_kernels": False, "state_size": 16, "time_step_rank": 4},
    **{"mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "chunk_size": 16, "ssm_state_size": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"conv_dim": 64, "block_ff_dim": 128, "lru_width": 64},
}
_VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_hidden_layers": 1, "num_heads": 2},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "out_hidden_size": 64, "head_dim": 16},
    **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]},
    **{"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5},
    # sounds
    **{"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "output_dim": 64},
    **{"downsample_hidden_size": 16, "num_mel_bins": 16},
}
_IMAGE = 5  # the token that an image stands for
_QWEN = {"image_token_id": _IMAGE, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ROPE_BY_LAYER = {"rope_parameters": {"full_attention": _ROPE}}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}
_PARTIAL = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}}
_OWN_HEADS = {"num_key_value_heads": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_INDEXED = {
    **{"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 2, "indexer_kv_heads": 1},
    **{"indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 32},
}
_CONVOLVED = {"layer_types": ["conv", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 0}
_MLA = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (*_MLA, "minicpm3", "mistral4", "mistral_large4.text_config", "youtu", "dots3_note_text"), _OWN_HEADS
    ),
    **dict.fromkeys(("kimi_k25.text_config", "dots3_note.text_config"), _OWN_HEADS),
    **dict.fromkeys(("granitemoehybrid", "qwen3_next", "qwen3_5_moe_text", "olmo_hybrid"), _MIXED),
    **{family: {**_MIXED, **_OWN_HEADS} for family in ("bailing_hybrid", "kimi_linear")},
    **{f"{family}.text_config": _MIXED for family in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _QWEN
    ),
    **{f"{family}.text_config": _SECTIONS for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")},
    **{f"{family}.text_config": _SECTIONS for family in ("glm46v", "glm4v", "glmga", "glm_ocr", "paddleocr_vl")},
    **{f"{family}.text_config": {**_PARTIAL, **_MIXED} for family in ("qwen3_5", "qwen3_5_moe")},
    **{f"{family}.text_config": _SECTIONS for family in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")},
    "cohere_compass_text": _ROPE_BY_LAYER,
    "cohere_compass.text_config": _ROPE_BY_LAYER,
    "cosmos3_edge.text_config": _SECTIONS,
    "ernie4_5_vl_moe.text_config": {
        "rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [32, 32],
    },
    "glm4v_moe.text_config": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    },
    "gemma4_unified.vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 64},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0]},
    "hunyuan_vl.text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]}},
    "inkling2.vision_config": {"text_hidden_size": 64},
    "molmo2.vision_config": {"image_size": [28, 28]},
    "molmo2.adapter_config": {"vision_feature_layer": [0, 0]},
    "nemotron_h_omni.vision_config": {"video_temporal_patch_size": 2},
    "phi4_multimodal.audio_config": {"num_blocks": 1},
    **{family: {"out_hidden_size": 64, "projector_hidden_size": 64} for family in ("muse_glimmer", "muse_spark")},
    "muse_spark.audio_config": {
        "num_hidden_layers": 4,
        "hidden_sizes": [8] * 4,
        "depths": [1] * 4,
        "out_hidden_size": 64,
    },
    "dots3_note.audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    "dots3_note.vision_config": {"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 64},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3": {"image_token_index": _IMAGE, "mm_tokens_per_image": 4},
    "gemma3n_text": {**_PER_LAYER, **_SLIDING, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {**_PER_LAYER, **_SLIDING},
    "gemma4.text_config": {**_PER_LAYER, **_SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": _CONVOLVED,
    "lfm2_moe": _CONVOLVED,
    "lfm3": _CONVOLVED,
    "lfm3_vl.text_config": _CONVOLVED,
    "llama4": {"image_token_index": _IMAGE},
    "llama4.vision_config": {"intermediate_size": 128},
    "longcat_flash": {"zero_expert_num": 2, **_OWN_HEADS},
    "mamba2": {"num_heads": 8},
    "minimax": {"block_size": 8},
    "mistral": {"sliding_window": None},
    "mistral3": {"image_token_index": _IMAGE},
    "mistral3.vision_config": {"image_size": 56},
    "mixtral": {"sliding_window": None},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 64},
    "qwen2_vl.vision_config": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen3_5_text": {**_PARTIAL, **_MIXED},
    **{
        f"qwen{name}_thinker": {"vision_start_token_id": 3, "audio_start_token_id": 7}
        for name in ("2_5_omni", "3_omni_moe")
    },
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp.text_config": _INDEXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "smolvlm": {"image_token_id": _IMAGE},
    "step3p7.text_config": {"mlp_layer_types": ["dense", "sparse"], "share_expert_dim": 32},
    "zamba": {"layers_block_type": ["hybrid", "hybrid"], **_OWN_HEADS},
    "zamba2": {"layers_block_type": ["hybrid", "hybrid"], "n_mamba_heads": 4, **_OWN_HEADS},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Fields by model type, where a class wants something else than the tables say; of its parts behind a dot."""

_ENCODERS = (
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("data2vec-text", "electra", "ernie", "git", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart"),
    *("prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "t5gemma2"),
    *("trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "musicgen", "musicgen_melody"),
    *("blip", "blip-2", "florence2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "pix2struct"),
    *("pp_formulanet", "udop", "vision-encoder-decoder", "evolla", "pi0", "moshi", "idefics", "shieldgemma2"),
    "moss_transcribe_diarize",
)
_NOT_TINY = (
    *("chameleon", "deepseek_ocr2", "dots3_note", "emu3", "granite4_vision", "janus", "nemotron_h_omni"),
    "unlimited_ocr",
)
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(_ENCODERS, "an encoder with a head, a part of a model of two halves, or one of sounds or actions"),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "its tower of images is timm's, which is not installed"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, whose cache it reads"),
    "blt": "it reads bytes in patches, and no tokens",
    "glm5_next": "of two layers it has none of attention, which transformers cannot generate with",
    "diffusion_gemma": "it writes many tokens at a time, in no order",
    **dict.fromkeys(_NOT_TINY, "no configuration of a few thousand weights is written down here"),
}
"""Language models of transformers that are not tried, each with the reason."""


@dataclass
class Row:
    """What became of a family.

    Attributes:
        family: transformers' model type.
        model: its class.
        share: quantized share of the values inside the blocks.
        quantize: empty, or why it was refused.
        difference: largest difference of the packed model's logits to those of its dense export, ulbq's and
            transformers' own loading.
        moved: largest difference of the export's logits to the source's: 0 where what was quantized does not run.
        lost: tensors of the source that are not in the dense export.
        gptq: empty, or why the calibrated method refused it.
        kept: what stays in full precision inside the blocks.
        exports: by target, empty or why it was refused.
    """

    family: str
    model: str = ""
    share: float = 0.0
    quantize: str = ""
    difference: float = 0.0
    moved: float = 0.0
    lost: list[str] = field(default_factory=list)
    gptq: str = ""
    kept: list[str] = field(default_factory=list)
    exports: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether what was written loads as it was made, or nothing was written."""
        return bool(self.quantize) or (not self.lost and self.difference < 1e-4 < self.moved)


def families() -> list[str]:
    """Model types of transformers that have a decoder to quantize."""
    decoders = {kind.model_type for kind in (*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)}
    return sorted(decoders - LEFT_OUT.keys())


def tiny(family: str) -> PreTrainedConfig:
    """A configuration of two blocks and hidden size 64."""
    kind = CONFIG_MAPPING[family]
    values = _known(kind, _TEXT)
    for name, spec in kind.sub_configs_defaults.items():
        inner = spec.config_class if spec.model_type is None else CONFIG_MAPPING[spec.model_type]
        table = _TEXT if "text" in name or "llm" in name else _VISION
        own = _SPECIAL.get(f"{family}.{name}", {})
        values[name] = {"model_type": inner.model_type, **_known(inner, table), **own}
    return kind(**{**values, **_SPECIAL.get(family, {})})


def inputs(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """What a forward pass takes: text, and an image where it is known how this model has it."""
    generator = torch.Generator().manual_seed(0)
    kind = config.model_type
    if kind.startswith("qwen") and hasattr(config, "vision_config") and "omni" not in kind:
        vision = config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        picture = {"pixel_values": torch.randn(16, width, generator=generator)}
        picture |= {"image_grid_thw": torch.tensor([[1, 4, 4]])}
        count = 16 // vision.spatial_merge_size**2
    elif kind in ("gemma3", "llama4", "mistral3", "smolvlm"):
        size = config.vision_config.image_size
        shape = (1, 1, 3, size, size) if kind == "smolvlm" else (1, 3, size, size)
        picture = {"pixel_values": torch.randn(shape, generator=generator)}
        picture |= {"image_sizes": torch.tensor([[size, size]])} if kind == "mistral3" else {}
        count = 1 if kind in ("llama4", "smolvlm") else 4
    else:
        return {"input_ids": _TOKENS}
    ids = torch.cat([_TOKENS[:1, :3], torch.full((1, count), _IMAGE), _TOKENS[:1, 3:]], dim=1)
    types = {"mm_token_type_ids": (ids == _IMAGE).int()} if kind.startswith("qwen") else {}
    return {"input_ids": ids, **picture, **types}


def _known(kind: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if name in names}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model in bfloat16; norms, biases and what begins at zero are random too."""
    torch.manual_seed(0)
    loader = _loader(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters are not tiny")
    model: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(torch.bfloat16).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokens[0], eos_token=tokens[1])


def _loader(config: PreTrainedConfig) -> Any:
    """The class that a checkpoint of the whole model is loaded with."""
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else AutoModelForCausalLM


def try_out(family: str, folder: Path, *, short: bool = False) -> Row:
    """Take a family through everything.

    Args:
        family: transformers' model type.
        folder: for what is written.
        short: leave out the calibrated method and the exports to other engines.
    """
    row = Row(family)
    model = random_model(tiny(family))
    row.model = type(model).__name__
    model.save_pretrained(folder / "m")
    tokenizer().save_pretrained(folder / "m")
    asked = {"source": str(folder / "m"), "bits": 4, "group_size": 32, "symmetric": True, "device": "cpu"}
    asked |= {"allow_partial": True, "offline": True}
    try:
        out, manifest = quantize(QuantizeRequest(method="rtn", out=folder / "q", **asked))
    except UlbqError as error:
        row.quantize = error.message.replace(str(folder), "…")
        return row
    if manifest.coverage is not None:
        row.share = manifest.coverage.share_in_blocks
        outside = ("outside the blocks", "the head")
        row.kept = [f"{one.name}: {one.why}" for one in manifest.coverage.kept if one.why not in outside]
    dense, _ = convert(ConvertRequest(source=str(out), to="dense", dtype="fp32", out=folder / "d"))
    row.lost = _lost(folder / "m", out, dense)
    loader = _loader(model.config)
    exact = logits(loader.from_pretrained(dense, dtype=torch.float32))
    row.moved = (exact - logits(model.float())).abs().max().item()
    packed = (load_model(resolve(out), dtype=torch.float32), loader.from_pretrained(out, dtype=torch.float32))
    row.difference = max((logits(one) - exact).abs().max().item() for one in packed)
    if not short:
        row.gptq = _refused(lambda: _calibrated(asked, folder))
        row.exports = {target: _refused(lambda: _export(out, target, folder)) for target in EXPORTS}  # noqa: B023
    return row


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a text, and of an image in it."""
    found: torch.Tensor = model.eval()(**inputs(model.config), use_cache=False).logits
    return found


def _lost(source: Path, packed: Path, dense: Path) -> list[str]:
    """Tensors of the source that the dense export has not, or has with other values than the artifact stands for."""
    before, after, exact = resolve(source), resolve(packed), resolve(dense)
    missing = [*(before.names - exact.names), *(set(before.carried) - set(exact.carried))]
    # Experts are compared one by one, whether they are stored so or together.
    shared = (before.names & exact.names) - {part.fused for part in before.parts.values()}
    differing = [name for name in shared if not torch.equal(exact.read(name), _value(after, name))]
    return sorted(missing) + sorted(differing)


def _value(source: ModelSource, name: str) -> torch.Tensor:
    """A tensor of an artifact, in float32 where it is a float."""
    linear = name.removesuffix(".weight")
    if linear not in source.packed:
        stored = source.read(name)
        return stored.float() if stored.is_floating_point() else stored
    tensors, scheme = source.read_packed(linear), source.packed[linear]
    return formats.dequantize(scheme, tensors, tensors["scales"].shape[1] * 32)


def _calibrated(asked: dict[str, Any], folder: Path) -> None:
    tokens = folder / "tokens.safetensors"
    save_file({"tokens": torch.randint(8, 200, (6, 16), generator=torch.Generator().manual_seed(1)).int()}, tokens)
    more = {"samples": 4, "sequence_length": 16, "calibration": str(tokens)}
    quantize(QuantizeRequest(method="gptq", out=folder / "g", **asked, **more))


def _export(out: Path, target: str, folder: Path) -> None:
    convert(ConvertRequest(source=str(out), to=target, out=folder / target))


def _refused(work: Callable[[], object]) -> str:
    """Why something was refused, without the temporary folder's name; empty where it was not."""
    try:
        work()
    except UlbqError as error:
        reason = re.sub(r"^'.*' cannot be converted to [\w-]+: ", "", error.message)
        return re.sub(r"'/[^']*/", "'…/", reason)
    return ""


def main() -> None:
    """Try out what was asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*")
    parser.add_argument("--short", action="store_true", help="No calibrated method, no exports.")
    parser.add_argument("--renew", action="store_true", help="Put the rows of these families into the results.")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows: list[Row] = []
    for family in asked.families or families():
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = try_out(family, Path(folder), short=asked.short)
            except Exception as error:  # a defect, which this is to find
                row = Row(family, quantize="", lost=[f"{type(error).__name__}: {error}"[:300]])
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
    if asked.renew or not asked.families:
        new = {row.family: asdict(row) for row in rows}
        old = json.loads(RESULTS.read_text())["families"] if asked.families else []
        kept = {row["family"]: row for row in old if row["family"] not in LEFT_OUT}
        untried: dict[str, list[str]] = {}
        for family, reason in sorted(LEFT_OUT.items()):
            untried.setdefault(reason, []).append(family)
        content = {"ulbq": __version__, "transformers": transformers.__version__, "untried": untried}
        RESULTS.write_text(json.dumps(content | {"families": list((kept | new).values())}, indent=1) + "\n")
    if unsound := [row.family for row in rows if not row.sound]:
        raise SystemExit(f"These were written and do not load as they were made: {', '.join(unsound)}")


if __name__ == "__main__":
    main()
