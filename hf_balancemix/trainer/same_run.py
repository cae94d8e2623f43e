"""A run that is resumed with other arguments is another run: which of them matter, and whose value is used then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Every field of the trainers' arguments is in one of these; a test sees to it.

# The optimiser's state has them, so that the checkpoint's value goes on to be used.
STAYS = "learning_rate weight_decay optim_args adam_beta1 adam_beta2 adam_epsilon".split()  # noqa: SIM905

# The new value is used, and the result is another one, be it in the last bits.
CHANGES = """
per_device_train_batch_size gradient_accumulation_steps global_batch_size auto_find_batch_size dataloader_drop_last
dataloader_in_order num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
optim_target_modules decay_vectors max_grad_norm loss_reduction on_nan neftune_noise_alpha
normalise cutout hflip random_resized_crop randaugment_num_ops randaugment_magnitude
label_warmup_epochs minority_score judge select_clean relabel ambiguous trust_positives max_missing relabel_threshold
mixup_alpha partner_reliability lambda_per_batch mixture_preset monotone clean_probability_source prediction_source
bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu full_determinism channels_last per_device_eval_batch_size
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
accelerator_config parallelism_config fsdp fsdp_config deepspeed ddp_backend ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph load_best_model_at_end
""".split()  # noqa: SIM905

# Decides which model is the best, and matters where that is loaded at the end.
OF_THE_BEST = """
eval_strategy eval_steps eval_delay save_strategy save_steps metric_for_best_model greater_is_better
""".split()  # noqa: SIM905

# Compared elsewhere: a run is not resumed with another one (`_run_facts`).
REFUSED = "seed data_seed image_size ema_decay pos_weight".split()  # noqa: SIM905

# Changes no weight, or has one possible value only.
HARMLESS = """
output_dir preset average_tokens_across_devices label_smoothing_factor use_cache torch_empty_cache_steps
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen
log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_on_each_node save_total_limit
enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
ignore_data_skip restore_callback_states_from_checkpoint dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context remove_unused_columns
label_names train_sampling_strategy length_column_name ddp_timeout debug skip_memory_metrics do_train do_eval
do_predict resume_from_checkpoint local_rank many_shot few_shot dataset_title max_image_pixels
""".split()  # noqa: SIM905

# Schedules whose state holds more than the number of the step: it cannot be another's, and keeps its settings.
_STATEFUL = ("one_cycle", "reduce_lr_on_plateau", "greedy")


def refused_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of arguments with which the checkpoint's optimiser or schedule could not be loaded. Both are arguments
    as JSON has them."""
    names = [name for name in ("optim", "lr_scheduler_type") if name in then and then[name] != now[name]]
    kinds = {then.get("lr_scheduler_type"), now["lr_scheduler_type"]}
    return [name for name in names if name == "optim" or kinds & {*_STATEFUL}]


def changed_arguments(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any, bool]]:
    """What differs and matters: names, the checkpoint's values, the present ones, and whether these are used.

    Args:
        then, now: Arguments as JSON has them. What the checkpoint does not know is passed over.
    """
    names = [*STAYS, *CHANGES, *(OF_THE_BEST if now["load_best_model_at_end"] else ())]
    stays = {*STAYS, *(("warmup_steps", "lr_scheduler_kwargs") if now["lr_scheduler_type"] in _STATEFUL else ())}
    return [
        (name, then[name], now[name], name not in stays)
        for name in names
        if name in then and name in now and then[name] != now[name]
    ]
