"""Makes tiny configs of any architecture of Transformers, by replacing the sizes."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCABULARY = 320

# The names of sizes in configs, and the values that they get.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "entity_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "ffn_hidden_size", "n_inner", "hidden_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "d_kv"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),  # before the mixtures of experts
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size"), 16),
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


MAY_BE_OPEN = ("head_dim", "num_experts_per_tok")  # `None` in some default configs, on which the model's code fails

# Further fields that an architecture needs, by model type, or `model type.part`.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 5},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8},
    "mistral4": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "squeezebert": {"embedding_size": 64},
    "t5": {"decoder_start_token_id": 1},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 20_000_000  # parameters; a larger architecture is not built
NOT_BUILT: dict[str, str] = {
    "musicgen": "it generates audio codes, of several codebooks at a time",
    "musicgen_melody": "it generates audio codes, of several codebooks at a time",
    "perceiver": "it reads no input_ids",
    "reformer": "it has gradients in training mode only, where it draws its hashes",
}


def _fields(default: PretrainedConfig) -> dict[str, Any]:
    """Arguments for a config of the same class with small sizes, also in its parts."""
    given: dict[str, Any] = default.to_dict()
    fields: dict[str, Any] = {
        name: value
        for name, value in SIZES.items()
        if name in given and isinstance(given[name], int | None if name in MAY_BE_OPEN else int)
    }
    fields |= {name: value for name, value in TOKENS.items() if name in given}
    numbers = [name for name in given if name.endswith(("_token_id", "_token_index")) and name not in TOKENS]
    fields |= {name: 2 + number for number, name in enumerate(numbers) if isinstance(given[name], int)}
    fields |= {name: 0.0 for name in given if name.endswith(("layerdrop", "jitter_noise"))}  # drawn in training
    layer_types = dict.fromkeys(given.get("layer_types") or ())
    if len(layer_types) > 1:  # two types, full attention last
        others = [each for each in layer_types if each != "full_attention"]
        fields["layer_types"] = [others[0], "full_attention" if "full_attention" in layer_types else others[1]]
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        fields["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention has as many keys as queries
    fields |= SPECIAL.get(default.model_type, {})
    for name in default.sub_configs or {}:
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig):
            fields[name] = {"model_type": part.model_type} | _fields(part)
            fields[name] |= SPECIAL.get(f"{default.model_type}.{name}", {})
    return fields


def tiny_config(model_type: str, task: str) -> PretrainedConfig:
    """The config of an architecture with two layers, hidden size 64 and a vocabulary of 320 tokens.

    Args:
        model_type: `model_type` of its `config.json`.
        task: With `causal`, an encoder is made a decoder if its config has a field for that.
    """
    default = AutoConfig.for_model(model_type)
    fields = _fields(default)
    if task == "causal" and getattr(default, "is_decoder", None) is False:
        fields["is_decoder"] = True
    return type(default)(**fields)
