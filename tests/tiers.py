"""Which tests `make test-fast`, `make test` and `make test-all` run: pytest's option `--tier`.

Every test gets the markers that say what it costs, by its fixtures and by where it stands; no test
sets them itself. A tier leaves out the tests of some markers and says so at the end of its output.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.te.releases import TESTED as TE_RELEASES
from tests.te.releases import is_here

MARKERS = {
    "pool": "runs in a pool of processes (fixture `pool`)",
    "processes": "starts processes: torchrun, make, pip, the command line",
    "trains": "trains a model and saves it, step after step",
    "interpreter": "runs Triton's interpreter or compiler",
    "slurm": "runs a Slurm cluster of four virtual nodes",
    "browser": "opens a page in a browser",
    "network": "installs packages from the package index",
    "slow": "takes more than 15 s on two cores, or is one of many cases",
}
# What a tier leaves out, and the command that runs what is left out.
LEFT_OUT = {
    "fast": frozenset(MARKERS),
    "default": frozenset({"slurm", "network", "slow"}),
    "all": frozenset[str](),
}
COMMANDS = {"fast": "make test-fast", "default": "make test", "all": "make test-all"}

# Tests of these markers share a cluster, or environments that they install, and run one at a time.
# All others run side by side (pytest-xdist).
ALONE = frozenset({"slurm", "network"})
PARTS = ("together", "alone")

# A fixture's name, or the beginning of a test's id.
BY_FIXTURE = {
    "pool": "pool",
    "matrix": "network",
    "megatron": "network",
    "real": "network",
    "real_mistral_v1": "network",
}
# Likewise, of tests with Transformer Engine's Python code: where it is installed no index is asked.
TE_FIXTURES = ("te", "any_te")
BY_PLACE = {
    "tests/distributed/test_context_attention.py::test_bfloat16_is_off_by_rounding_alone[triton": "interpreter",
    "tests/distributed/test_context_attention.py::test_triton_equals_the_oracle": "interpreter",
    "tests/distributed/test_health.py": "processes",
    "tests/distributed/test_killed.py": "processes",
    "tests/end_to_end/": "processes",
    "tests/end_to_end/test_slurm.py": "slurm",
    "tests/megatron/": "processes",
    "tests/unit/benchmarks/test_benchmarks.py": "processes",
    "tests/unit/benchmarks/test_checkouts.py": "processes",
    "tests/unit/benchmarks/test_context_benchmarks.py": "processes",
    "tests/unit/benchmarks/test_faults.py": "processes",
    "tests/unit/benchmarks/test_gpu_check.py": "processes",
    "tests/unit/benchmarks/test_warm_kernels.py": "interpreter",
    "tests/unit/checkpoint/test_full_disk.py": "trains",
    "tests/unit/checkpoint/test_optimizer_settings.py": "trains",
    "tests/unit/checkpoint/test_retention.py": "trains",
    "tests/unit/checkpoint/test_retention_rules.py::test_the_best_stays_over_a_resume_and_a_move": "trains",
    "tests/unit/convert/test_convert_average.py": "processes",
    "tests/unit/convert/test_convert_check.py": "processes",
    "tests/unit/convert/test_convert_former_releases.py::test_an_export_answers_as_it_did_and_is_upgraded_by_one_command": "processes",
    "tests/unit/convert/test_convert_processes.py": "processes",
    "tests/unit/convert/test_convert_refresh.py::test_a_signal_waits_until_all_files_are_in_place": "processes",
    "tests/unit/convert/test_convert_standalone.py": "processes",
    "tests/unit/data/test_data_in_flight.py::test_large_images_of_small_files_fit_into_memory": "processes",
    "tests/unit/data/test_data_pages.py::test_preview_in_a_browser": "browser",
    "tests/unit/data/test_data_pages.py::test_stats_in_a_browser": "browser",
    "tests/unit/doctor/test_doctor.py": "processes",
    "tests/unit/doctor/test_doctor_parts.py::test_a_child_that_cannot_even_start_says_so": "processes",
    "tests/unit/doctor/test_doctor_parts.py::test_a_module_that_ends_the_process_costs_the_others_nothing": "processes",
    "tests/unit/evaluation/test_evaluation_lmms_eval.py": "processes",
    "tests/unit/evaluation/test_evaluation_processes.py": "processes",
    "tests/unit/evaluation/test_evaluation_report.py::test_in_a_browser": "browser",
    "tests/unit/layers/test_shared_image_rows.py::test_triton_equals_an_image_of_its_own": "interpreter",
    "tests/unit/layers/test_shared_visual_rows.py::test_drawn_blocks_on_triton_equal_a_dense_softmax": "interpreter",
    "tests/unit/layers/test_shared_visual_rows.py::test_triton_equals_a_dense_softmax": "interpreter",
    "tests/unit/layers/test_triton_attention.py": "interpreter",
    "tests/unit/layers/test_triton_compiles.py": "interpreter",
    "tests/unit/parallel/test_entry_points.py": "processes",
    "tests/unit/parallel/test_gpu_problem.py::test_the_command_ends_in_one_line_and_hides_no_warning_of_the_device": "processes",
    "tests/unit/parallel/test_packages.py::test_megatron_core_is_imported_beside_broken_packages": "processes",
    "tests/unit/parallel/test_platform.py": "processes",
    "tests/unit/plan/test_plan_disk.py::test_a_checkpoint_and_its_export_take_what_was_said": "trains",
    "tests/unit/slurm/test_batch_files.py": "processes",
    "tests/unit/test_ci_skips.py": "processes",
    "tests/unit/test_constraints.py::test_a_torch_in_the_range_stays": "processes",
    "tests/unit/test_constraints.py::test_an_index_that_cannot_be_reached_is_one_line": "processes",
    "tests/unit/test_constraints.py::test_versions_that_cannot_be_had_are_one_line": "processes",
    "tests/unit/test_constraints.py::test_an_installation_takes_the_locked_versions_and_leaves_an_older_torch": "network",
    "tests/unit/test_orphans.py": "processes",
    "tests/unit/test_tiers.py": "processes",
    "tests/unit/training/test_ema_alone.py": "trains",
    "tests/unit/training/test_exit_status.py": "processes",
    "tests/unit/training/test_export_beside.py": "processes",
    "tests/unit/training/test_sinks.py::test_mlflow_goes_on_in_the_same_run": "processes",
    "tests/unit/training/test_sinks.py::test_wandb_is_offline_and_goes_on_in_the_same_run": "processes",
    "tests/unit/training/test_rehearse.py": "trains",
    "tests/unit/training/test_score_checkpoint.py": "processes",
    "tests/unit/training/test_scores.py": "processes",
    "tests/unit/training/test_signals.py::test_what_is_said_to_a_closed_terminal_ends_nothing": "processes",
}
# Those of more than 15 s, and of many alike: `make test` runs enough of each kind to see it break.
SLOW = (
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[tp2]",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[pp2",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[dp2",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[tp2-pp2-sp",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[gemma2",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[baseline",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[biases",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[shared groups",
    "tests/distributed/test_adapters.py::test_adapters_learn_as_in_one_process[overlap",
    "tests/distributed/test_adapters.py::test_a_resumed_run_is_bitwise_the_same[one",
    "tests/distributed/test_adapters.py::test_a_resumed_run_is_bitwise_the_same[tp2-pp2",
    "tests/distributed/test_adapters.py::test_dropout_draws_alike_where_inputs_are_alike",
    "tests/distributed/test_adapters.py::test_the_projector_learns_beside_them",
    "tests/distributed/test_anyres.py::test_views_change_what_is_learned",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-tp2, without sp",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2, soft-caps",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-pp2, tied",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp4, one axis",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2, full recompute of chunks",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp4, sum",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2, linear",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-tp2-sp, rope",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-pp2, a layer",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-tp2-sp, norms",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp4, frozen",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-pp2, projector",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2, adapters",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-pp2, adapters",
    "tests/distributed/test_gradients_as_declared.py::test_each_is_as_declared_and_equal_to_one_processs[tp2-sp, tied",
    "tests/distributed/test_gradients_as_declared.py::test_each_is_as_declared_and_equal_to_one_processs[dp2",
    "tests/distributed/test_gradients_as_declared.py::test_each_is_as_declared_and_equal_to_one_processs[vpp",
    "tests/distributed/test_gradients_as_declared.py::test_each_is_as_declared_and_equal_to_one_processs[tp2-sp-dp2",
    "tests/distributed/test_gradients_as_declared.py::test_each_is_as_declared_and_equal_to_one_processs[tp4",
    "tests/distributed/test_gradients_as_declared.py::test_each_is_as_declared_and_equal_to_one_processs[tp2-sp, frozen",
    # `make test` runs the families of the paper.
    "tests/distributed/test_convert_parallel.py::test_logits_and_features_equal_hugging_faces[gemma3",
    "tests/distributed/test_convert_parallel.py::test_logits_and_features_equal_hugging_faces[llama",
    "tests/distributed/test_convert_parallel.py::test_logits_and_features_equal_hugging_faces[ministral3",
    "tests/distributed/test_convert_parallel.py::test_logits_and_features_equal_hugging_faces[qwen",
    "tests/distributed/test_convert_parallel.py::test_logits_and_features_equal_hugging_faces[olmo2",
    "tests/distributed/test_convert_parallel.py::test_logits_and_features_equal_hugging_faces[smollm3",
    "tests/distributed/test_convert_parallel.py::test_there_and_back_through_tp2_and_pp2_is_bitwise[gemma3",
    "tests/distributed/test_convert_parallel.py::test_there_and_back_through_tp2_and_pp2_is_bitwise[llama",
    "tests/distributed/test_convert_parallel.py::test_there_and_back_through_tp2_and_pp2_is_bitwise[ministral3",
    "tests/distributed/test_convert_parallel.py::test_there_and_back_through_tp2_and_pp2_is_bitwise[qwen",
    "tests/distributed/test_convert_parallel.py::test_there_and_back_through_tp2_and_pp2_is_bitwise[olmo2",
    "tests/distributed/test_convert_parallel.py::test_there_and_back_through_tp2_and_pp2_is_bitwise[smollm3",
    # Of baselines in parallel it runs one layout.
    "tests/distributed/test_oracle.py::test_text_only_equals_hugging_face[llama-baseline",
    "tests/distributed/test_oracle.py::test_text_only_equals_hugging_face[qwen3-baseline",
    "tests/distributed/test_oracle.py::test_text_only_equals_hugging_face[olmo2-baseline",
    "tests/distributed/test_oracle.py::test_text_only_equals_hugging_face[smollm3-baseline",
    "tests/distributed/test_oracle.py::test_baseline_in_parallel_equals_hugging_face[tp2-",
    "tests/distributed/test_oracle.py::test_baseline_in_parallel_equals_hugging_face[pp2-",
    "tests/distributed/test_corrupt_corpus.py::test_killed_twice_with_another_dp_across_an_epochs_end",
    "tests/distributed/test_ema.py::test_it_is_the_plain_recurrence",
    "tests/distributed/test_ema.py::test_resumed_in_another_layout[tp2",
    "tests/distributed/test_ema.py::test_resumed_in_another_layout[dp2",
    "tests/distributed/test_ema.py::test_resumed_in_the_same_layout_is_bitwise_the_same",
    "tests/distributed/test_exports.py",
    "tests/distributed/test_features_by_layout.py::test_bf16_follows_fp32",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[02",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[05",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[06",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[07",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[08",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[09",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[1",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[2",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[3",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[4",
    "tests/distributed/test_former_releases.py::test_a_run_goes_on_to_the_same_losses[before_architectures-dp2",
    "tests/distributed/test_former_releases.py::test_a_run_goes_on_to_the_same_losses[before_architectures-tp2",
    "tests/distributed/test_former_releases.py::test_a_run_goes_on_to_the_same_losses[with_architectures-dp2",
    "tests/distributed/test_health.py::test_a_rank_that_stands_still_ends_the_run[dead_loader",
    "tests/distributed/test_held_out_loss.py::test_equal_in_every_layout_and_split[tp2-",
    "tests/distributed/test_held_out_loss.py::test_equal_in_every_layout_and_split[dp2",
    "tests/distributed/test_held_out_loss.py::test_nothing_held_out_is_trained_on",
    "tests/distributed/test_held_out_loss.py::test_ratio_of_update_to_weights",
    "tests/distributed/test_held_out_loss.py::test_sums_by_source_go_on_over_a_save",
    "tests/distributed/test_held_out_loss.py::test_validation_does_not_change_training",
    "tests/distributed/test_health.py::test_communication_share_is_measured_where_it_is_asked_for",
    "tests/distributed/test_rehearsal.py::test_every_exchange_is_predicted[tp2]",
    "tests/distributed/test_rehearsal.py::test_every_exchange_is_predicted[dp2]",
    "tests/distributed/test_rehearsal.py::test_every_exchange_is_predicted[tp2-sp-dp2-overlap]",
    "tests/distributed/test_killed.py::test_sigkill_at_any_moment",
    "tests/distributed/test_optim_groups.py::test_a_finished_wsd_run_goes_on_as_one_planned_so[tp2",
    "tests/distributed/test_optim_groups.py::test_a_finished_wsd_run_goes_on_as_one_planned_so[pp2",
    "tests/distributed/test_optim_groups.py::test_a_finished_wsd_run_goes_on_as_one_planned_so[dp2",
    "tests/distributed/test_adapters.py::test_their_mean_is_exported",
    "tests/distributed/test_adapters.py::test_checkpoints_of_adapters_are_scored_and_exported",
    "tests/distributed/test_optim_groups.py::test_a_schedule_in_steps_goes_on_without_a_jump",
    "tests/distributed/test_optim_groups.py::test_groups_survive_a_resume",
    "tests/distributed/test_optim_groups.py::test_recompute_does_not_lose_gradients_above_frozen_layers",
    "tests/distributed/test_optim_groups.py::test_the_same_weights_in_every_layout[dp2",
    "tests/distributed/test_optim_groups.py::test_the_same_weights_in_every_layout[pp2",
    "tests/distributed/test_optim_groups.py::test_the_same_weights_in_every_layout[tp2-sp",
    "tests/distributed/test_plan_memory.py::test_what_adapters_keep[unfolded",
    "tests/distributed/test_plan_memory.py::test_what_adapters_keep[baseline",
    "tests/distributed/test_plan_memory.py::test_what_adapters_keep[tp2]",
    "tests/distributed/test_resume.py::test_resharded_twice",
    "tests/distributed/test_sample_weights.py::test_every_layout_has_the_loss_of_one_process[tp2-pp2-sp",
    "tests/distributed/test_watched_runs_by_layout.py",
    "tests/distributed/test_killed_beside_training.py::test_in_an_export",
    "tests/distributed/test_adapters.py::test_a_run_starts_from_exported_adapters[tp2-sp",
    "tests/distributed/test_adapters.py::test_a_run_starts_from_exported_adapters[pp2",
    "tests/distributed/test_adapters.py::test_a_run_starts_from_exported_adapters[dp2",
    "tests/distributed/test_adapters.py::test_a_run_starts_from_exported_adapters[tp2-pp2",
    "tests/distributed/test_resume.py::test_saved_while_training_goes_on[tp2]",
    "tests/distributed/test_resume.py::test_stopped_and_resumed_is_bitwise_the_same[dp2]",
    "tests/distributed/test_resume.py::test_stopped_and_resumed_is_bitwise_the_same[pp2]",
    "tests/distributed/test_resume.py::test_stopped_and_resumed_is_bitwise_the_same[pp2-dp2]",
    "tests/distributed/test_resume.py::test_stopped_and_resumed_is_bitwise_the_same[tp2-sp]",
    "tests/distributed/test_same_curve.py",
    "tests/distributed/test_scores_of_checkpoints.py",
    "tests/distributed/test_shared_groups.py::test_gradients_are_those_of_one_process[tp8 on",
    "tests/distributed/test_shared_groups.py::test_training_is_that_of_one_process",
    "tests/distributed/test_shipped_layouts.py::test_the_losses_are_those_of_one_process[gemma",
    "tests/distributed/test_shipped_layouts.py::test_the_losses_are_those_of_one_process[llama",
    "tests/distributed/test_training.py::test_bf16_learns_as_fp32_does",
    "tests/distributed/test_visual_path.py::test_chunks_need_a_third_of_the_memory",
    "tests/end_to_end/test_broken_transformer_engine.py::test_a_run_trains_saves_and_is_exported",
    "tests/end_to_end/test_command_line.py::test_one_process_restarts_itself_under_eight",
    "tests/end_to_end/test_command_line.py::test_ranks_of_a_killed_torchrun_save_and_end",
    "tests/end_to_end/test_command_line.py::test_signal_saves_and_exits_cleanly[1]",
    "tests/end_to_end/test_command_line.py::test_signal_saves_and_exits_cleanly[10]",
    "tests/end_to_end/test_dattn_command.py::test_trains_under_torchrun_alone_and_with_a_restart",
    "tests/end_to_end/test_loss_comparison.py",
    "tests/end_to_end/test_quickstart.py::test_a_broken_forward_ends_the_whole_command_with_its_line",
    "tests/end_to_end/test_quickstart.py::test_every_step_takes_what_the_one_before_it_left",
    "tests/unit/benchmarks/test_benchmarks.py::test_what_a_gpu_measures_runs_and_reaches_the_page[peak-memory-gemma]",
    "tests/unit/benchmarks/test_benchmarks.py::test_what_a_gpu_measures_runs_and_reaches_the_page[short-",
    "tests/unit/benchmarks/test_convert_full_size.py::test_there_and_back_at_the_small_scale",
    "tests/unit/benchmarks/test_gpu_check.py::test_tests_of_the_short_list_exist",
    "tests/unit/benchmarks/test_warm_kernels.py",
    "tests/unit/parallel/test_entry_points.py",
    "tests/unit/benchmarks/test_faults.py::test_a_sample_of_thirty_is_survived",
    "tests/unit/benchmarks/test_faults.py::test_what_is_not_survived_is_reported",
    "tests/unit/checkpoint/test_full_disk.py::test_one_line_and_earlier_checkpoints_stay[the index",
    "tests/unit/checkpoint/test_retention.py::test_what_was_just_saved_stays_beside_a_newer_damaged_one[shard]",
    "tests/unit/checkpoint/test_retention.py::test_what_was_just_saved_stays_beside_a_newer_damaged_one[truncated]",
    "tests/unit/convert/test_convert_check.py::test_a_broken_export_is_refused[no cache]",
    "tests/unit/convert/test_convert_check.py::test_an_export_is_checked[whole]",
    "tests/unit/convert/test_convert_check.py::test_the_quickstart_passes_the_line_on",
    "tests/unit/convert/test_convert_former_releases.py::test_an_export_answers_as_it_did_and_is_upgraded_by_one_command[with",
    "tests/unit/convert/test_lora_peft.py::test_logits_and_gradients_are_those_of_peft[mistral]",
    "tests/unit/convert/test_lora_peft.py::test_logits_and_gradients_are_those_of_peft[some, dora",
    "tests/unit/convert/test_lora_peft.py::test_logits_and_gradients_are_those_of_peft[biases, dora",
    "tests/unit/convert/test_lora_peft.py::test_logits_and_gradients_are_those_of_peft[unfolded",
    "tests/unit/convert/test_lora_peft.py::test_logits_and_gradients_are_those_of_peft[gemma2, baseline",
    "tests/unit/convert/test_lora_peft.py::test_logits_and_gradients_are_those_of_peft[gemma2]",
    "tests/unit/convert/test_convert_processes.py::test_a_signal_ends_it_with_one_line[SIGHUP]",
    "tests/unit/convert/test_convert_processes.py::test_a_signal_ends_it_with_one_line[SIGINT]",
    "tests/unit/convert/test_convert_standalone.py::test_export_stands_alone[gemma2",
    "tests/unit/data/test_data_golden.py::test_a_hundred_megapixels_fit_into_memory",
    "tests/unit/data/test_data_in_flight.py::test_large_images_of_small_files_fit_into_memory",
    "tests/unit/evaluation/test_evaluation_lmms_eval.py::test_a_task_through_lmms_eval",
    "tests/unit/evaluation/test_evaluation_processes.py::test_killed_half_way_and_resumed",
    "tests/unit/layers/test_shared_visual_rows.py::test_drawn_blocks_on_triton_equal_a_dense_softmax",
    "tests/unit/layers/test_shared_visual_rows.py::test_triton_equals_a_dense_softmax[several-blocks",
    "tests/unit/layers/test_shared_visual_rows.py::test_triton_equals_a_dense_softmax[ends-that-fall",
    "tests/unit/layers/test_shared_visual_rows.py::test_triton_equals_a_dense_softmax[second-image",
    "tests/unit/layers/test_triton_attention.py::test_drawn_packs_equal_reference",
    "tests/unit/layers/test_triton_compiles.py",
    "tests/unit/slurm/test_batch_files.py::test_sbatch_reads_all_of_it[export",
    "tests/unit/slurm/test_batch_files.py::test_dry_run_of_a_training_stage[gemma",
    "tests/unit/slurm/test_batch_files.py::test_dry_run_of_a_training_stage[llama",
    "tests/unit/slurm/test_batch_files.py::test_dry_run_of_a_training_stage[qwen",
    "tests/unit/slurm/test_batch_files.py::test_dry_run_of_a_training_stage[llama3",
    "tests/unit/slurm/test_batch_files.py::test_dry_run_of_a_training_stage[qwen3_8b_aln",
    "tests/unit/slurm/test_batch_files.py::test_dry_run_of_a_training_stage[qwen3_8b_it",
    # Of those that start processes `make test` runs a part.
    "tests/distributed/test_health.py::test_what_is_not_finite_stops_all_ranks_before_the_update[gradient",
    "tests/distributed/test_features_by_layout.py::test_losses_are_those_of_one_process[03",
    "tests/distributed/test_resume.py::test_damaged_checkpoint_falls_back_loudly[empty-common",
    "tests/distributed/test_resume.py::test_damaged_checkpoint_falls_back_loudly[missing",
    "tests/distributed/test_resume.py::test_damaged_checkpoint_falls_back_loudly[truncated",
    "tests/distributed/test_run_folder_gone.py::test_it_saves_anew_and_ends[deleted-1",
    "tests/distributed/test_run_folder_gone.py::test_it_saves_anew_and_ends[moved-1",
    "tests/distributed/test_shared_groups.py::test_gradients_are_those_of_one_process[tp4 on 2 groups, norms",
    "tests/distributed/test_shared_groups.py::test_gradients_are_those_of_one_process[tp4 on 2 groups, biases",
    "tests/distributed/test_shipped_layouts.py::test_the_losses_are_those_of_one_process[digits_",
    "tests/distributed/test_shipped_layouts.py::test_the_losses_are_those_of_one_process[qwen3_8b_aln",
    "tests/unit/convert/test_convert_average.py::test_killed_and_started_again[SIGTERM",
    # Of many alike that take a second each `make test-fast` runs a part.
    "tests/unit/checkpoint/test_manifest.py::test_a_wrong_field_is_damage[1-",
    "tests/unit/convert/test_convert_roundtrip.py::test_round_trip_is_bitwise[dtype1-gemma3",
    "tests/unit/convert/test_convert_roundtrip.py::test_round_trip_is_bitwise[dtype1-llama",
    "tests/unit/convert/test_convert_roundtrip.py::test_round_trip_is_bitwise[dtype1-ministral3",
    "tests/unit/convert/test_convert_roundtrip.py::test_round_trip_is_bitwise[dtype1-qwen",
    "tests/unit/convert/test_convert_roundtrip.py::test_round_trip_is_bitwise[dtype1-olmo2",
    "tests/unit/convert/test_convert_roundtrip.py::test_round_trip_is_bitwise[dtype1-smollm3",
    "tests/unit/convert/test_convert_real_models.py::test_there_and_back_is_bitwise[ministral3",
    "tests/unit/convert/test_convert_real_models.py::test_there_and_back_is_bitwise[qwen2",
    "tests/unit/hf/test_hf_generate.py::test_cached_equals_uncached_and_alone[causal-none",
    "tests/unit/hf/test_hf_generate.py::test_cached_equals_uncached_and_alone[diagonal-rope",
    "tests/unit/hf/test_hf_modes.py::test_modes_equal_reference[causal-none",
    "tests/unit/hf/test_hf_modes.py::test_modes_equal_reference[diagonal-rope",
    "tests/unit/layers/test_interleaved_attention.py::test_many_images_on_flash_attn_equal_the_oracle[3-",
    "tests/unit/plan/test_plan_estimate.py::test_shipped_stages_fit_and_are_near_the_best_layout[gemma3",
    "tests/unit/plan/test_plan_estimate.py::test_shipped_stages_fit_and_are_near_the_best_layout[llama",
    "tests/unit/plan/test_plan_estimate.py::test_shipped_stages_fit_and_are_near_the_best_layout[qwen3",
    # Of Transformer Engine `make test` runs the newest release that is tested, in few layouts.
    "tests/te/test_te_training.py::test_three_steps_of_other_layouts",
    "tests/te/test_te_training.py::test_a_resumed_fp8_run_is_bitwise_the_same[delayed-",
    "tests/te/test_te_training.py::test_a_resumed_fp8_run_is_bitwise_the_same[tensorwise",
    "tests/te/test_te_training.py::test_a_resumed_fp8_run_is_bitwise_the_same[blockwise",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[tp2-sp",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[pp2",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[cp4, seconds",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[cp2-tp2-sp, tiles",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[tp2, tiles",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[cp2-dp2",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[cp2-pp2",
    "tests/distributed/test_video_layouts.py::test_every_gradient_is_that_of_one_process[cp2, adapters",
    "tests/distributed/test_context_gradients.py::test_every_gradient_is_that_of_one_process[cp2-tp2-pp2-sp",
)


def markers_of(item: pytest.Item) -> set[str]:
    """The markers that a test gets."""
    fixtures = getattr(item, "fixturenames", ())
    found = {marker for fixture, marker in BY_FIXTURE.items() if fixture in fixtures}
    found |= {marker for place, marker in BY_PLACE.items() if item.nodeid.startswith(place)}
    if _is_of_te(item):
        found.add("pool" if all(is_here(release) for release in TE_RELEASES) else "network")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    slow = item.nodeid.startswith(SLOW) or parameters.get("any_te") in TE_RELEASES[:-1]
    return found | ({"slow"} if slow else set())


def part_of(item: pytest.Item) -> str:
    """Whether a test runs side by side with others; its markers are set."""
    return "alone" if _names(item) & ALONE and not _is_of_te(item) else "together"


def _is_of_te(item: pytest.Item) -> bool:
    """Whether a test has Transformer Engine's Python code, which any number of processes install."""
    return any(fixture in getattr(item, "fixturenames", ()) for fixture in TE_FIXTURES)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--tier`."""
    parser.addoption(
        "--tier",
        choices=sorted(LEFT_OUT),
        default="all",
        help="which tests to run (tests/tiers.py)",
    )
    parser.addoption(
        "--part",
        choices=PARTS,
        help="only tests that can run side by side, or only those that run one at a time",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, for `-m` and `--strict-markers`."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks every test; takes away what the tier leaves out, and what is of the other part."""
    unwanted, part = LEFT_OUT[config.getoption("tier")], config.getoption("part")
    kept, left_out, others = [], [], []
    for item in items:
        for marker in markers_of(item):
            item.add_marker(marker)
        if _names(item) & unwanted:
            left_out.append(item)
        else:
            (kept if part in (None, part_of(item)) else others).append(item)
    if left_out or others:
        config.stash[_LEFT_OUT] = left_out
        config.hook.pytest_deselected(items=[*left_out, *others])
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leaves what to say to the process that started this one, where tests run in several.

    That a tier has none of the tests asked for is no failure.
    """
    config = session.config
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _LEFT_OUT in config.stash:
        session.exitstatus = pytest.ExitCode.OK
    if hasattr(config, "workeroutput"):  # pytest-xdist's
        config.workeroutput["left_out"] = _summary_of(config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what a process of pytest-xdist leaves; all have collected the same tests."""
    node.config.stash[_LINES] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says what the tier left out and how to run it."""
    for line in config.stash.get(_LINES, None) or _summary_of(config):
        terminalreporter.write_line(line)


def _summary_of(config: pytest.Config) -> list[str]:
    return summary(config.getoption("tier"), config.stash.get(_LEFT_OUT, []))


def summary(tier: str, left_out: list[pytest.Item]) -> list[str]:
    """Lines for the end of the output; none where nothing was left out."""
    if not left_out:
        return []
    counts = Counter(
        name
        for item in left_out
        for name in {mark.name for mark in item.iter_markers()} & LEFT_OUT[tier]
    )
    lines = [f"{COMMANDS[tier]} leaves out {len(left_out)} tests:"]
    lines += [f"  {counts[name]:5}  {name}: {MARKERS[name]}" for name in MARKERS if counts[name]]
    wider = ["default", "all"] if tier == "fast" else ["all"]
    run = [
        f"{COMMANDS[one]} runs {sum(not _names(item) & LEFT_OUT[one] for item in left_out)} of them"
        for one in wider
    ]
    return [*lines, ", ".join(run)]


def _names(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


_LEFT_OUT = pytest.StashKey[list[pytest.Item]]()
_LINES = pytest.StashKey[list[str]]()
