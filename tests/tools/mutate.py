"""Break the code, one line at a time, and say which breaks no test notices.

    python tests/tools/mutate.py                                 # all; about fifteen minutes on two cores
    python tests/tools/mutate.py --only flow-sign kid-subsets
    python tests/tools/mutate.py --list

A mutation is an edit of a copy of the project, and the test that must fail for it, one of those that are not marked
long. One that survives is a hole in the tests; one whose text is not found is to be renewed, with the
line that it broke.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import ENV, ROOT, copy_project, forks

LIMIT = 300  # seconds; a mutation whose tests then still run has made them hang, which is noticed too
COPIES = 2  # tested at a time

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Mutation:
    """One edit, after which the project computes something else.

    Attributes:
        name: for --only.
        file: what is edited.
        text: what stands there, exactly once.
        replacement: what stands there instead.
        test: the test that must fail, or a parametrized one of which a case must, as pytest's node id.
    """

    name: str
    file: str
    text: str
    replacement: str
    test: str


MUTATIONS = [
    # What an earlier review broke without a test noticing.
    Mutation(
        "label-dropout-stream",
        "moe_dit/data/inputs.py",
        "Stream.LABEL_DROP, position",
        "Stream.TIME, position",
        "tests/unit/test_literals.py::test_each_of_a_sample_s_draws_has_its_own_stream",
    ),
    Mutation(
        "noise-stream",
        "moe_dit/data/inputs.py",
        "normal(seed, Stream.NOISE, position",
        "normal(seed, Stream.LATENT, position",
        "tests/unit/test_literals.py::test_each_of_a_sample_s_draws_has_its_own_stream",
    ),
    Mutation(
        "pixel-flip-vertical",
        "moe_dit/data/reader.py",
        "array[:, ::-1] if flip",
        "array[::-1] if flip",
        "tests/unit/test_literals.py::test_the_order_of_samples_and_their_flips",
    ),
    Mutation(
        "pixel-scale",
        "moe_dit/data/inputs.py",
        "/ 127.5 - 1",
        "/ 255",
        "tests/unit/test_literals.py::test_pixels_reach_the_network_between_minus_one_and_one",
    ),
    Mutation(
        "warm-up-not-applied",
        "moe_dit/engine.py",
        'group["lr"] = self.learning_rate(step)',
        'group["lr"] = self.recipe.optimizer.lr',
        "tests/ranks/test_train.py::test_the_first_step_of_one_rank",
    ),
    Mutation(
        "biases-not-restored",
        "moe_dit/checkpoint.py",
        'value.copy_(plain[f"buffer/{name}"])',
        '"bias" in name or value.copy_(plain[f"buffer/{name}"])',
        "tests/ranks/test_train.py::test_a_run_that_continues_takes_the_second_step",
    ),
    Mutation(
        "thresholds-not-restored",
        "moe_dit/checkpoint.py",
        'value.copy_(plain[f"buffer/{name}"])',
        '"threshold" in name or value.copy_(plain[f"buffer/{name}"])',
        "tests/ranks/test_diffmoe.py::test_thresholds_of_expert_choice_continue",
    ),
    Mutation(
        "milestones-inverted",
        "moe_dit/lineage.py",
        "if not milestone_every or (step_of(path.name) or 0) % milestone_every]",
        "if not milestone_every or not (step_of(path.name) or 0) % milestone_every]",
        "tests/ranks/test_train.py::test_milestones_are_kept_beside_the_newest",
    ),
    Mutation(
        "latest-ignored",
        "moe_dit/lineage.py",
        "candidates = candidates[: names.index(named) + 1]",
        "candidates = candidates[:]",
        "tests/ranks/test_lineage.py::test_latest_says_which_of_a_branchs_checkpoints_is_meant",
    ),
    Mutation(
        "gradient-not-checked",
        "moe_dit/train.py",
        "math.isfinite(loss) and math.isfinite(report.grad_norm)",
        "math.isfinite(loss)",
        "tests/ranks/test_train.py::test_a_gradient_that_is_not_finite_stops_the_run_and_is_never_saved",
    ),
    Mutation(
        "sampler-always-euler",
        "eval/generate.py",
        "method=sampling.method",
        'method="euler"',
        "tests/unit/test_literals.py::test_samples_follow_the_recipe_and_the_flags[recipe]",
    ),
    Mutation(
        "interval-dropped",
        "eval/generate.py",
        "        cfg_interval=sampling.cfg_interval,\n",
        "",
        "tests/unit/test_literals.py::test_samples_follow_the_recipe_and_the_flags",
    ),
    Mutation(
        "precision-recall-swapped",
        "eval/metrics.py",
        '"precision": int(precise) / n,',
        '"precision": inside.double().mean().item(),',
        "tests/unit/test_literals.py::test_precision_is_of_the_samples_and_recall_of_the_real_images",
    ),
    Mutation(
        "imbalance-of-best-layer",
        "moe_dit/metrics.py",
        "load.mean(1)).amax()",
        "load.mean(1)).amin()",
        "tests/unit/test_literals.py::test_imbalance_is_the_worst_layer_s",
    ),
    # Where it would hurt most, a file each.
    Mutation(
        "warm-up-off-by-one",
        "moe_dit/schedule.py",
        "(step + 1) / warmup",
        "step / warmup",
        "tests/unit/test_optimizer.py::test_the_rate_of_each_step",
    ),
    Mutation(
        "average-of-the-other-weight",
        "moe_dit/ema.py",
        "weights, 1 - decay)",
        "weights, decay)",
        "tests/unit/test_optimizer.py::test_averages_follow_weights_that_change_in_place",
    ),
    # What torch 2.11 loses gradients by, and what made graphs without end.
    Mutation(
        "alias-from-a-forward-pass",
        "moe_dit/kernels/rows.py",
        "return x if x.dtype == dtype else x.to(dtype)",
        "return x.to(dtype)",
        "tests/unit/test_kernels.py::test_no_forward_pass_returns_an_alias",
    ),
    Mutation(
        "shapes-share-a-code-object",
        "moe_dit/graphs.py",
        "function.__code__.replace()",
        "function.__code__",
        "tests/unit/test_compile.py::test_no_number_of_shapes_is_too_many",
    ),
    Mutation(
        "looks-not-filled-up",
        "moe_dit/looks.py",
        "if not network.couples_samples:",
        "if False:",
        "tests/unit/test_looks.py::test_a_look_asks_for_few_shapes",
    ),
    Mutation(
        "flow-sign",
        "moe_dit/flow.py",
        "target = x - noise if",
        "target = noise - x if",
        "tests/unit/test_flow.py::test_loss_is_the_velocity_s_squared_error",
    ),
    Mutation(
        "heun-at-the-old-time",
        "moe_dit/sampler.py",
        "velocity(z_next, t_next)",
        "velocity(z_next, t)",
        "tests/unit/test_flow.py::test_sampling_transports_noise_to_the_data",
    ),
    Mutation(
        "normal-pairs-swapped",
        "moe_dit/randomness.py",
        "[radius * angle.cos(), radius * angle.sin()]",
        "[radius * angle.sin(), radius * angle.cos()]",
        "tests/unit/test_literals.py::test_each_of_a_sample_s_draws_has_its_own_stream",
    ),
    Mutation(
        "flip-stream",
        "moe_dit/data/loader.py",
        "Stream.FLIP, where",
        "Stream.TIME, where",
        "tests/unit/test_literals.py::test_the_order_of_samples_and_their_flips",
    ),
    Mutation(
        "load-loss-not-times-experts",
        "moe_dit/models/moe.py",
        "counts_E.sum() * len(counts_E)",
        "counts_E.sum()",
        "tests/unit/test_literals.py::test_auxiliary_losses_of_two_tokens",
    ),
    Mutation(
        "rope-rows-for-columns",
        "moe_dit/models/layers.py",
        "torch.cat([rows, columns]",
        "torch.cat([columns, rows]",
        "tests/unit/test_reference.py::test_the_published_code_s_recorded_quantities_are_matched[dsmoe_e8]",
    ),
    Mutation(
        "predictor-sends-gradient",
        "moe_dit/models/diffmoe.py",
        "self.capacity_predictor(x_TD.detach())",
        "self.capacity_predictor(x_TD)",
        "tests/unit/test_literals.py::test_a_capacity_predictor_sends_no_gradient_into_the_network",
    ),
    Mutation(
        "class-tokens-turned",
        "moe_dit/models/jit.py",
        "if i >= in_context_start else 0",
        "if i > in_context_start else 0",
        "tests/unit/test_reference.py::test_the_published_code_s_recorded_quantities_are_matched[jitmoe_e8]",
    ),
    Mutation(
        "time-embedder-xavier",
        "moe_dit/models/initialization.py",
        "(time\\..*\\.weight|label\\.weight)$",
        "(label\\.weight)$",
        "tests/unit/test_literals.py::test_the_embedders_of_time_and_label_begin_small",
    ),
    Mutation(
        "clip-without-experts",
        "moe_dit/engine.py",
        "torch._foreach_mul_(dense + experts,",
        "torch._foreach_mul_(dense,",
        "tests/ranks/test_train.py::test_the_first_step_without_zero",
    ),
    Mutation(
        "never-clipped",
        "moe_dit/parallel/deepspeed_config.py",
        "recipe.optimizer.clip_grad_norm if parallelism.zero_stage else 0.0",
        "0.0",
        "tests/ranks/test_engine.py::test_clipping_is_torch_s",
    ),
    Mutation(
        "experts-drawn-alike",
        "moe_dit/parallel/expert_layers.py",
        "first_expert=ep_rank * self.num_local_experts)",
        "first_expert=0)",
        "tests/ranks/test_train.py::test_the_first_step_of_two_ranks_that_share_the_experts[2]",
    ),
    Mutation(
        "betas-swapped",
        "moe_dit/optimizer.py",
        "first, second = config.betas",
        "second, first = config.betas",
        "tests/ranks/test_train.py::test_the_first_step_of_one_rank",
    ),
    Mutation(
        "a-thread-a-save",
        "moe_dit/checkpoint.py",
        "self._thread.submit(",
        "ThreadPoolExecutor(1).submit(",
        "tests/unit/test_checkpoint.py::test_all_saves_are_of_one_thread",
    ),
    Mutation(
        "a-save-over-the-one-before",
        "moe_dit/checkpoint.py",
        "        self.wait()\n        pieces",
        "        pieces",
        "tests/unit/test_checkpoint.py::test_saves_right_after_each_other_do_not_mix",
    ),
    Mutation(
        "a-step-beside-a-copy",
        "moe_dit/engine.py",
        "                self.before_change()\n",
        "                pass\n",
        "tests/ranks/test_checkpoint.py::test_nothing_changes_the_state_before_a_save_has_copied_it",
    ),
    Mutation(
        "a-look-beside-a-copy",
        "moe_dit/engine.py",
        "        self.before_change()\n        with",
        "        with",
        "tests/ranks/test_checkpoint.py::test_nothing_changes_the_state_before_a_save_has_copied_it",
    ),
    Mutation(
        "a-host-s-scalar-a-group",
        "moe_dit/engine.py",
        "module.mask_nan_or_inf_with_val_inplace = _mask_not_finite",
        "pass",
        "tests/ranks/test_counting.py::test_a_whole_step_never_waits",
    ),
    Mutation(
        "tf32-products",
        "moe_dit/runtime/precision.py",
        'set_float32_matmul_precision("highest")',
        'set_float32_matmul_precision("high")',
        "tests/unit/test_autoencoder.py::test_float32_is_float32_while_a_vae_or_features_are_computed",
    ),
    Mutation(
        "adam-begins-anew",
        "moe_dit/checkpoint.py",
        "engine.set_step(step)",
        "engine.set_step(0)",
        "tests/ranks/test_train.py::test_a_run_that_continues_takes_the_second_step",
    ),
    Mutation(
        "other-seed-continues",
        "moe_dit/continuing.py",
        '("seed", "global_batch_size"',
        '("global_batch_size"',
        "tests/ranks/test_train.py::test_a_run_does_not_continue_as_another_experiment[seed]",
    ),
    Mutation(
        "second-average-not-exported",
        "moe_dit/export.py",
        '"weight" if weights == "model" else weights',
        '"weight" if weights == "model" else "ema"',
        "tests/ranks/test_train.py::test_each_kind_of_weights_is_exported_as_itself",
    ),
    Mutation(
        "upcycled-not-unscaled",
        "moe_dit/upcycle.py",
        " / layer.router.routed_scale",
        "",
        "tests/unit/test_upcycle.py::test_an_upcycled_mixture_computes_the_dense_function",
    ),
    Mutation(
        "gate-for-up",
        "moe_dit/reference/weights.py",
        'half = slice(shape[0]) if matrix == "gate"',
        'half = slice(shape[0]) if matrix == "up"',
        "tests/unit/test_reference.py::test_the_published_code_s_recorded_quantities_are_matched[jit_dense]",
    ),
    Mutation(
        "averages-begin-as-drawn",
        "moe_dit/initial_weights.py",
        'kinds = ["weight", *engine.recipe.ema.decays]',
        'kinds = ["weight"]',
        "tests/ranks/test_train.py::test_the_first_step_of_one_rank",
    ),
    Mutation(
        "crop-off-centre",
        "moe_dit/data/pixels.py",
        "left = (width - size) // 2",
        "left = width - size",
        "tests/unit/test_data_prep.py::test_center_crop_is_adms",
    ),
    Mutation(
        "labels-in-shard-order",
        "data_prep/shards.py",
        "str(labels[index])",
        "str(labels[i])",
        "tests/unit/test_data_prep.py::test_pixels_are_the_crops",
    ),
    Mutation(
        "mirror-upside-down",
        "data_prep/encode_latents.py",
        "images.flip(-1)",
        "images.flip(-2)",
        "tests/unit/test_data_prep.py::test_latents_are_the_vaes_posteriors",
    ),
    Mutation(
        "shards-not-hashed",
        "data_prep/verify.py",
        'if sha256(path) != record["sha256"]:',
        "if not sha256(path):",
        "tests/unit/test_data_prep.py::test_verify",
    ),
    Mutation(
        "images-not-rounded",
        "eval/generate.py",
        "* 127.5).round()",
        "* 127.5)",
        "tests/unit/test_literals.py::test_images_are_rounded_to_the_nearest_grey",
    ),
    Mutation(
        "recall-of-first-classes",
        "eval/features.py",
        "torch.linspace(0, count - 1, min(KEPT, count), dtype=torch.float64)",
        "torch.arange(0.0, min(KEPT, count))",
        "tests/unit/test_literals.py::test_recall_asks_for_every_class_of_a_large_reference",
    ),
    Mutation(
        "fitted-to-held-out",
        "eval/features.py",
        "_fit(x[~held_out], y[~held_out])",
        "_fit(x, y)",
        "tests/unit/test_literals.py::test_held_out_accuracy_is_of_images_that_were_not_fitted",
    ),
    Mutation(
        "other-weights-continue",
        "eval/sample_folder.py",
        '(model / "config.json", *sorted(model.glob("*.safetensors")))',
        '(model / "config.json",)',
        "tests/unit/test_literals.py::test_samples_of_other_weights_are_not_continued",
    ),
    Mutation(
        "atlas-transposed",
        "eval/atlas.py",
        ".unflatten(0, (self.side, self.side))",
        ".unflatten(0, (self.side, self.side)).transpose(0, 1)",
        "tests/unit/test_atlas.py::test_choice_by_position",
    ),
    Mutation(
        "cpu-experts-forget-the-weight",
        "moe_dit/kernels/cpu.py",
        "weighted = h.mul_(weight_n1)",
        "weighted = h",
        "tests/unit/test_models.py::test_summing_tokens_by_expert_equals_summing_their_rows",
    ),
    Mutation(
        "balanced-classes-as-any",
        "eval/metrics.py",
        "if labels_N is not None and _balanced(labels_N):",
        "if False:",
        "tests/unit/test_protocols.py::test_of_balanced_classes_the_error_is_what_samples_differ_by_within_them",
    ),
    Mutation(
        "influence-without-the-mean",
        "eval/metrics.py",
        "slope = 2 * (mu - other)",
        "slope = 0 * (mu - other)",
        "tests/unit/test_protocols.py::test_the_error_is_the_bootstrap_s",
    ),
    Mutation(
        "infinity-the-other-way",
        "eval/metrics.py",
        "return fid - (of_half - fid)",
        "return fid + (of_half - fid)",
        "tests/unit/test_protocols.py::test_fid_infinity_takes_the_bias_away",
    ),
    Mutation(
        "adm-shuffled",
        "eval/metrics.py",
        "splits=1, shuffle=False)",
        "splits=2, shuffle=True)",
        "tests/unit/test_protocols.py::test_adm_s_parts_are_in_the_samples_own_order",
    ),
    Mutation(
        "density-of-three",
        "eval/metrics.py",
        "k: int = 3, k_density: int = 5",
        "k: int = 3, k_density: int = 3",
        "tests/unit/test_protocols.py::test_density_and_coverage_are_prdc_s",
    ),
    Mutation(
        "half-pixel-corners",
        "eval/features.py",
        'mode="bilinear", align_corners=False) * 2 - 1',
        'mode="bilinear", align_corners=True) * 2 - 1',
        "tests/unit/test_protocols.py::test_diffmoe_is_pytorch_fid_on_floats",
    ),
    Mutation(
        "floats-of-127",
        "eval/generate.py",
        "images.float() * 127.5 + 128",
        "images.float() * 127.5 + 127.5",
        "tests/unit/test_protocols.py::test_floats_are_not_rounded",
    ),
    Mutation(
        "near-of-one-error",
        "eval/sweep.py",
        "math.hypot(row.error, best.error)",
        "row.error",
        "tests/unit/test_sweep.py::test_the_best_is_marked_and_what_does_not_differ_from_it",
    ),
    Mutation(
        "spread-of-seeds-forgotten",
        "eval/sweep.py",
        "error = max(error, statistics.stdev(fids) / len(results) ** 0.5)",
        "pass",
        "tests/unit/test_sweep.py::test_several_seeds_are_a_mean_with_its_spread",
    ),
    Mutation(
        "smoothing-lags",
        "eval/plots.py",
        "sums[place - half]) / (2 * half + 1)",
        "sums[place - half]) / (2 * half + 2)",
        "tests/unit/test_eval.py::test_smoothing_has_no_lag",
    ),
    Mutation(
        "linear-forgets-the-transpose",
        "moe_dit/kernels/linear.py",
        "rows.sum(dim=0) if",
        "rows.mean(dim=0) if",
        "tests/unit/test_linear.py::test_values_and_gradients",
    ),
    Mutation(
        "a-failing-source-breaks-images",
        "data_prep/shards.py",
        "        except BrokenImage as error:\n            return self._broken(index, str(error))\n",
        "        except (BrokenImage, InputError) as error:\n            return self._broken(index, str(error))\n",
        "tests/unit/test_sources.py::test_an_image_that_goes_is_broken_and_a_server_that_goes_ends_the_job",
    ),
    Mutation(
        "workers-of-one-rate",
        "moe_dit/data/loader.py",
        "math.ceil(2 * eats / reads)",
        "math.ceil(eats / reads)",
        "tests/unit/test_data.py::test_workers_are_as_many_as_feed_a_rank",
    ),
    Mutation(
        "labels-unchecked",
        "moe_dit/data/reader.py",
        "or int(text) >= classes",
        "",
        "tests/unit/test_errors.py::test_a_label_that_is_none_of_the_classes_is_refused",
    ),
    Mutation(
        "values-unchecked",
        "moe_dit/data/reader.py",
        "or zlib.crc32(rows[i], self._header_crc) != crcs[i]",
        "",
        "tests/unit/test_data.py::test_a_flipped_bit_anywhere_is_one_line",
    ),
    Mutation(
        "label-unread",
        "moe_dit/data/reader.py",
        'or os.pread(file, label_sizes[i], label_offsets[i]).strip() != b"%d" % labels[i]',
        "",
        "tests/unit/test_data.py::test_a_flipped_bit_anywhere_is_one_line",
    ),
    Mutation(
        "a-deleted-shard-is-read",
        "moe_dit/data/reader.py",
        "if not os.fstat(file.descriptor).st_nlink:",
        "if False:",
        "tests/ranks/test_data.py::test_a_shard_deleted_while_training_is_one_line",
    ),
    Mutation(
        "window-in-order",
        "moe_dit/data/order.py",
        "return samples[window_permutation(self.seed, epoch, 1 + window, len(samples))]",
        "return samples",
        "tests/unit/test_data.py::test_windows_are_shards_that_were_permuted",
    ),
    Mutation(
        "windows-of-one-epoch",
        "moe_dit/data/order.py",
        "window_permutation(self.seed, epoch, 0, len(self.sizes))",
        "window_permutation(self.seed, 0, 0, len(self.sizes))",
        "tests/unit/test_data.py::test_windows_are_shards_that_were_permuted",
    ),
    Mutation(
        "next-window-not-ahead",
        "moe_dit/data/order.py",
        "shards[window * self.shards : (window + 2) * self.shards]",
        "shards[window * self.shards : (window + 1) * self.shards]",
        "tests/unit/test_data.py::test_what_is_read_ahead_is_what_comes",
    ),
    Mutation(
        "order-not-kept",
        "moe_dit/train.py",
        "window = kept_window(read_description(start.checkpoint))",
        "window = window_for(manifest, window)",
        "tests/ranks/test_data.py::test_the_order_of_a_run_is_kept",
    ),
    Mutation(
        "dead-loader-unseen",
        "moe_dit/runtime/loading.py",
        "                    self._death = self._told.death(number, process)\n",
        "                    return\n",
        "tests/ranks/test_loading.py::test_what_befalls_a_process_is_one_line",
    ),
    Mutation(
        "an-iterator-is-forgotten-twice",
        "moe_dit/runtime/loading.py",
        "if self._batches._worker_pids_set:",
        "if True:",
        "tests/ranks/test_loading.py::test_a_process_that_dies_when_all_is_read_changes_nothing",
    ),
    Mutation(
        "message-cut-short-waited-for",
        "moe_dit/runtime/loading.py",
        "                        self._batches._worker_result_queue._writer.close()",
        "                        pass",
        "tests/ranks/test_loading.py::test_a_message_cut_short_is_not_waited_for",
    ),
    Mutation(
        "batch-packed-by-its-queue",
        "moe_dit/runtime/loading.py",
        "return batch if get_worker_info() is None else _Parcel(batch)",
        "return batch",
        "tests/ranks/test_loading.py::test_shared_memory_that_is_full_is_one_line",
    ),
    Mutation(
        "unsent-batch-waited-for",
        "moe_dit/runtime/loading.py",
        "staticmethod(lambda *_: os._exit(1))",
        "staticmethod(lambda *_: None)",
        "tests/ranks/test_loading.py::test_a_batch_that_its_queue_cannot_take_is_not_waited_for",
    ),
    Mutation(
        "stopped-worker-left",
        "moe_dit/runtime/loading.py",
        "            ending.join(ENDING_SECONDS)\n            self._kill()\n",
        "            ending.join(ENDING_SECONDS)\n",
        "tests/ranks/test_loading.py::test_a_process_that_is_stopped_ends_with_the_rest",
    ),
    Mutation(
        "children-waited-for",
        "moe_dit/runtime/command.py",
        "        kill_children()\n",
        "",
        "tests/ranks/test_loading.py::test_a_command_ends_before_its_processes_that_see_no_signal",
    ),
    Mutation(
        "end-without-limit",
        "moe_dit/runtime/command.py",
        "    limit.start()\n",
        "",
        "tests/ranks/test_loading.py::test_a_command_ends_whatever_holds_it",
    ),
    Mutation(
        "end-without-alarm",
        "moe_dit/runtime/command.py",
        "    signal.alarm(int(LEAVING_SECONDS) + HARD_SECONDS)\n",
        "",
        "tests/ranks/test_loading.py::test_a_command_ends_whatever_holds_it",
    ),
    Mutation(
        "end-hears-no-signal",
        "moe_dit/runtime/command.py",
        "lambda *_: os._exit(status)",
        "lambda *_: None",
        "tests/ranks/test_loading.py::test_a_command_that_is_held_up_as_it_ends_ends_when_told_to",
    ),
    Mutation(
        "lone-failure-untold",
        "moe_dit/train.py",
        "        if not self.speaks and not alone:",
        "        if not self.speaks:",
        "tests/ranks/test_loading.py::test_a_run_ends_where_a_loader_process_is_killed",
    ),
    Mutation(
        "workers-outlive-their-rank",
        "moe_dit/runtime/processes.py",
        "time.sleep(2)\n        os._exit(1)",
        "time.sleep(2)",
        "tests/ranks/test_data.py::test_workers_end_with_a_rank_that_is_killed",
    ),
    Mutation(
        "transparency-on-black",
        "moe_dit/data/pixels.py",
        'image.size, "white")',
        'image.size, "black")',
        "tests/unit/test_sources.py::test_images_come_out_as_people_see_them",
    ),
    Mutation(
        "exif-ignored",
        "moe_dit/data/pixels.py",
        "return orientation if orientation in _TURNS else 1",
        "return 1",
        "tests/unit/test_sources.py::test_images_are_turned_as_their_exif_data_says",
    ),
    Mutation(
        "sixteen-bits-cut-off",
        "moe_dit/data/pixels.py",
        "grey = ((values * 255 + highest // 2) // highest).astype(np.uint8)",
        "grey = values.clip(0, 255).astype(np.uint8)",
        "tests/unit/test_sources.py::test_images_come_out_as_people_see_them",
    ),
    Mutation(
        "broken-images-forgotten",
        "data_prep/shards.py",
        "if broken:  # before",
        "if False:  # before",
        "tests/unit/test_sources.py::test_every_file_is_accounted_for",
    ),
    Mutation(
        "download-unchecked",
        "moe_dit/store.py",
        'and sha256 in ("", digest.hexdigest())',
        "",
        "tests/unit/test_store.py::test_a_server_that_lies_is_one_line",
    ),
    Mutation(
        "newest-evicted",
        "moe_dit/store.py",
        "in sorted(found):",
        "in sorted(found, reverse=True):",
        "tests/unit/test_store.py::test_the_cache_keeps_to_its_size",
    ),
    Mutation(
        "everyone-downloads",
        "moe_dit/store.py",
        "if not self._there(path, size):  # another",
        "if True:  # another",
        "tests/ranks/test_store.py::test_many_processes_cause_one_download",
    ),
    Mutation(
        "stored-png-of-bgr",
        "moe_dit/data/stored_png.py",
        "image_HW3.reshape(height, -1)",
        "image_HW3[..., ::-1].reshape(height, -1)",
        "tests/unit/test_sources.py::test_stored_png_is_png",
    ),
    Mutation(
        "answers-of-before-a-restart",
        "moe_dit/runtime/joining.py",
        'return mine["token"] in found.get("tokens", ())',
        "return bool(found)",
        "tests/launchers/test_joining.py::test_ranks_that_torchrun_restarts_meet_anew",
    ),
    Mutation(
        "products-unchecked",
        "moe_dit/preflight.py",
        "if not torch.equal(product.double() @ weights,",
        "if torch.equal(0 * product.double() @ weights,",
        "tests/ranks/test_preflight.py::test_what_is_broken_is_told_with_ranks_and_hosts",
    ),
    Mutation(
        "links-of-all-kinds",
        "moe_dit/preflight.py",
        "(hosts[i - 1] == hosts[i]) is inside",
        "inside",
        "tests/unit/test_preflight.py::test_what_is_slow",
    ),
    Mutation(
        "stragglers-told-for-ever",
        "moe_dit/times.py",
        "if self._reports[rank] == IN_A_ROW:",
        "if self._reports[rank] >= IN_A_ROW:",
        "tests/unit/test_times.py::test_stragglers",
    ),
    Mutation(
        "innermost-collective",
        "moe_dit/watchdog.py",
        "if function in COLLECTIVES and not left else collective",
        "if function in COLLECTIVES and not collective else collective",
        "tests/unit/test_watchdog.py::test_where_a_thread_stands",
    ),
    # Who is gone without a word.
    Mutation(
        "silence-ends-nobody",
        "moe_dit/runtime/silence.py",
        "        if gone:\n",
        "        if not gone:\n            return\n        if silent is None:\n",
        "tests/unit/test_watchdog.py::test_who_is_silent",
    ),
    Mutation(
        "store-may-be-silent",
        "moe_dit/runtime/silence.py",
        "if self._refused > self._reached else limit)",
        "if True else limit)",
        "tests/unit/test_watchdog.py::test_who_is_silent",
    ),
    Mutation(
        "suspended-and-gone",
        "moe_dit/runtime/silence.py",
        "awake = now  # this process",
        "pass  # this process",
        "tests/unit/test_watchdog.py::test_who_is_silent",
    ),
    Mutation(
        "end-waits-for-the-disk",
        "moe_dit/runtime/silence.py",
        "        within(seconds / 2, tell)\n",
        "        tell()\n",
        "tests/ranks/test_watchdog.py::test_a_rank_that_is_gone_ends_the_others_whatever_blocks",
    ),
    Mutation(
        "busy-is-silent",
        "moe_dit/runtime/silence.py",
        "            if value > self._values[rank]:\n",
        "            if not self._values[rank]:\n",
        "tests/ranks/test_watchdog.py::test_a_rank_that_is_gone_ends_the_others_whatever_blocks",
    ),
    Mutation(
        "stacks-hold-all-threads",
        "moe_dit/runtime/rank_log.py",
        "faulthandler.dump_traceback(memory, all_threads=True)",
        "faulthandler.dump_traceback(self._file, all_threads=True)",
        "tests/unit/test_rank_log.py::test_stacks_do_not_hold_other_threads_up",
    ),
    Mutation(
        "lost-rank-is-all-s-failure",
        "moe_dit/checkpoint.py",
        "alike = isinstance(error, (Stop, CheckpointException, OSError, ValueError))",
        "alike = True",
        "tests/ranks/test_checkpoint.py::test_a_rank_that_dies_in_a_save_is_no_failure_that_all_met",
    ),
    Mutation(
        "lost-torchrun-waits",
        "moe_dit/runtime/stopping.py",
        "                agent.kill()\n",
        "                pass\n",
        "tests/unit/test_stopping.py::test_a_torchrun_whose_rendezvous_is_lost_is_killed",
    ),
    # What jobs decide.
    Mutation(
        "give-up-at-another-step",
        "moe_dit/cluster/outcome.py",
        'return a["step"] == b["step"] and causes[0] == causes[1]',
        "return causes[0] == causes[1]",
        "tests/unit/test_cluster.py::test_a_run_that_does_not_get_on_is_given_up",
    ),
    Mutation(
        "give-up-after-a-resubmission",
        "moe_dit/cluster/outcome.py",
        'if event["what"] in ("queued", "requeued", "done", "stopped"):',
        'if event["what"] in ("requeued", "done", "stopped"):',
        "tests/unit/test_cluster.py::test_a_run_that_does_not_get_on_is_given_up",
    ),
    Mutation(
        "give-up-though-it-gets-on",
        "moe_dit/cluster/outcome.py",
        ' and len({f["from"] for f in last}) == 1:',
        ":",
        "tests/unit/test_cluster.py::test_a_run_that_does_not_get_on_is_given_up",
    ),
    Mutation(
        "an-older-end-is-this-one",
        "moe_dit/cluster/outcome.py",
        'if now.get("start") not in [event["start"] for event in told]:',
        "if False:",
        "tests/unit/test_cluster.py::test_an_older_end_is_not_taken_for_this_one",
    ),
    Mutation(
        "the-clock-decides",
        "moe_dit/cluster/outcome.py",
        "told = last_start(own(events(run)))",
        'told = last_start(sorted(own(events(run)), key=lambda event: event["time"]))',
        "tests/unit/test_cluster.py::test_no_clock_decides",
    ),
    Mutation(
        "another-job-s-failures-count",
        "moe_dit/cluster/outcome.py",
        "why := gives_up(own(events(run)))",
        "why := gives_up(list(events(run)))",
        "tests/unit/test_cluster.py::test_a_job_counts_its_own_starts",
    ),
    Mutation(
        "written-beside-the-holder",
        "moe_dit/cluster/outcome.py",
        "                return _beside(run, str(error), status, leaving)",
        "                pass",
        "tests/ranks/test_lock.py::test_a_job_beside_a_run_that_trains_writes_nothing_and_gives_up",
    ),
    Mutation(
        "a-job-s-own-ranks-are-strangers",
        "moe_dit/status.py",
        'ends = now.get("state") == "stopping" or (job() is not None and now.get("job") == job())',
        'ends = now.get("state") == "stopping"',
        "tests/ranks/test_lock.py::test_a_job_waits_for_its_own_ranks",
    ),
    Mutation(
        "a-refusal-is-tried-again",
        "moe_dit/cluster/outcome.py",
        "    if refused:",
        "    if False:",
        "tests/unit/test_cluster.py::test_a_command_that_refuses_is_not_tried_again",
    ),
    Mutation(
        "a-lost-start-speaks",
        "moe_dit/train.py",
        'if not self.speaks and read_status(self.run).get("start") != self.start:',
        "if False:",
        "tests/unit/test_watchdog.py::test_a_rank_of_a_start_that_lost_its_run_says_nothing_there",
    ),
    Mutation(
        "an-event-behind-half-a-line",
        "moe_dit/events.py",
        'line if whole else b"\\n" + line',
        "line",
        "tests/unit/test_cluster.py::test_an_event_behind_a_line_that_was_cut_short_is_kept",
    ),
    Mutation(
        "news-by-the-latest-time",
        "moe_dit/watch.py",
        "if starts else written if trains else changed",
        "if starts else max(written, changed)",
        "tests/unit/test_watch.py::test_clocks_that_differ_are_told_of",
    ),
    Mutation(
        "used-in-the-future",
        "moe_dit/store.py",
        "since = status.st_mtime < time.time() + 60",
        "since = True",
        "tests/unit/test_store.py::test_the_cache_keeps_to_its_size",
    ),
    Mutation(
        "bad-input-is-tried-again",
        "moe_dit/cluster/outcome.py",
        'if state == "failed" and now.get("exit_status") == InputError.status:',
        "if False:",
        "tests/unit/test_cluster.py::test_what_follows_from_how_a_run_ended",
    ),
    Mutation(
        "a-hole-in-the-range-of-nodes",
        "moe_dit/cluster/sizes.py",
        "while least - 1 in fitting:",
        "while least > fitting[0]:",
        "tests/unit/test_cluster.py::test_numbers_of_nodes_that_divide",
    ),
    Mutation(
        "room-for-one-checkpoint",
        "moe_dit/cluster/submit.py",
        "CHECKPOINTS = 2",
        "CHECKPOINTS = 1",
        "tests/ranks/test_cluster.py::test_two_checkpoints_must_have_room",
    ),
    Mutation(
        "arguments-are-not-quoted",
        "moe_dit/cluster/submit.py",
        "shlex.join(arguments)",
        "' '.join(arguments)",
        "tests/unit/test_cluster.py::test_a_template_is_filled_in",
    ),
    Mutation(
        "a-recipe-s-name-is-anything",
        "moe_dit/recipe.py",
        "if not NAME.fullmatch(self.name):",
        "if False:",
        "tests/unit/test_recipe.py::test_a_name_that_could_be_a_path_or_a_program_is_refused",
    ),
    Mutation(
        "a-value-becomes-a-line-of-a-script",
        "moe_dit/cluster/submit.py",
        'if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs") for letter in text):',
        "if False:",
        "tests/unit/test_cluster.py::test_no_value_becomes_a_line_of_a_script",
    ),
    Mutation(
        "a-value-of-sbatch-is-not-quoted",
        "moe_dit/cluster/submit.py",
        "re.ASCII) else f'\"{escaped}\"'",
        "re.ASCII) else value",
        "tests/unit/test_cluster.py::test_a_value_of_sbatch_s_is_one_word_whatever_it_holds",
    ),
    Mutation(
        "latest-is-pasted",
        "jobs/slurm/evaluate.sbatch",
        '$(ask python -m moe_dit.cluster.newest "$run")',
        '$(<"$run/checkpoints/latest")',
        "tests/ranks/test_cluster.py::test_an_evaluation_asks_which_checkpoint_is_meant",
    ),
    Mutation(
        "any-checkpoint-is-a-run-s",
        "moe_dit/cluster/submit.py",
        'checkpoint is None or checkpoint.parent != run / "checkpoints"',
        "checkpoint is None",
        "tests/unit/test_cluster.py::test_a_run_without_a_checkpoint_is_not_evaluated",
    ),
    Mutation(
        "a-job-has-no-time-but-to-save",
        "moe_dit/cluster/submit.py",
        "least = site.save_seconds + START_SECONDS",
        "least = 0",
        "tests/unit/test_cluster.py::test_a_job_has_time_for_more_than_to_save",
    ),
    Mutation(
        "the-environment-overrules-a-script",
        "moe_dit/cluster/submit.py",
        "if key not in OVERRULED}",
        "}",
        "tests/ranks/test_cluster.py::test_what_a_script_says_is_not_overruled_by_the_environment",
    ),
    Mutation(
        "a-log-s-folder-is-not-made",
        "moe_dit/cluster/submit.py",
        "folder.mkdir(parents=True, exist_ok=True)",
        "pass",
        "tests/unit/test_cluster.py::test_the_folder_of_a_log_is_made",
    ),
    Mutation(
        "gives-up-though-told-to-leave",
        "moe_dit/cluster/outcome.py",
        "    if leaving:  # perhaps",
        "    if False:  # perhaps",
        "tests/unit/test_cluster.py::test_a_job_that_is_told_to_leave_before_its_first_step_is_queued_again",
    ),
    Mutation(
        "a-site-s-unset-variables-end-a-job",
        "jobs/slurm/job.sh",
        "set +u\n",
        "",
        "tests/ranks/test_cluster.py::test_python_may_be_only_where_srun_leads",
    ),
    Mutation(
        "python-is-asked-on-the-host",
        "jobs/slurm/job.sh",
        "if [ ${#SRUN[@]} -eq 0 ]; then",
        "if true; then",
        "tests/ranks/test_cluster.py::test_python_may_be_only_where_srun_leads",
    ),
    Mutation(
        "a-name-spoils-a-picture",
        "jobs/watch.py",
        "title = printable(",
        "title = str(",
        "tests/unit/test_watch.py::test_a_run_of_any_name_is_drawn_as_text",
    ),
    Mutation(
        "a-port-is-taken-blindly",
        "jobs/slurm/job.sh",
        "/proc/net/tcp /proc/net/tcp6 || break",
        "/proc/net/tcp /proc/net/tcp6; break",
        "tests/ranks/test_cluster.py::test_a_port_that_another_program_has_is_not_taken",
    ),
    Mutation(
        "a-port-of-the-next-job-is-taken",
        "jobs/slurm/job.sh",
        "611 * i",
        "i",
        "tests/ranks/test_cluster.py::test_a_port_that_another_program_has_is_not_taken",
    ),
    Mutation(
        "out-with-an-equals-sign-is-not-seen",
        "jobs/slurm/job.sh",
        'case $word in "$flag="*) value=${word#*=} ;; esac',
        ":",
        "tests/ranks/test_cluster.py::test_what_was_encoded_is_verified_however_its_folder_was_given",
    ),
    Mutation(
        "a-store-is-not-waited-for",
        "moe_dit/runtime/joining.py",
        "maker.join(limit + ANSWER_SECONDS)",
        "maker.join(0)",
        "tests/ranks/test_joining.py::test_a_port_of_another_program_is_told_of",
    ),
    # What a plan estimates.
    Mutation(
        "the-plan-forgets-the-optimizer",
        "moe_dit/plan.py",
        'max(network, parts["overlapped"]) + parts["optimizer"]',
        'max(network, parts["overlapped"])',
        "tests/unit/test_plan.py::test_a_step_on_one_h100_is_that_of_another_reckoning",
    ),
    Mutation(
        "the-plan-forgets-operands",
        "moe_dit/plan.py",
        "images * _operands(recipe, model) + ",
        "",
        "tests/unit/test_plan.py::test_a_step_on_one_h100_is_that_of_another_reckoning",
    ),
    Mutation(
        "the-plan-steps-what-others-own",
        "moe_dit/plan.py",
        "sums + step * owned",
        "sums + step * local",
        "tests/unit/test_plan.py::test_what_the_optimizer_touches",
    ),
    Mutation(
        "the-plan-knows-one-average",
        "moe_dit/plan.py",
        "12 * len(recipe.ema.decays)",
        "12",
        "tests/unit/test_plan.py::test_what_the_optimizer_touches",
    ),
    Mutation(
        "deepspeed-times-each-step",
        "moe_dit/parallel/deepspeed_config.py",
        '"throughput": {"enabled": False}',
        '"throughput": {"enabled": True}',
        "tests/ranks/test_counting.py::test_a_whole_step_never_waits",
    ),
    Mutation(
        "long-products-are-repeated",
        "moe_dit/bench.py",
        "if seconds > LONG_PRODUCT:",
        "if False:",
        "tests/unit/test_bench.py::test_a_product_that_takes_seconds_is_not_tried_again",
    ),
    Mutation(
        "the-bench-begins-with-closed-gates",
        "moe_dit/bench.py",
        "    weight += noise\n",
        "",
        "tests/unit/test_bench.py::test_moved_weights_give_every_expert_a_gradient",
    ),
    Mutation(
        "the-plan-never-waits",
        "moe_dit/plan.py",
        'parts["launches"]) + parts["waits"] + ',
        'parts["launches"]) + ',
        "tests/unit/test_plan.py::test_the_host_waits_for_each_exchange",
    ),
    # What a run may change when it goes on.
    Mutation(
        "change-goes-on-unnamed",
        "moe_dit/continuing.py",
        "good = allowed or is_under(key, named.given)",
        "good = True",
        "tests/unit/test_continuing.py::test_a_key_that_differs",
    ),
    Mutation(
        "set-makes-another-experiment",
        "moe_dit/continuing.py",
        "            good = allowed\n        elif is_under(key, HARMLESS)",
        "            good = allowed or is_under(key, named.given)\n        elif is_under(key, HARMLESS)",
        "tests/unit/test_continuing.py::test_a_key_that_differs",
    ),
    Mutation(
        "another-network-may-be-allowed",
        "moe_dit/continuing.py",
        "is_under(key, named.allowed) and not never(change)",
        "is_under(key, named.allowed)",
        "tests/unit/test_continuing.py::test_a_key_that_differs",
    ),
    Mutation(
        "cosine-stretched-unnamed",
        "moe_dit/continuing.py",
        'ours["optimizer"]["schedule"] == "constant"',
        "True",
        "tests/unit/test_continuing.py::test_steps_that_change_the_rate_of_each_step_are_named",
    ),
    Mutation(
        "precision-as-it-is-written",
        "moe_dit/continuing.py",
        'values["precision"] = "bf16" if bf16 else "fp32"',
        'values["precision"] = recipe.precision',
        "tests/unit/test_continuing.py::test_precision_is_what_it_came_to",
    ),
    Mutation(
        "micro-batch-changes-unsaid",
        "moe_dit/continuing.py",
        "if FAMILIES[recipe.model.family].network.couples_samples:",
        "if False:",
        "tests/unit/test_continuing.py::test_the_micro_batch_counts_where_its_samples_meet",
    ),
    Mutation(
        "other-data-unnamed",
        "moe_dit/continuing.py",
        "elif is_under(key, (*SHARDS, MICRO_BATCH)):\n            good = allowed",
        "elif is_under(key, (*SHARDS, MICRO_BATCH)):\n            good = True",
        "tests/unit/test_continuing.py::test_other_data_is_refused_unless_it_may_change",
    ),
    Mutation(
        "digest-without-order",
        "moe_dit/manifest.py",
        "json.dumps(listed).encode()).hexdigest(),",
        "json.dumps(sorted(listed)).encode()).hexdigest(),",
        "tests/unit/test_continuing.py::test_the_digest_is_of_the_content_wherever_it_lies",
    ),
    Mutation(
        "any-word-may-change",
        "moe_dit/continuing.py",
        "if key not in known and not",
        "if not key and not",
        "tests/unit/test_continuing.py::test_what_may_change_must_be_a_key",
    ),
    Mutation(
        "changes-without-an-event",
        "moe_dit/train.py",
        'record(run, "changed", change, first_step, start.history[-1].attempt)',
        "pass",
        "tests/ranks/test_lineage.py::test_another_rate_is_named_and_told_and_not_taken_back_without_a_word",
    ),
    Mutation(
        "starts-keep-no-recipe",
        "moe_dit/train.py",
        '"changes": list(changes), "recipe": recipe.to_dict()',
        '"changes": list(changes)',
        "tests/ranks/test_lineage.py::test_another_rate_is_named_and_told_and_not_taken_back_without_a_word",
    ),
    Mutation(
        "checkpoint-keeps-no-digest",
        "moe_dit/checkpoint.py",
        '"data": self.data,',
        '"data": None,',
        "tests/ranks/test_lineage.py::test_other_data_is_named_and_told",
    ),
    Mutation(
        "submit-drops-what-may-change",
        "jobs/submit.py",
        '("--allow-change", key)',
        "()",
        "tests/ranks/test_cluster.py::test_a_dry_run_prints_what_would_be_submitted",
    ),
    Mutation(
        "report-without-what-changed",
        "eval/report.py",
        'if event["what"] == "changed"]',
        'if event["what"] == ""]',
        "tests/unit/test_eval.py::test_the_report_says_what_a_run_was_and_what_is_published",
    ),
    # Models that lack weights, and what nobody writes.
    Mutation(
        "missing-weights-taken",
        "moe_dit/weight_files.py",
        "    if missing:\n",
        "    if len(missing) > 1:\n",
        "tests/unit/test_model_folders.py::test_a_model_that_is_not_whole_is_one_line",
    ),
    Mutation(
        "surplus-weights-taken",
        "moe_dit/weight_files.py",
        "    if surplus:\n",
        "    if not surplus and surplus:\n",
        "tests/unit/test_model_folders.py::test_a_model_that_is_not_whole_is_one_line",
    ),
    Mutation(
        "shards-of-elsewhere",
        "moe_dit/runtime/reading.py",
        "os.path.basename(name) != name or ",
        "",
        "tests/unit/test_model_folders.py::test_a_model_that_is_not_whole_is_one_line",
    ),
    Mutation(
        "model-keys-by-default",
        "moe_dit/build.py",
        "key not in LATER_KEYS and",
        "key in LATER_KEYS and",
        "tests/unit/test_model_folders.py::test_a_configuration_that_lacks_a_key_is_one_line",
    ),
    Mutation(
        "vae-surplus-weights",
        "data_prep/autoencoder.py",
        '(surplus or info["unexpected_keys"],',
        "([],",
        "tests/unit/test_model_folders.py::test_a_model_that_is_not_whole_is_one_line",
    ),
    Mutation(
        "vae-unknown-keys",
        "data_prep/autoencoder.py",
        "    if unknown:",
        "    if not unknown:",
        "tests/unit/test_model_folders.py::test_a_model_that_is_not_whole_is_one_line",
    ),
    Mutation(
        "pipes-opened",
        "moe_dit/runtime/reading.py",
        "    if not stat.S_ISREG(mode):",
        "    if stat.S_ISDIR(mode):",
        "tests/unit/test_odd_files.py::test_what_is_no_file_is_said",
    ),
    Mutation(
        "aliases-expanded",
        "moe_dit/runtime/reading.py",
        "        if total > MOST_VALUES:",
        "        if total > MOST_VALUES**2:",
        "tests/unit/test_odd_files.py::test_yaml_may_repeat_itself_a_little",
    ),
    Mutation(
        "json-nan",
        "moe_dit/runtime/reading.py",
        "            parse_constant=_no_number,\n",
        "",
        "tests/unit/test_odd_files.py::test_json_is_utf8_with_or_without_its_mark",
    ),
    Mutation(
        "counts-without-end",
        "moe_dit/schema.py",
        "Count = Annotated[int, Field(strict=True, gt=0, le=MOST)]",
        "Count = Annotated[int, Field(strict=True, gt=0)]",
        "tests/unit/test_odd_files.py::test_a_count_without_end_is_refused",
    ),
    Mutation(
        "numbers-not-finite",
        "moe_dit/schema.py",
        "Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]",
        "Number = Annotated[float, Field(strict=True)]",
        "tests/unit/test_odd_files.py::test_a_number_that_is_not_finite_is_refused",
    ),
    Mutation(
        "divisors-of-squares-twice",
        "moe_dit/schema.py",
        "sorted({*small, *(n // d for d in small)})",
        "[*small, *(n // d for d in small)]",
        "tests/unit/test_odd_files.py::test_the_largest_batch_is_divided_at_once",
    ),
    Mutation(
        "flags-not-finite",
        "moe_dit/runtime/command.py",
        "if isinstance(value, float) and not math.isfinite(value):",
        "if isinstance(value, float) and value != value:",
        "tests/unit/test_odd_files.py::test_an_argument_that_nothing_can_be_is_one_line",
    ),
    Mutation(
        "out-is-a-file",
        "moe_dit/training_command.py",
        "        if not os.path.isdir(there):",
        "        if not os.path.exists(there):",
        "tests/unit/test_odd_files.py::test_a_file_where_a_folder_is_meant_is_one_line",
    ),
    Mutation(
        "sockets-in-long-folders",
        "moe_dit/runtime/processes.py",
        "            tempfile.tempdir = short\n",
        "",
        "tests/unit/test_odd_files.py::test_sockets_have_short_paths_however_long_the_folder_of_temporary_files_is",
    ),
    # Disks that fail, copies and other people's files.
    Mutation(
        "a-key-twice",
        "moe_dit/runtime/reading.py",
        "            if (key.tag, key.value) in seen:",
        "            if key.value is None:",
        "tests/unit/test_odd_files.py::test_a_key_that_stands_twice_is_no_choice",
    ),
    Mutation(
        "a-foreign-folder-is-a-run",
        "moe_dit/run_folder.py",
        "    if is_run(run):\n        return True\n",
        "    if is_run(run) or os.path.isdir(run):\n        return True\n",
        "tests/unit/test_run_folder.py::test_files_that_no_run_wrote_are_not_replaced",
    ),
    Mutation(
        "unfinished-of-others-removed",
        "moe_dit/run_folder.py",
        'remove_unfinished(run / "checkpoints", "step_[0-9]*")',
        'remove_unfinished(run / "checkpoints", "*")',
        "tests/unit/test_run_folder.py::test_only_a_runs_own_unfinished_files_are_removed",
    ),
    Mutation(
        "a-hard-link-is-written-through",
        "moe_dit/runtime/files.py",
        "    if found.st_nlink > 1:",
        "    if found.st_nlink > 2:",
        "tests/unit/test_run_folder.py::test_a_copy_by_hard_links_writes_nothing_into_the_original",
    ),
    Mutation(
        "a-copy-is-the-same-to-a-tracker",
        "moe_dit/sinks.py",
        "        if copied:\n",
        "        if not copied and copied:\n",
        "tests/unit/test_run_folder.py::test_a_copied_run_is_another_to_a_tracker_and_a_moved_one_is_not",
    ),
    Mutation(
        "a-link-s-archive-is-removed",
        "moe_dit/runtime/files.py",
        "if stat.S_ISDIR(os.lstat(path).st_mode):",
        "if stat.S_ISDIR(os.stat(path).st_mode):",
        "tests/unit/test_run_folder.py::test_a_link_that_is_superfluous_goes_and_what_it_leads_to_stays",
    ),
    Mutation(
        "a-replaced-folder-is-lost",
        "moe_dit/runtime/files.py",
        "        try:\n            os.replace(old, path)\n",
        "        try:\n            pass\n",
        "tests/unit/test_run_folder.py::test_a_folder_that_cannot_be_replaced_is_put_back",
    ),
    Mutation(
        "a-failing-sink-ends-the-run",
        "moe_dit/sinks.py",
        "with noted(name, Exception):",
        "with noted(name, KeyError):",
        "tests/unit/test_sinks.py::test_a_sink_that_fails_is_told_of_once_and_opened_anew_after_a_minute",
    ),
    Mutation(
        "pruned-is-damaged",
        "moe_dit/checkpoint_files.py",
        "if not os.path.lexists(checkpoint) and checkpoint.parent.is_dir():",
        "if not os.path.lexists(checkpoint.parent):",
        "tests/ranks/test_lineage.py::test_a_checkpoint_that_is_pruned_while_it_is_read_gives_way_to_a_newer_one",
    ),
    Mutation(
        "pruned-while-looked-for",
        "moe_dit/lineage.py",
        "        except Pruned:\n            raise\n",
        "",
        "tests/ranks/test_lineage.py::test_the_newest_checkpoint_may_be_pruned_while_it_is_looked_for",
    ),
    Mutation(
        "a-log-s-disk-ends-the-run",
        "moe_dit/runtime/progress.py",
        "        return _Deaf(super().file)",
        "        return super().file",
        "tests/ranks/test_files.py::test_a_log_on_a_full_disk_ends_nothing",
    ),
    Mutation(
        "a-copy-has-no-lock-of-its-own",
        "moe_dit/runtime/lock.py",
        "if (same and named.st_nlink <= 1) or tries == MOST_TRIES:",
        "if True:",
        "tests/ranks/test_lock.py::test_a_copy_by_hard_links_has_a_lock_of_its_own",
    ),
    Mutation(
        "a-note-ends-the-run",
        "moe_dit/runtime/notes.py",
        "    except errors as error:\n        tell(",
        "    except KeyError as error:\n        tell(",
        "tests/ranks/test_faults.py::test_a_run_does_what_the_table_says",
    ),
    Mutation(
        "pruning-ends-the-run",
        "moe_dit/runtime/files.py",
        "    except OSError as error:\n        _say_left(path, error)\n\n\ndef _say_left",
        "    except KeyError as error:\n        _say_left(path, error)\n\n\ndef _say_left",
        "tests/ranks/test_faults.py::test_a_run_does_what_the_table_says",
    ),
    Mutation(
        "a-save-s-cause-is-torch-s",
        "moe_dit/checkpoint.py",
        "raise kept.error or error from None",
        "raise error",
        "tests/ranks/test_faults.py::test_a_run_does_what_the_table_says",
    ),
    Mutation(
        "another-user-s-run-is-a-traceback",
        "moe_dit/events.py",
        '    except OSError as error:\n        raise InputError(f"the events',
        '    except KeyError as error:\n        raise InputError(f"the events',
        "tests/ranks/test_files.py::test_another_users_closed_run_is_one_line",
    ),
    # What an index says but no file holds, and numbers too large to count through.
    Mutation(
        "vae-names-from-the-index",
        "data_prep/autoencoder.py",
        'held.keys() if sharded else info["missing_keys"]',
        'held.keys() if not sharded else info["missing_keys"]',
        "tests/unit/test_autoencoder.py::test_the_weights_are_those_that_the_files_hold",
    ),
    Mutation(
        "vae-integers-as-weights",
        "data_prep/autoencoder.py",
        "for key, floating in held.items() if not floating]",
        "for key, floating in held.items() if floating is None]",
        "tests/unit/test_autoencoder.py::test_the_weights_are_numbers",
    ),
    Mutation(
        "vae-infinite-weights",
        "data_prep/autoencoder.py",
        "if not value.isfinite().all()]",
        "if value.isnan().all()]",
        "tests/unit/test_autoencoder.py::test_the_weights_are_numbers",
    ),
    Mutation(
        "vae-scale-of-nothing",
        "data_prep/autoencoder.py",
        "(value > 0 or key",
        "(value >= 0 or key",
        "tests/unit/test_autoencoder.py::test_scale_and_shift_are_numbers",
    ),
    Mutation(
        "nodes-counted-through",
        "moe_dit/cluster/sizes.py",
        "for ranks in divisors(recipe.global_batch_size)",
        "for ranks in range(1, recipe.global_batch_size + 1)",
        "tests/unit/test_cluster.py::test_huge_numbers_of_nodes_are_not_counted_through",
    ),
    Mutation(
        "steps-of-any-length",
        "moe_dit/checkpoint_files.py",
        "step_([0-9]{8,19})",
        "step_([0-9]{8,})",
        "tests/unit/test_checkpoint_files.py::test_a_name_of_thousands_of_digits_is_no_checkpoint_s",
    ),
    Mutation(
        "an-export-of-another-checkpoint",
        "jobs/slurm/evaluate.sbatch",
        ' || [ "$(cat "$model.of" 2>/dev/null)" != "$newest" ]',
        "",
        "tests/ranks/test_cluster.py::test_what_is_evaluated_is_an_export_of_this_very_checkpoint",
    ),
    Mutation(
        "dry-run-takes-a-file-for-a-folder",
        "moe_dit/cluster/submit.py",
        "if not there.is_dir():",
        "if not there:",
        "tests/unit/test_cluster.py::test_a_dry_run_refuses_what_is_no_folder_for_a_log_and_makes_none",
    ),
    Mutation(
        "errno-in-a-line",
        "moe_dit/reference/files.py",
        "isinstance(error, OSError) and error.strerror",
        "None",
        "tests/unit/test_reference.py::test_a_checkpoint_that_is_no_file_is_told_plainly",
    ),
    Mutation(
        "what-looks-like-a-run-is-one",
        "moe_dit/run_folder.py",
        "    return not _in_the_way(run) and any(",
        "    return any(",
        "tests/unit/test_run_folder.py::test_what_only_looks_like_a_runs_is_refused",
    ),
    Mutation(
        "several-ranks-failures-count",
        "moe_dit/cluster/outcome.py",
        'event["start"] == failures[-1]["start"]',
        'event["start"] is failures',
        "tests/unit/test_cluster.py::test_several_ranks_tell_of_one_failure",
    ),
    Mutation(
        "a-pipe-for-a-lock",
        "moe_dit/runtime/lock.py",
        "if not stat.S_ISREG(",
        "if stat.S_ISSOCK(",
        "tests/ranks/test_files.py::test_a_pipe_in_the_place_of_a_file_holds_nobody_up",
    ),
    Mutation(
        "closed-streams-are-a-failure",
        "moe_dit/runtime/progress.py",
        "            if stream is not None:",
        "            if stream is None:",
        "tests/unit/test_files.py::test_streams_that_were_closed_before_the_start_are_no_failure",
    ),
    Mutation(
        "lost-results-are-no-failure",
        "moe_dit/runtime/progress.py",
        "good = good and stream is not sys.stdout",
        "good = good and stream is not None",
        "tests/unit/test_files.py::test_results_that_could_not_be_printed_are_a_failure_and_messages_are_not",
    ),
    Mutation(
        "numbers-sort-as-text",
        "data_prep/classes.py",
        "numbers = all(map(is_number, raw))",
        "numbers = False",
        "tests/unit/test_labels.py::test_every_source_gives_the_same_labels[as_folders-numbers]",
    ),
    Mutation(
        "zeros-before-a-number-count",
        "data_prep/classes.py",
        "return str(int(name)) if is_number(name) else",
        "return name if is_number(name) else",
        "tests/unit/test_labels.py::test_ambiguous_classes_are_one_line",
    ),
    Mutation(
        "two-forms-of-unicode",
        "data_prep/classes.py",
        'unicodedata.normalize("NFC", name)\n\n\ndef read_names',
        "name\n\n\ndef read_names",
        "tests/unit/test_labels.py::test_every_source_gives_the_same_labels[as_class_tars-Unicode]",
    ),
    Mutation(
        "one-to-n-is-taken-for-labels",
        "data_prep/classes.py",
        "if found == list(range(1, len(found) + 1)):",
        "if not found:",
        "tests/unit/test_labels.py::test_ambiguous_classes_are_one_line",
    ),
    Mutation(
        "classes-file-is-passed-over",
        "data_prep/classes.py",
        "numbered = {kind: places[plain[kind]] for kind in raw}",
        "numbered = {kind: i for i, kind in enumerate(sorted(raw))}",
        "tests/unit/test_labels.py::test_a_file_gives_the_order_by_name",
    ),
    Mutation(
        "splits-are-mixed",
        "data_prep/sources.py",
        "        if mixed:",
        "        if False:",
        "tests/unit/test_labels.py::test_splits_are_not_mixed",
    ),
    Mutation(
        "a-tar-of-folders-is-one-class",
        "data_prep/tars.py",
        "all(len(folders) == common for *_, folders in parts)",
        "len(stems) == 1",
        "tests/unit/test_labels.py::test_every_source_gives_the_same_labels[as_tar_of_folders-words]",
    ),
    Mutation(
        "shards-without-labels-are-classes",
        "data_prep/tars.py",
        "                _check_unlabelled(found)\n            return found",
        "                pass\n            return found",
        "tests/unit/test_labels.py::test_shards_whose_labels_nobody_tells_are_one_line",
    ),
    Mutation(
        "loose-images-uncounted",
        "data_prep/images.py",
        "left_out[LOOSE] += 1",
        "left_out[LOOSE] += 0",
        "tests/unit/test_labels.py::test_images_beside_class_folders_are_counted",
    ),
    Mutation(
        "types-by-name-alone",
        "data_prep/images.py",
        "            if named_as_image(name) or is_image(path):\n",
        "            if named_as_image(name):\n",
        "tests/unit/test_labels.py::test_images_beside_class_folders_are_counted",
    ),
    Mutation(
        "companions-of-macos-are-images",
        "moe_dit/data/tar.py",
        'last.startswith(".") or not last',
        "not last",
        "tests/unit/test_labels.py::test_shards_by_plain_tar_are_adopted",
    ),
    Mutation(
        "a-dot-in-a-folder-ends-the-key",
        "moe_dit/data/tar.py",
        'stem, _, extension = last.partition(".")\n                yield Member(name, f"{folder}{slash}{stem}"',
        'stem, _, extension = name.partition(".")\n                yield Member(name, stem',
        "tests/unit/test_labels.py::test_shards_by_plain_tar_are_adopted",
    ),
    Mutation(
        "one-overflow-ends-all",
        "data_prep/shards.py",
        "            reasons[place] = one.reason\n",
        "            raise InputError(one.reason)\n",
        "tests/unit/test_sources.py::test_latents_that_are_not_finite_are_one_images",
    ),
    # Servers that refuse for now, and the hub.
    Mutation(
        "refusal-without-its-pause",
        "moe_dit/store.py",
        "wait = max(self.wait, asked or 0.0)",
        "wait = self.wait",
        "tests/unit/test_store.py::test_a_server_that_refuses_for_now_is_asked_again_when_it_says",
    ),
    Mutation(
        "pause-by-our-clock",
        "moe_dit/store.py",
        "until.timestamp() - begin.timestamp()",
        "until.timestamp() - time.time()",
        "tests/unit/test_store.py::test_a_server_that_refuses_for_now_is_asked_again_when_it_says",
    ),
    Mutation(
        "pause-beyond-the-patience",
        "moe_dit/store.py",
        "if asked is not None and failing + asked > patience:",
        "if asked is not None and failing + asked > 1e400 * patience:",
        "tests/unit/test_store.py::test_a_server_that_asks_for_more_than_the_patience_is_one_line_at_once",
    ),
    Mutation(
        "connection-of-an-error-kept",
        "moe_dit/store.py",
        "if response.status >= 400:",
        "if response.status >= 600:",
        "tests/unit/test_store.py::test_what_no_wait_would_cure_is_said_at_once",
    ),
    Mutation(
        "hub-that-is-away-lacks-the-file",
        "moe_dit/runtime/hub.py",
        "isinstance(met, errors.EntryNotFoundError) and not isinstance(met, errors.LocalEntryNotFoundError)",
        "isinstance(met, errors.EntryNotFoundError)",
        "tests/unit/test_autoencoder.py::test_a_hub_that_is_not_there_is_told_of",
    ),
    Mutation(
        "weights-that-the-hub-lacks",
        "data_prep/autoencoder.py",
        'why = hub.refusal(error, "a file of its weights", silent) or _reason(error)',
        "why = _reason(error)",
        "tests/unit/test_autoencoder.py::test_weights_that_the_hub_does_not_give_are_told_of",
    ),
    Mutation(
        "guidance-by-an-untrained-class",
        "moe_dit/data/inputs.py",
        "if cfg_scale != 1 and not recipe.flow.label_dropout and recipe.initial_weights is None:",
        "if cfg_scale > 1 and not recipe.flow.label_dropout and recipe.initial_weights is None:",
        "tests/unit/test_data.py::test_samples_are_not_guided_by_a_null_class_that_was_never_trained",
    ),
    Mutation(
        "one-rank-at-a-port",
        "moe_dit/runtime/ranks.py",
        'met: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}',
        "met: dict[str, Any] = {}",
        "tests/unit/test_joining.py::test_one_rank_needs_no_port",
    ),
    Mutation(
        "class-names-of-digits",
        "moe_dit/classes.py",
        "return not all(name.isdigit() for name in (*theirs, *ours))",
        "return True",
        "tests/unit/test_classes.py::test_classes_that_are_not_there_are_one_line",
    ),
    Mutation(
        "export-keeps-class-names",
        "moe_dit/export.py",
        "checkpoint_classes(found[0])) as new",
        "None) as new",
        "tests/unit/test_classes.py::test_an_export_has_the_names_that_its_checkpoint_was_trained_with",
    ),
    Mutation(
        "label-agreement-by-name",
        "eval/score.py",
        "translated(made.labels, places)",
        "made.labels",
        "tests/unit/test_classes.py::test_samples_are_scored_by_the_names_of_their_classes",
    ),
    Mutation(
        "held-out-labels-by-name",
        "moe_dit/looks.py",
        'translated(batch["y"], places)',
        'batch["y"]',
        "tests/unit/test_looks.py::test_held_out_samples_have_the_labels_of_their_names",
    ),
    Mutation(
        "atlas-labels-by-name",
        "eval/atlas.py",
        'translated(read["y"], places)',
        'read["y"]',
        "tests/unit/test_atlas.py::test_choice_by_class_and_a_single_expert",
    ),
    Mutation(
        "neighbours-by-name",
        "eval/neighbours.py",
        "by_class.setdefault(places.get(image.label, image.label), [])",
        "by_class.setdefault(image.label, [])",
        "tests/unit/test_classes.py::test_samples_stand_beside_real_images_of_their_name",
    ),
    Mutation(
        "images-beside-folders",
        "eval/images.py",
        '    check_alone(folder, own, [image for inside in folders for image in images_below(inside)], "of its own")\n',
        "",
        "tests/unit/test_images.py::test_samples_of_which_not_all_may_be_meant_are_refused",
    ),
    Mutation(
        "one-index-twice",
        "eval/images.py",
        "            if image.file != file:",
        "            if False:",
        "tests/unit/test_images.py::test_one_index_twice_is_refused_wherever_samples_are_listed",
    ),
    Mutation(
        "batches-of-readable-images",
        "eval/images.py",
        "if len(batch) == BATCH or (batch and place + 1 == len(images)):",
        "if batch and (place % BATCH == BATCH - 1 or place + 1 == len(images)):",
        "tests/unit/test_images.py::test_batches_are_those_of_a_reference_without_what_cannot_be_read",
    ),
    Mutation(
        "rows-of-readable-images",
        "eval/features.py",
        "    if unread and len(images) > KEPT:",
        "    if False:",
        "tests/unit/test_images.py::test_what_is_known_of_real_images_is_that_of_those_that_can_be_read",
    ),
    Mutation(
        "a-tenth-unreadable",
        "eval/features.py",
        "10 * len(unread) > len(images)",
        "10 * len(unread) >= len(images)",
        "tests/unit/test_images.py::test_a_reference_of_which_too_many_cannot_be_read_is_refused",
    ),
    Mutation(
        "samples-of-other-classes",
        "eval/sample_folder.py",
        '{"model", "vae", "num"} if kept else',
        '{"model", "vae", "num", "classes"} if kept else',
        "tests/unit/test_classes.py::test_samples_keep_the_names_and_continue_without",
    ),
    # Odd images.
    Mutation(
        "grey-depth",
        "moe_dit/data/pixels.py",
        "tags.get(ExifTags.Base.BitsPerSample, (16,))[0]",
        "16",
        "tests/unit/test_pixels.py::test_odd_images_have_the_pixels_that_their_formats_define",
    ),
    Mutation(
        "grey-transparent",
        "moe_dit/data/pixels.py",
        "grey[values == key] = 255",
        "pass",
        "tests/unit/test_pixels.py::test_odd_images_have_the_pixels_that_their_formats_define",
    ),
    Mutation(
        "floats-have-no-range",
        "moe_dit/data/pixels.py",
        'if mode == "F":',
        "if False:",
        "tests/unit/test_pixels.py::test_odd_images_have_the_pixels_that_their_formats_define",
    ),
    Mutation(
        "damaged-exif",
        "moe_dit/data/pixels.py",
        "    except Exception:  # Pillow raises what the damage leads it to",
        "    except ZeroDivisionError:",
        "tests/unit/test_pixels.py::test_odd_images_have_the_pixels_that_their_formats_define",
    ),
    Mutation(
        "strips-turned",
        "moe_dit/data/pixels.py",
        "if orientation in (3, 4, 7, 8) else",
        "if orientation in (3, 4, 7) else",
        "tests/unit/test_pixels.py::test_strips_give_the_same_pixels",
    ),
    Mutation(
        "thin-images-enlarged",
        "moe_dit/data/pixels.py",
        "if width * height > max(FAR_LARGER, 4 * size * size):",
        "if False:",
        "tests/unit/test_pixels.py::test_thin_images_are_cut_and_then_enlarged",
    ),
    Mutation(
        "images-side-by-side",
        "moe_dit/data/pixels.py",
        "self._changed.wait_for(lambda: pixels <= self._left)",
        "pass",
        "tests/unit/test_pixels.py::test_threads_decode_no_more_than_one_image_may_have",
    ),
    Mutation(
        "turned-size",
        "eval/images.py",
        "exif_orientation(picture) > 4",
        "exif_orientation(picture) > 5",
        "tests/unit/test_pixels.py::test_sizes_are_those_of_what_is_read",
    ),
    Mutation(
        "a-class-called-train-is-a-split",
        "data_prep/sources.py",
        "(files[0].suffix not in _TARS or all(split_of(file.name) for file in files))",
        "True",
        "tests/unit/test_labels.py::test_a_class_may_be_called_as_a_split_is",
    ),
    Mutation(
        "folders-of-splits-are-classes",
        "data_prep/classes.py",
        "if splits and (len(splits) == len(classes) or len(splits_in(splits)) > 1):",
        "if splits and len(splits) == len(classes):",
        "tests/unit/test_labels.py::test_folders_of_splits_are_no_classes",
    ),
    Mutation(
        "parts-are-classes",
        "data_prep/tars.py",
        "as_parts = all(map(_is_part, stems))",
        "as_parts = not stems",
        "tests/unit/test_labels.py::test_parts_of_a_data_set_are_no_classes",
    ),
    Mutation(
        "links-that-lead-nowhere-vanish",
        "data_prep/images.py",
        "left_out[LOST] += 1",
        "left_out[LOST] += 0",
        "tests/unit/test_labels.py::test_a_link_that_leads_nowhere_is_counted",
    ),
    Mutation(
        "one-limit-for-every-decoder",
        "moe_dit/data/pixels.py",
        'MOST_OF.get(image.format or "", MOST_PIXELS)',
        "MOST_PIXELS",
        "tests/unit/test_pixels.py::test_formats_whose_decoders_take_more_have_a_limit_of_their_own",
    ),
    Mutation(
        "what-stands-behind-rows-is-passed-over",
        "moe_dit/data/stored_png.py",
        'struct.pack(">I", len(data) - _BEFORE - _AFTER)',
        "data[33:37]",
        "tests/unit/test_pixels.py::test_odd_images_have_the_pixels_that_their_formats_define",
    ),
]


class Copy:
    """A copy of the project whose files are edited, and whose tests run on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        copy_project(folder)

    def apply(self, mutation: Mutation) -> bool:
        """Edit the file; False, and nothing done, where the text is not there exactly once."""
        file = self.folder / mutation.file
        content = file.read_text() if file.is_file() else ""
        if content.count(mutation.text) != 1:
            return False
        file.write_text(content.replace(mutation.text, mutation.replacement))
        return True

    def undo(self, mutation: Mutation) -> None:
        """Make the file what it is in the project."""
        shutil.copy2(ROOT / mutation.file, self.folder / mutation.file)

    def test(self, tests: list[str], limit: float | None = None) -> tuple[int | None, str]:
        """Run tests until one fails; gives pytest's exit status (None where it took too long) and its output."""
        # Bytecode is told by its source's size and second: an edit of equal length might not be seen.
        env = ENV | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        log = self.folder.with_suffix(".log")
        with open(log, "w") as output:
            how = {"cwd": self.folder, "env": env, "stdout": output, "stderr": output, "timeout": limit}
            try:
                done = forks.run(command, preload="libraries", **how)
            except subprocess.TimeoutExpired:
                return None, log.read_text()
        return done.returncode, log.read_text()


def judge(copy: Copy, mutation: Mutation) -> tuple[bool, str]:
    """Whether a mutation is noticed, and what became of it in a word or two."""
    if not copy.apply(mutation):
        return False, "text not found"
    status, output = copy.test([mutation.test], LIMIT)
    copy.undo(mutation)
    if status is None:
        return True, "killed (hung)"
    if status == 1:
        return True, "killed"
    # Any status but 0 means that no test ran, so that nothing is known.
    return False, "SURVIVED" if status == 0 else f"no test ran: {output.strip().splitlines()[-1]}"


def timed(copy: Copy, mutation: Mutation) -> tuple[bool, str, float]:
    """As :func:`judge`, with the seconds that it took."""
    began = time.monotonic()
    return *judge(copy, mutation), time.monotonic() - began


def chosen(names: list[str] | None) -> list[Mutation]:
    """The mutations of these names, or all."""
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in names or () if name not in known]:
        sys.exit(f"error: no mutation {', '.join(unknown)}; --list shows them")
    return [known[name] for name in names] if names else MUTATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations (default: all)")
    parser.add_argument("--list", action="store_true", help="show the mutations, and break nothing")
    args = parser.parse_args()
    mutations = chosen(args.only)
    if args.list:
        for mutation in mutations:
            console.print(f"{mutation.name}  {mutation.file}  {mutation.test}", markup=False, highlight=False)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(COPIES) as pool:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(COPIES):
            copies.put(Copy(Path(folder) / f"project{number}"))

        def on_a_copy(work, *arguments):
            copy = copies.get()
            try:
                return work(copy, *arguments)
            finally:
                copies.put(copy)

        # A test that fails anyhow would kill every mutation.
        tests = sorted({mutation.test for mutation in mutations})
        console.print(f"running the {len(tests)} tests without a mutation")
        parts = [part for i in range(COPIES) if (part := tests[i::COPIES])]
        for status, output in pool.map(partial(on_a_copy, Copy.test), parts):
            if status:
                sys.exit(f"error: without any mutation the tests must pass:\n{output[-3000:]}")
        table = Table("mutation", "file", "seconds", "", title="mutations")
        good = 0
        verdicts = pool.map(partial(on_a_copy, timed), mutations)
        for mutation, (killed, verdict, seconds) in zip(mutations, verdicts, strict=True):
            good += killed
            row = mutation.name, mutation.file, f"{seconds:.0f}", verdict
            console.print(*row, markup=False, highlight=False)
            table.add_row(*row)
    console.print(table)
    console.print(f"{good} of {len(mutations)} mutations are killed")
    sys.exit(good < len(mutations))


if __name__ == "__main__":
    main()
