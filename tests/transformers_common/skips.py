"""Which of transformers' tests are skipped, and why."""

import fnmatch
import importlib.util

# Why a test is skipped -> its name, or a pattern of names. Each test that is not here must pass.
SKIPPED = {
    "The device under test is the CPU.": [
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_*",
        "test_flex_attention_with_grads",
        "test_model_parallelism",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
        "test_torch_compile_for_training",
    ],
    "The attention of this model has ALiBi and xPos, which no attention function of transformers computes.": [
        "test_can_set_attention_dynamically",
        "test_eager_matches_sdpa_inference_*",
        "test_flash_attn_*",
        "test_sdpa_can_dispatch_non_composite_models",
        "test_sdpa_can_dispatch_composite_models",
    ],
    "There are no kernels of the hub for it: it has its own.": ["test_kernels_can_load_without_crashing"],
    "The rotary angles of this model have fixed frequencies, which no setting of transformers scales.": [
        "test_model_rope_*",
    ],
    "It is a language model, without pictures and sounds, and without models inside it.": [
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically_composite_model",
        "test_internal_model_config_and_subconfig_are_same",
        "test_vision_axial_rope",
    ],
    "It has no experts.": [
        "test_eager_matches_batched_and_grouped_inference_*",
        "test_fsdp2_expert_parallel_*",
        "test_hsdp_grad_accumulation_vs_single_device_*_expert_parallel",
        "test_moe_parallel_plans_shard_experts",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ],
    "It is a decoder, without an encoder.": ["test_encoder_decoder_loss_no_double_shift"],
    "It sees all earlier tokens, not a window of them.": ["test_sliding_window_mask"],
    "Its positions are relative: only the option `use_abs_pos_emb` has a table, and that has a fixed size.": [
        "test_resize_position_vector_embeddings",
    ],
    "Parameters have one name, so that no checkpoint is converted.": [
        "test_can_load_from_already_mapped_keys",
        "test_reverse_loading_mapping",
    ],
    "No parameter needs float32: gains, scales and sums are computed in float32 whatever their dtype is.": [
        "test_keep_in_fp32_modules",
        "test_keep_in_fp32_modules_exist",
    ],
    "`output_hidden_states` is read by the decoder itself, not recorded by hooks of transformers.": [
        "test_can_capture_specific_layers_hidden_states",
        "test_capture_outputs_decorator",
    ],
    "deepspeed is not installed.": ["test_resize_*_with_deepspeed*"],
    "The source package leaves out the tests of `generate`, which this one demands; those of Andromeda are in "
    "tests/test_huggingface.py.": ["test_generation_tester_mixin_inheritance"],
}


if importlib.util.find_spec("torchao") is None:
    SKIPPED["torchao is not installed."] = ["test_tp_generation_quantized"]


def reason(name):
    """Why the test of this name is skipped, or None."""
    return next((why for why, names in SKIPPED.items() if any(fnmatch.fnmatch(name, one) for one in names)), None)
