"""Mutants of the library: small wrong versions of it, each with the fast tests that must notice.

`make mutants` applies one after the other, in memory, and runs the tests named beside it: every one of them must fail,
and the library as it is must pass them all. Names may follow: `python tests/mutants.py dynamic tree` runs those that
have one of the words in their name or module. Which module holds a mutant's text is found by search, whatever the
layout of either.
"""

import ast
import functools
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from anchors import find, nearest, tokens_of, written

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds, for one mutant


class Mutant(NamedTuple):
    "A wrong version of one module."

    name: str  # what is wrong
    old: str  # Python that the library has exactly once, in any layout; brackets may stay open
    new: str  # takes its place, in one line
    tests: str  # 'definitions::test_grid scoring::test_command': of tests/test_<file>.py, each must fail


_PIECES = "_DOT + _SIXTH + _GATES + _PLACES + _STEPS + _QUICK + _CONV + _DEEP + _MEAN + _REST + _TEAM"
_COMPILED = f"_CODE = {_PIECES}"


def _in_compiled(old, new):
    "Another text in the C++ of 28_native, which is a string there and no code."
    return f"_CODE = {_PIECES}\nassert {old!r} in _CODE\n_CODE = _CODE.replace({old!r}, {new!r})"


MUTANTS = [
    # Slide 'Quantization'
    Mutant(
        "the signed grid reaches one further down",
        "return -top, top",
        "return -2**(bits - 1), top",
        "definitions::test_grids_are_symmetric_or_from_zero_up",
    ),
    Mutant(
        "Qmax is a power of two",
        "top = max(2**(bits - 1) - 1, 1); return",
        "top = 2**(bits - 1); return",
        "definitions::test_grids_are_symmetric_or_from_zero_up definitions::test_rounds_half_to_even_and_clamps",
    ),
    Mutant(
        "the unsigned grid is half as long",
        "return 0, 2**bits - 1",
        "return 0, 2**(bits - 1) - 1",
        "definitions::test_grids_are_symmetric_or_from_zero_up definitions::test_rounds_half_to_even_and_clamps",
    ),
    Mutant(
        "integers are cut instead of rounded",
        "(x/scale).round().clamp(lo, hi)",
        "(x/scale).trunc().clamp(lo, hi)",
        "definitions::test_rounds_half_to_even_and_clamps",
    ),
    Mutant(
        "one signed bit is no sign",
        "return x.sign() if bits == 1 and signed else",
        "return",
        "definitions::test_rounds_half_to_even_and_clamps",
    ),
    Mutant(
        "the scale is the largest magnitude over Qmax",
        "a[rows] = new = torch.where(qq > 0, xq/qq.clamp(min=1), old)",
        "new = old",
        "definitions::test_the_scale_is_the_least_squares_one",
    ),
    Mutant(
        "the mean magnitude counts zeros",
        "(x != 0).sum(1).clamp(min=1)",
        "x.shape[1]",
        "definitions::test_one_signed_bit_has_the_mean_magnitude_of_what_is_not_zero",
    ),
    Mutant(
        "a scale a tensor where a channel was asked for",
        "len(t) if p == 'channel' else 1, -1",
        "1, -1",
        "definitions::test_a_scale_a_channel_or_a_tensor",
    ),
    Mutant(
        "gradients pass outside of the grid",
        "else round_ste(scaled.clamp(lo, hi))",
        "else scaled + (scaled.round().clamp(lo, hi) - scaled).detach()",
        "definitions::test_gradients_go_straight_through_inside_of_the_grid_only",
    ),
    Mutant(
        "rounding has no gradient",
        "return x + (x.round() - x).detach()",
        "return x.round()",
        "definitions::test_gradients_go_straight_through_inside_of_the_grid_only",
    ),
    # Slide 'Activation Quantization'
    Mutant(
        "gradients of activations pass outside of the grid",
        "inside = torch.ops.aten.hardtanh_backward(grad, v, lo, hi)",
        "inside = grad.clone()",
        "definitions::test_learned_scales_have_their_gradient_divided_by_the_root_of_n_times_qmax",
    ),
    Mutant(
        "the gradient of an activation's scale forgets n",
        "(max(x[0].numel(), 1)*",
        "(",
        "definitions::test_learned_scales_have_their_gradient_divided_by_the_root_of_n_times_qmax",
    ),
    Mutant(
        "the layer that sees the image is as narrow as the others",
        "first_bits if samples[n].first and",
        "widths[n] if samples[n].first and",
        "definitions::test_the_layer_that_sees_the_image_has_8_bits_and_a_sign",
    ),
    Mutant(
        "every activation has a sign",
        "return self.low < 0",
        "return self.low <= 0",
        "definitions::test_the_layer_that_sees_the_image_has_8_bits_and_a_sign",
    ),
    # Slide 'Weight Quantization'
    Mutant(
        "the gradient of a weight's scale forgets Qmax",
        "(w.numel()/still.numel()*grid(self.bits)[1])**-.5",
        "(w.numel()/still.numel())**-.5",
        "definitions::test_learned_scales_have_their_gradient_divided_by_the_root_of_n_times_qmax",
    ),
    Mutant(
        "the gradient of a weight's scale counts the weights of all kernels",
        "(w.numel()/still.numel()*grid",
        "(w.numel()*grid",
        "definitions::test_learned_scales_have_their_gradient_divided_by_the_root_of_n_times_qmax",
    ),
    Mutant(
        "5-4 of 7-5-4-3 changed places",
        "bits[2] if share[n] < shares[0] else bits[1]",
        "bits[1] if share[n] < shares[0] else bits[2]",
        "definitions::test_7_5_4_3",
    ),
    Mutant(
        "the largest layers have 4 bits",
        "bits[3] if share[n] < shares[1]",
        "bits[2] if share[n] < shares[1]",
        "definitions::test_7_5_4_3",
    ),
    Mutant(
        "the first layers are like the others",
        "dict.fromkeys(list(size)[:math.ceil(first*len(size) - 1e-9)], bits[0])",
        "{}",
        "definitions::test_7_5_4_3",
    ),
    Mutant(
        "'auto' is a scale a tensor everywhere",
        "'channel' if getattr(module, 'groups', 1) > 1",
        "'channel' if False",
        "definitions::test_a_scale_a_channel_or_a_tensor",
    ),
    Mutant(
        "scales are solved on what a mask hides, too",
        "for p in module.parametrizations.weight: w = w if",
        "for p in module.parametrizations.weight: w = w if True or",
        "definitions::test_what_a_mask_hides_has_no_say_in_the_scale_and_stays_zero",
    ),
    Mutant(
        "widths go beyond the storage budget",
        "np.ceil(rows.storage.to_numpy()",
        "np.floor(rows.storage.to_numpy()",
        "definitions::test_widths_keep_to_the_budget",
    ),
    Mutant(
        "the divergence of the bit table is turned round",
        "F.kl_div(_answers(net, images), clean,",
        "F.kl_div(clean, _answers(net, images),",
        "definitions::test_the_answers_of_the_whole_net_come_first_in_the_divergence",
    ),
    # Slide 'Pruning'
    Mutant(
        "dynamic pruning without its dense gradient",
        "magnitude_mask(dense_weight(layers[n]), r), method == 'dynamic')",
        "magnitude_mask(dense_weight(layers[n]), r), False)",
        "definitions::test_only_dynamic_pruning_gives_masked_weights_a_gradient "
        "recipe::test_what_training_does_to_masks_and_to_what_they_hide[dynamic]",
    ),
    Mutant(
        "dynamic pruning never renews its mask",
        "if self.renews(run.step): renew(",
        "if False: renew(",
        "definitions::test_when_each_method_renews_its_mask "
        "recipe::test_what_training_does_to_masks_and_to_what_they_hide[dynamic]",
    ),
    Mutant(
        "progressive pruning never renews its mask",
        "if self.method == 'progressive': renew(",
        "if False: renew(",
        "definitions::test_when_each_method_renews_its_mask "
        "recipe::test_what_training_does_to_masks_and_to_what_they_hide[progressive]",
    ),
    Mutant(
        "static pruning renews its mask",
        "if self.method == 'progressive': renew(",
        "if self.method != 'dynamic': renew(",
        "definitions::test_when_each_method_renews_its_mask "
        "recipe::test_what_training_does_to_masks_and_to_what_they_hide[static]",
    ),
    Mutant(
        "gradual pruning never renews its mask",
        "(run.step - 1)/last < self.ramp: renew(",
        "False: renew(",
        "definitions::test_when_each_method_renews_its_mask",
    ),
    Mutant(
        "masked weights drift",
        "w.copy_(torch.where(mask, w, old))",
        "pass",
        "definitions::test_masked_weights_stay_where_they_were "
        "recipe::test_what_training_does_to_masks_and_to_what_they_hide[static]",
    ),
    Mutant(
        "masked weights of dynamic pruning are held",
        "if self.method != 'dynamic': self.hidden",
        "if True: self.hidden",
        "definitions::test_masked_weights_of_dynamic_pruning_move "
        "recipe::test_what_training_does_to_masks_and_to_what_they_hide[dynamic]",
    ),
    Mutant(
        "the schedule is quadratic",
        "1.))**3 if self.ramp",
        "1.))**2 if self.ramp",
        "definitions::test_the_gradual_schedule_is_cubic",
    ),
    Mutant(
        "the schedule forgets where it starts",
        "r + (self.start.get(n, 0.) - r)*left",
        "r - r*left",
        "definitions::test_the_gradual_schedule_is_cubic",
    ),
    Mutant(
        "the most negative weights go",
        "weight.detach().abs().flatten().argsort",
        "weight.detach().flatten().argsort",
        "definitions::test_the_smallest_magnitudes_go",
    ),
    Mutant(
        "rates are rounded down",
        "order[:round(_fraction(rate)*len(order))]",
        "order[:int(_fraction(rate)*len(order))]",
        "definitions::test_the_smallest_magnitudes_go",
    ),
    Mutant(
        "momentum of masked weights stays",
        "v.masked_fill_(~mask.mask, 0.)",
        "pass",
        "definitions::test_momentum_of_masked_weights_is_forgotten",
    ),
    Mutant(
        "Erdos-Renyi without the kernel's sizes",
        "sum(s)/s.numel() for n, s in",
        "1/s.numel() for n, s in",
        "definitions::test_erdos_renyi_kernel",
    ),
    Mutant(
        "operations are weights",
        "macs = sum(every*times for",
        "macs = sum(every for",
        "definitions::test_sparsity_of_operations_counts_positions",
    ),
    Mutant(
        "the floor is for small layers",
        "if s*len(size) > sum(size.values())]",
        "if s*len(size) < sum(size.values())]",
        "definitions::test_large_layers_have_a_floor",
    ),
    Mutant(
        "operations are counted once a kernel",
        "times = [used.get(n, 0) for n in rows]",
        "times = [1 for n in rows]",
        "definitions::test_sparsity_of_operations_counts_positions",
    ),
    # Slide 'Knowledge Distillation'
    Mutant(
        "the temperature is not squared",
        "*temperature**2*",
        "*temperature*",
        "definitions::test_temperature_divides_the_logits_and_its_square_multiplies",
    ),
    Mutant(
        "student and teacher changed places",
        "if direction == DIRECTIONS[0]",
        "if direction == DIRECTIONS[1]",
        "definitions::test_divergence_of_student_and_teacher",
    ),
    Mutant(
        "the divergence is weighted by q",
        "log_p.exp()*(log_p - log_q)",
        "log_q.exp()*(log_p - log_q)",
        "definitions::test_divergence_of_student_and_teacher",
    ),
    Mutant(
        "the teacher's share does not shrink",
        "1 - hard if soft is None else soft",
        "1 if soft is None else soft",
        "definitions::test_labels_have_their_share",
    ),
    Mutant(
        "standardised logits keep their scale",
        "return z/z.square()",
        "return z if True else z/z.square()",
        "definitions::test_standardised_logits",
    ),
    Mutant(
        "the teacher's pixels are not shifted",
        "x*self.scale + self.shift",
        "x*self.scale",
        "definitions::test_the_teacher_sees_its_own_normalisation",
    ),
    # Slides 'MicroNet Challenge', 'Scoring'
    Mutant("another baseline of operations", "10.49e9", "10.59e9", "definitions::test_baselines"),
    Mutant(
        "another baseline of storage",
        "'imagenet': (6.9e6,",
        "'imagenet': (6.8e6,",
        "definitions::test_baselines",
    ),
    Mutant("the tree does not widen", "n//2*(l + level)", "n//2*l", "definitions::test_tree_adder"),
    Mutant(
        "the tree drops odd ones",
        "n, level = (n + 1)//2, level + 1",
        "n, level = n//2, level + 1",
        "definitions::test_tree_adder",
    ),
    Mutant(
        "the integer adder has floor(log2 n) levels",
        "return l + math.ceil(math.log2(",
        "return l + math.floor(math.log2(",
        "definitions::test_other_adders",
    ),
    Mutant(
        "the FP16 adder is charged as FP32",
        "{'fp16': 16, 'fp32': 32}.get(adder)",
        "{'fp16': 32, 'fp32': 32}.get(adder)",
        "definitions::test_other_adders",
    ),
    Mutant(
        "adds are one a weight",
        "(n.to(torch.int64) - 1).clamp(min=empty)",
        "n.to(torch.int64).clamp(min=empty)",
        "definitions::test_other_adders",
    ),
    Mutant(
        "float adds of dense kernels",
        "return nnz/(C*K)*C*(K - 1)",
        "return C*(K - 1)",
        "definitions::test_other_adders",
    ),
    Mutant(
        "RIAIR's CIFAR-100 adder is one bit short",
        "(2**(ba - 1) - 1)*K)) + 1",
        "(2**(ba - 1) - 1)*K))",
        "definitions::test_other_adders",
    ),
    Mutant(
        "bitmasks are free",
        "masked = N + nnz*bits",
        "masked = nnz*bits",
        "definitions::test_bitmasks_are_charged definitions::test_a_layer_by_the_official_rules",
    ),
    Mutant(
        "official rules with a mask that does not pay",
        "min(masked, N*bits))/32",
        "masked)/32",
        "definitions::test_bitmasks_are_charged",
    ),
    Mutant(
        "a signed product is as wide as an unsigned one",
        "bw + ba - bool(signed)",
        "bw + ba",
        "definitions::test_a_layer_by_the_official_rules",
    ),
    Mutant(
        "a product is as wide as its narrow factor",
        "wide = max(bw, ba)",
        "wide = min(bw, ba)",
        "definitions::test_a_layer_by_the_official_rules",
    ),
    Mutant(
        "scales are stored once a layer",
        "(C + bias*C)/2",
        "(1 + bias*C)/2",
        "definitions::test_a_layer_by_the_official_rules",
    ),
    Mutant(
        "the winner's quantisers are free",
        "node.in_elements/2, storage=",
        "0, storage=",
        "definitions::test_a_layer_as_its_winner_counted",
    ),
    Mutant(
        "a pool of k adds k",
        "(k[0] - 1).clamp(min=0)",
        "k[0].clamp(min=0)",
        "definitions::test_pools_and_pointwise_work",
    ),
    Mutant("relu is free", "'relu': (1, 0)", "'relu': (0, 0)", "definitions::test_pools_and_pointwise_work"),
    Mutant(
        "the slip of the pools is mended where it was not asked for",
        "if c.cifar and not c.corrected: k =",
        "if False: k =",
        "definitions::test_pools_and_pointwise_work",
    ),
    Mutant(
        "the image is as narrow as activations",
        "first if s is None else few",
        "few",
        "definitions::test_a_released_schedule_says_bits_and_signs",
    ),
    Mutant(
        "a weight is stored each time that it is used",
        "taken.fill_(True)",
        "",
        "definitions::test_what_is_stored_is_its_elements_once",
    ),
    Mutant(
        "a view is stored as large as it looks",
        "storage=n*bits/32, shape=tuple(t.shape)",
        "storage=t.numel()*bits/32, shape=tuple(t.shape)",
        "definitions::test_what_is_stored_is_its_elements_once",
    ),
    Mutant(
        "norms fold wherever they stand",
        "if not (layers := _behind(value)): return []",
        "if not (layers := _behind(value)): return [value]",
        "definitions::test_a_norm_that_folds_nowhere_is_stored_and_computed",
    ),
    Mutant(
        "windows of adaptive pools do not overlap",
        "((i + 1)*size + out - 1)//out - i*size//out",
        "(i + 1)*size//out - i*size//out",
        "definitions::test_pools_add_up_what_lies_in_their_windows",
    ),
    Mutant(
        "a made weight is a vector",
        "met*math.prod(a['weight'].shape[1:])",
        "met",
        "definitions::test_a_convolution_with_made_weights_is_a_product",
    ),
    Mutant(
        "a width survives float work",
        "dict.fromkeys(MAXIMA - {'argmax', 'argmin'}, _stays)",
        "dict.fromkeys(MAXIMA | AVERAGES, _stays)",
        "definitions::test_only_what_stays_on_the_grid_stays_narrow[mean]",
    ),
    Mutant(
        "a width is lost where values are only moved",
        "def _stays(node, v): return v",
        "def _stays(node, v): return None",
        "definitions::test_only_what_stays_on_the_grid_stays_narrow[max]",
    ),
    # Slide 'Robust Analysis'
    Mutant(
        "plans of rates fall short of their budget",
        ">= budget*total*(1 - 1e-12)",
        ">= .9*budget*total",
        "definitions::test_a_plan_buys_the_cheapest_pieces_up_to_its_budget",
    ),
    Mutant(
        "plans of widths pass their budget",
        "<= budget*total*(1 + 1e-12)",
        "<= 1.5*budget*total",
        "definitions::test_a_plan_of_widths_keeps_to_the_mean",
    ),
    Mutant(
        "the dearest pieces are bought first",
        "return sorted(pieces, key=lambda p: p[0])",
        "return sorted(pieces, key=lambda p: -p[0])",
        "definitions::test_a_plan_buys_the_cheapest_pieces_up_to_its_budget "
        "definitions::test_a_plan_of_widths_keeps_to_the_mean",
    ),
    Mutant(
        "the harm of a layer is its loss",
        "more = loss - clean[0]",
        "more = loss",
        "definitions::test_harm_is_beside_the_intact_net",
    ),
    Mutant(
        "weights are pruned by nothing",
        "return weight*magnitude_mask(weight, level)",
        "return weight",
        "definitions::test_degraded_weights",
    ),
    # nets, and what was released
    Mutant(
        "the round trip to 8 bits rounds",
        "+ mean)*255).to(torch.uint8)",
        "+ mean)*255).round().to(torch.uint8)",
        "definitions::test_the_8_bit_round_trip_drops_some_values_by_one",
    ),
    Mutant(
        "the round trip to 8 bits is one off",
        "+ mean)*255).to(torch.uint8)",
        "+ mean)*255 + 1).to(torch.uint8)",
        "definitions::test_the_8_bit_round_trip_drops_some_values_by_one",
    ),
    Mutant(
        "the released net's pixels are not divided by 255 again",
        "*(1/255) - mean)/std)/255",
        "*(1/255) - mean)/std)",
        "definitions::test_pixels_as_the_released_net_wants_them",
    ),
    Mutant(
        "DenseNet starts with half the channels",
        "nn.Conv2d(3, 2*growth, 3",
        "nn.Conv2d(3, growth, 3",
        "definitions::test_nets_have_the_published_sizes",
    ),
    Mutant(
        "every block has a shortcut",
        "if stride > 1 or cin != cout else None",
        "if True else None",
        "definitions::test_nets_have_the_published_sizes",
    ),
    # records, stages, proofs
    Mutant(
        "the dirty mark is never set",
        "('+' if",
        "('' if",
        "records::test_a_commit_has_a_plus_where_sources_differ_from_it",
    ),
    Mutant(
        "the column of 'paper' is filled from 'laptop'",
        "{p: load_record(name, p) for",
        "{p: load_record(name, 'laptop') for",
        "records::test_each_column_is_of_its_own_profile",
    ),
    Mutant(
        "records lose their configuration",
        "config=config, seed=seed",
        "config={}, seed=seed",
        "records::test_a_record_holds_all_that_it_was_given",
    ),
    Mutant(
        "records lose their seed",
        "config=config, seed=seed",
        "config=config, seed=None",
        "records::test_a_record_holds_all_that_it_was_given",
    ),
    Mutant(
        "a stage does not depend on what it builds on",
        "json.dumps([config, list(upstream)",
        "json.dumps([config, []",
        "records::test_a_stage_is_found_by_its_configuration_and_by_what_it_builds_on",
    ),
    Mutant(
        "outputs of notebooks make a commit dirty",
        "return [(c['cell_type'], ''.join(c['source']), c['metadata'].get('tags')) for c in",
        "return text and [c for c in",
        "records::test_outputs_of_a_notebook_leave_a_commit_clean",
    ),
    Mutant(
        "a stage does not say who made it",
        "made=_summary(pieces)",
        "made=None",
        "records::test_a_record_quotes_who_made_its_stages",
    ),
    Mutant(
        "a record says nothing of its stages",
        "stages=_provenance_of(stages)",
        "stages={}",
        "records::test_a_record_quotes_who_made_its_stages",
    ),
    Mutant(
        "the code of a stage may change unnoticed",
        "[version] if version != 1 else []",
        "",
        "records::test_another_version_of_its_code_is_another_stage",
    ),
    Mutant(
        "files are written where they are",
        "yield tmp",
        "yield path; tmp.touch()",
        "records::test_a_file_is_whole_or_as_it_was",
    ),
    Mutant(
        "any file of the right name will do",
        "if (got := sha256(path)) != digest:",
        "if False and (got := sha256(path)) != digest:",
        "records::test_another_file_under_the_right_name_is_refused",
    ),
    Mutant(
        "an older result proves a run",
        "and result.get('run') == key else None",
        "else None",
        "records::test_a_result_proves_the_run_that_it_belongs_to",
    ),
    Mutant(
        "a result that is not done proves a run",
        "result if result.get('status') == 'done' and",
        "result if",
        "records::test_a_result_proves_the_run_that_it_belongs_to",
    ),
    Mutant(
        "other parameters find the old result",
        "json.dumps([cells, parameters, library, shown]",
        "json.dumps([cells, library, shown]",
        "records::test_the_key_of_a_run_holds_cells_parameters_and_library",
    ),
    Mutant(
        "outputs of other cells are kept",
        "or _source(ran[c['id']]) != _source(c):",
        "or False:",
        "records::test_records_are_kept_only_from_the_cells_that_ran",
    ),
    # data and training
    Mutant(
        "validation and test images depend on each other",
        "f'{salt} {k}'.encode()",
        "f'{k}'.encode()",
        "data::test_held_out_does_not_depend_on_the_order_of_files data::test_digits_are_the_same_for_ever",
    ),
    Mutant(
        "a tenth is rounded down",
        "(len(members) + one_in//2)//one_in",
        "len(members)//one_in",
        "data::test_digits_are_the_same_for_ever",
    ),
    Mutant(
        "pixels are not centred",
        "return (images.float()/255 - mean)/std",
        "return (images.float()/255)/std",
        "recipe::test_pixels_lose_their_mean_and_are_divided_by_their_deviation",
    ),
    Mutant(
        "the deviation is a variance",
        "(n*q - s*s)**.5/(255*n)",
        "(n*q - s*s)/(255*n)**2",
        "recipe::test_statistics_of_two_values data::test_statistics_are_exact",
    ),
    Mutant(
        "training multiplies by the deviation",
        "return (x - mean)/std",
        "return (x - mean)*std",
        "recipe::test_pixels_lose_their_mean_and_are_divided_by_their_deviation",
    ),
    Mutant(
        "crops reach a quarter of the side",
        "max(1, images.shape[-1]//8)",
        "max(1, images.shape[-1]//4)",
        "recipe::test_crops_reach_an_eighth_of_the_side_and_half_are_mirrored",
    ),
    Mutant(
        "crops never reach the last place",
        "torch.randint(0, 2*pad + 1,",
        "torch.randint(0, 2*pad + (pad == 0),",
        "recipe::test_crops_reach_an_eighth_of_the_side_and_half_are_mirrored",
    ),
    Mutant(
        "nothing is mirrored",
        "(.5 if flip else 0.)",
        "0.",
        "recipe::test_crops_reach_an_eighth_of_the_side_and_half_are_mirrored",
    ),
    Mutant(
        "every epoch has the same order",
        "generator=_generator('cpu', config.seed, epoch)",
        "generator=_generator('cpu', config.seed)",
        "recipe::test_each_epoch_and_seed_has_an_order_of_its_own",
    ),
    Mutant(
        "a resumed epoch begins its chunk again",
        "for i in range(max(first, skip), last)",
        "for i in range(first, last)",
        "recipe::test_a_resumed_epoch_goes_on_with_the_batches_that_are_left "
        "recipe::test_a_run_that_was_broken_off_ends_as_if_it_had_not_been[3]",
    ),
    Mutant(
        "a resumed run has lost its momentum",
        "run.optimizer.load_state_dict(",
        "str(",
        "recipe::test_a_run_that_was_broken_off_ends_as_if_it_had_not_been",
    ),
    Mutant(
        "a resumed run has lost its average",
        "if run.ema: _load_model(run.ema.module,",
        "if False: _load_model(run.ema.module,",
        "recipe::test_a_run_that_was_broken_off_ends_as_if_it_had_not_been",
    ),
    Mutant(
        "momentum is not Nesterov's",
        "'sgd' if c.momentum else",
        "'momentum' if c.momentum else",
        "recipe::test_a_step_is_nesterovs_with_decay_on_all_parameters",
    ),
    Mutant(
        "vectors do not decay",
        "filter_bias_and_bn=False",
        "filter_bias_and_bn=True",
        "recipe::test_a_step_is_nesterovs_with_decay_on_all_parameters",
    ),
    Mutant(
        "the rate stays where it was",
        "run.step += 1; _set_lr(run, run.step)",
        "run.step += 1",
        "recipe::test_the_rate_climbs_and_falls_as_half_a_cosine",
    ),
    Mutant(
        "the last weights are kept, not the average",
        "_kept_state(run.ema.module if run.ema else run.model, half)",
        "_kept_state(run.model, half)",
        "recipe::test_the_average_is_what_is_measured_and_kept",
    ),
    Mutant(
        "soft labels are smoothed again",
        "config.label_smoothing if target.dim() == 1 else 0.",
        "config.label_smoothing",
        "recipe::test_labels_are_smoothed_and_soft_ones_are_not",
    ),
    Mutant(
        "nets are evaluated as they come",
        "yield model.eval() if modes",
        "yield model if modes",
        "recipe::test_nets_are_evaluated_in_evaluation_mode",
    ),
    Mutant(
        "evaluation leaves a net in its mode",
        "modes = {m: m.training for m in model.modules()}",
        "modes = {}",
        "recipe::test_nets_are_evaluated_in_evaluation_mode",
    ),
    Mutant(
        "the teacher trains",
        "_place(run.teacher, run.device, c).eval()",
        "_place(run.teacher, run.device, c).train()",
        "recipe::test_the_teacher_is_in_evaluation_mode",
    ),
    Mutant(
        "the last batch is left out",
        "for i in range(0, n, batch_size):",
        "for i in range(0, n - n % batch_size, batch_size):",
        "recipe::test_accuracy_is_the_share_of_right_answers recipe::test_nets_are_evaluated_in_evaluation_mode",
    ),
    Mutant(
        "studies are validated on test images",
        "for split in ('train', 'valid', 'test'))",
        "for split in ('train', 'test', 'test'))",
        "recipe::test_studies_train_validate_and_test_on_different_images",
    ),
    Mutant(
        "the whole is the test split",
        "load_dataset(train.name, 'trainvalid')",
        "load_dataset(train.name, 'test')",
        "recipe::test_studies_train_validate_and_test_on_different_images",
    ),
    Mutant(
        "seeds do not reach the steps",
        "replace(s, fit=replace(s.fit, seed=n))",
        "replace(s, fit=replace(s.fit, seed=0))",
        "recipe::test_a_seed_reaches_every_step",
    ),
    Mutant(
        "batch norms are not still",
        "and m.training: m.eval()",
        "and False: m.eval()",
        "recipe::test_still_batch_norms_learn_nothing",
    ),
    Mutant(
        "the bar is passed by less",
        "BAR = 37_500, 50_000",
        "BAR = 37_400, 50_000",
        "recipe::test_the_bar_of_the_challenge imagenet::test_bar_is_a_count",
    ),
    # trained nets on real images
    Mutant(
        "the images that judge have calibrated",
        "'judge': slice(1, None, 2)",
        "'judge': slice(0, None, 2)",
        "data::test_sample_has_two_halves_and_the_right_labels imagenet::test_images_that_calibrate_do_not_judge",
    ),
    Mutant(
        "validation images that calibrate judge, too",
        "calibrate, judge = _halves(judge)",
        "calibrate = _halves(judge)[0]",
        "imagenet::test_images_that_calibrate_do_not_judge",
    ),
    Mutant(
        "a missing class shifts the labels of the sample",
        "sorted({*wanted} - {*found}) or",
        "",
        "data::test_sample_that_is_not_whole_is_named",
    ),
    Mutant(
        "tensors of other shapes are filled in",
        "if [v.shape for v in ours.values()] != [v.shape for v in theirs.values()]:",
        "if len(ours) != len(theirs):",
        "published::test_lite_of_other_tensors_is_refused",
    ),
    Mutant(
        "the package's file may be another",
        "if (got := hashlib.sha256(data).hexdigest()) != entry['sha256']:",
        "if (got := hashlib.sha256(data).hexdigest()) == '':",
        "published::test_lite_of_another_file_is_never_opened",
    ),
    # deployment
    Mutant(
        "a quantiser's unsigned range ends half way",
        "max(2**(bits - signed) - 1, 1)",
        "max(2**(bits - 1) - 1, 1)",
        "integers::test_quantisers_round_half_to_even_and_clamp",
    ),
    Mutant(
        "a quantiser's signed range begins at 0",
        "return -self.top if self.signed else self.low",
        "return self.low",
        "integers::test_quantisers_round_half_to_even_and_clamp",
    ),
    Mutant(
        "integers may be one too large",
        "w.max() > max(2**(bits - 1) - 1, 1)",
        "w.max() > 2**(bits - 1)",
        "integers::test_integers_fit_their_bits",
    ),
    Mutant(
        "the bias is lost in folding",
        "self.bias*scale + bias, name or self.name",
        "bias, name or self.name",
        "integers::test_biases_and_norms_are_folded_in",
    ),
    Mutant(
        "a float layer's bias is lost in folding",
        "(0 if layer.bias is None else scale*layer.bias.data)",
        "0",
        "integers::test_biases_and_norms_are_folded_in",
    ),
    Mutant(
        "norms are folded without their eps",
        "(a['running_var'] + a['eps']).sqrt()",
        "a['running_var'].sqrt()",
        "integers::test_biases_and_norms_are_folded_in",
    ),
    Mutant(
        "norms are folded without their mean",
        "beta - mean*scale",
        "beta",
        "integers::test_biases_and_norms_are_folded_in",
    ),
    Mutant(
        "nobody looks whether a lowering is right",
        "if not off <= 1e-6*float(expected",
        "if False and not off <= 1e-6*float(expected",
        "integers::test_a_lowering_that_computes_something_else_is_refused",
    ),
    Mutant(
        "sums overflow",
        "if most < 2**31 else",
        "if most < 2**63 else",
        "integers::test_integer_sums_do_not_overflow",
    ),
    Mutant(
        "a register is one bit short",
        "return 1 + max(int(high).bit_length()",
        "return max(int(high).bit_length()",
        "integers::test_registers_and_ranges",
    ),
    Mutant(
        "the sign of inputs is forgotten in ranges",
        "return neg*q.top + pos*q.bottom, pos*q.top + neg*q.bottom",
        "return neg*q.top, pos*q.top",
        "integers::test_registers_and_ranges",
    ),
    Mutant(
        "the runner does not clamp below",
        "narrow(y.clamp_(self.quantise.bottom, self.quantise.top)",
        "narrow(y.clamp_(max=self.quantise.top)",
        "integers::test_bytes_are_clamped_at_both_ends",
    ),
    Mutant(
        "the runner does not clamp above",
        "torch.clamp(self.scaled(x, f), self.low, self.top, out=f)",
        "torch.clamp(self.scaled(x, f), self.low, 255, out=f)",
        "integers::test_bytes_are_clamped_at_both_ends",
    ),
    Mutant(
        "the runner forgets biases",
        "torch.mul(x, self.scale, out=f).add_(self.bias)",
        "torch.mul(x, self.scale, out=f)",
        "integers::test_bytes_are_clamped_at_both_ends runtime::test_a_net_made_by_hand",
    ),
    Mutant(
        "infinities are compared by subtraction",
        "torch.where(got.double() == want, 0.0, (got.double() - want).abs())",
        "(got.double() - want).abs()",
        "lowering::test_a_border_of_minus_infinity",
    ),
    # Runner
    Mutant(
        "bytes are not counted from the lowest",
        "return codes.sub_(low % 256) if low else codes",
        "return codes",
        "runtime::test_bytes_are_rounded_half_to_even_and_counted_from_the_lowest "
        "runtime::test_inputs_with_a_sign_or_a_lower_end_of_their_own",
    ),
    Mutant(
        "a relu is left out before any window",
        "or relu and module_of(graph, q).bottom",
        "",
        "runtime::test_a_relu_before_a_window_that_begins_below_0",
    ),
    Mutant(
        "other readers take bytes as they are",
        "as_floats(v, lows[n])",
        "as_floats(v)",
        "runtime::test_bytes_that_others_read_too",
    ),
    Mutant(
        "pieces of a concatenation are bytes as they are",
        "buffer.put(as_floats(value, task.low), place)",
        "buffer.put(as_floats(value), place)",
        "runtime::test_bytes_that_others_read_too",
    ),
    Mutant(
        "a result is bytes as they are",
        "as_floats(values[self.output], low_of(self.graph, self.output))",
        "as_floats(values[self.output])",
        "runtime::test_bytes_that_others_read_too",
    ),
    Mutant(
        "sums that the graph rounds go to the units",
        "(2**31 if m.wide else 2**24 + 1)",
        "2**31",
        "runtime::test_sums_that_the_graph_itself_rounds_stay_with_it",
    ),
    Mutant(
        "units that are wrong for a shape are used there",
        "return packed if torch.equal(self.on_units(x, packed), self.plain(x)) else None",
        "return packed",
        "runtime::test_units_that_are_wrong_for_one_shape_are_left_alone_there",
    ),
    Mutant(
        "the slowest way is taken",
        "task.run = task.ways[chosen := min(",
        "task.run = task.ways[chosen := max(",
        "runtime::test_the_fastest_way_is_taken_and_told",
    ),
    Mutant(
        "registers wrap one too far",
        ".remainder(2**bits) - 2**(bits - 1)",
        ".remainder(2**bits) - 2**(bits - 1) + 1",
        "integers::test_adders_add_as_their_registers_do",
    ),
    Mutant(
        "saturation is symmetric",
        "x.clamp(-(2**(bits - 1)), 2**(bits - 1) - 1)",
        "x.clamp(1 - 2**(bits - 1), 2**(bits - 1) - 1)",
        "integers::test_adders_add_as_their_registers_do",
    ),
    Mutant(
        "FP16 adders do not round",
        "return x.half().to(x.dtype)",
        "return x",
        "integers::test_adders_add_as_their_registers_do",
    ),
    Mutant(
        "the tree is floor(log2 n) high",
        "l + math.ceil(math.log2(max(int(n), 1))) for n in N]",
        "l + math.floor(math.log2(max(int(n), 1))) for n in N]",
        "integers::test_the_tree_is_as_wide_as_its_levels_need",
    ),
    # files
    Mutant(
        "the mask comes behind the values",
        "np.concatenate([mask, to_bits(kept, bits)])",
        "np.concatenate([to_bits(kept, bits), mask])",
        "integers::test_bits_of_a_packed_tensor",
    ),
    Mutant(
        "the lowest bit comes first",
        "np.arange(bits - 1, -1, -1, dtype=np.int16)",
        "np.arange(bits, dtype=np.int16)",
        "integers::test_bits_of_a_packed_tensor",
    ),
    Mutant(
        "values are read as unsigned",
        "powers[0] *= -1",
        "pass",
        "integers::test_a_packed_tensor_is_read_from_its_bits",
    ),
    Mutant(
        "a bit is lost between mask and values",
        "np.unpackbits(part)[start % 8:]",
        "np.unpackbits(part)",
        "integers::test_a_packed_tensor_is_read_from_its_bits",
    ),
    Mutant(
        "every scale is halved",
        "torch.equal(tensor.half().to(tensor.dtype), tensor)",
        "True",
        "integers::test_numbers_are_halved_only_where_nothing_is_lost",
    ),
    Mutant(
        "damaged files are read",
        "_BLANK.encode(), 1)).hexdigest() != digest:",
        "_BLANK.encode(), 1)).hexdigest() == '':",
        "integers::test_a_file_with_one_other_bit_is_refused",
    ),
    Mutant(
        "a file's widths are not those of its values",
        "_check_weight(block, module.weight_bits, name)",
        "pass",
        "strangers::test_one_bit_with_the_values_unchanged",
    ),
    Mutant(
        "any form that can be read will do",
        "if form not in forms:",
        "if False:",
        "strangers::test_a_scale_in_32_bits_that_16_would_hold",
    ),
    Mutant(
        "a mask may call zeros nonzero",
        "if masked and bool((values == 0).any()):",
        "if False:",
        "strangers::test_a_mask_that_calls_zeros_nonzero",
    ),
    Mutant(
        "scales of a file may be NaN",
        "_check_finite(block, name, 'read')",
        "pass",
        "strangers::test_scales_that_are_no_numbers",
    ),
    Mutant(
        "arguments of modules are not looked at",
        "check_arguments(cls, args)",
        "pass",
        "strangers::test_a_module_on_a_device_of_the_file",
    ),
    Mutant(
        "ONNX quantisers have a zero point of 1",
        "zero = e.constant(-m.low, kind)",
        "zero = e.constant(1 - m.low, kind)",
        "integers::test_an_onnx_quantiser_gives_the_same_integers",
    ),
    Mutant(
        "ONNX quantisers clamp signed numbers at 0",
        "float(m.bottom), float(m.top)",
        "0., float(m.top)",
        "integers::test_an_onnx_quantiser_gives_the_same_integers",
    ),
    Mutant(
        "numbers of a tensor changed places",
        "numpy_helper.from_array(codes, name)",
        "numpy_helper.from_array(np.flip(codes), name)",
        "integers::test_integers_of_an_onnx_file",
    ),
    Mutant(
        "3 bits go into 4",
        "{1: 2, 2: 2, 4: 4}.get(bits,",
        "{1: 2, 2: 2, 3: 4, 4: 4}.get(bits,",
        "integers::test_integers_of_an_onnx_file",
    ),
    # compression without training
    Mutant(
        "the columns that are left make nothing good",
        "w[:, :, j + 1:stop] -= errors[:, :, j - start, None]*u[:, j, None, j + 1:stop]",
        "pass",
        "compressing::test_one_pass_is_what_a_plain_loop_gives",
    ),
    Mutant(
        "later blocks of columns are told nothing",
        "w[:, :, stop:] -= errors @ u[:, start:stop, stop:]",
        "pass",
        "compressing::test_blocks_of_columns_change_nothing",
    ),
    Mutant(
        "a weight moves as if it stood alone",
        "push[:, :, start:stop] += move*h[:, j, None, start:stop]",
        "pass",
        "compressing::test_no_turn_makes_it_worse_and_the_end_is_a_minimum",
    ),
    Mutant(
        "second moments are not centred",
        "self.square/self.n - mean[:, :, None]*mean[:, None]",
        "self.square/self.n + 0*mean[:, :, None]*mean[:, None] + self.origin@self.origin.mT",
        "compressing::test_moments_are_those_of_numpy_however_far_from_zero",
    ),
    Mutant(
        "second moments are counted from zero",
        "x, original = x - self.origin, original - self.origin_original",
        "self.origin, self.origin_original = 0*self.origin, 0*self.origin_original",
        "compressing::test_moments_are_those_of_numpy_however_far_from_zero",
    ),
    Mutant(
        "the mean of a layer's outputs moves with its weights",
        "_shift(module, running_mean, by); return by",
        "return by",
        "compressing::test_means_of_outputs_stay_and_nothing_is_left_behind",
    ),
    Mutant(
        "a layer is solved for the inputs of the original",
        "moments.add(*(columns(**call).cpu() for call in calls))",
        "moments.add(*(columns(**calls[1]).cpu() for call in calls))",
        "compressing::test_a_layer_sees_what_those_before_it_give",
    ),
    Mutant(
        "a pruned weight may come back",
        "return torch.where(self.keep[:, :, columns], q, 0.0)",
        "return q",
        "compressing::test_every_method_stays_on_the_grid_and_keeps_zeros",
    ),
    Mutant(
        "threads of walks stay behind",
        "if self.thread.is_alive()",
        "if False",
        "compressing::test_a_net_that_chooses_its_way_is_refused_and_its_threads_end",
    ),
    Mutant(
        "a budget is not mended by what came out",
        "t.attrs['rest'] = got - float(plan.cost.sum())  # what the plan knows nothing of",
        "pass",
        "compressing::test_budgets_mend_the_price_that_a_plan_knows_nothing_of",
    ),
    Mutant(
        "a norm's running mean is left where it was",
        "multiply(mean, 1/into)",
        "pass",
        "compressing::test_an_equalised_net_answers_the_same",
    ),
    Mutant(
        "the parts of a sum have scales of their own",
        "self.channels.join(*torch.broadcast_tensors(_compact(a), _compact(b)))",
        "pass",
        "compressing::test_an_equalised_net_answers_the_same",
    ),
    Mutant(
        "a layer that is used twice gets new channels",
        "self.channels.join(part.inputs, entering)",
        "pass",
        "compressing::test_an_equalised_net_answers_the_same",
    ),
    Mutant(
        "h-swish is taken for a ReLU",
        "_PROPORTIONAL = {'relu',",
        "_PROPORTIONAL = {'relu', 'hardswish',",
        "compressing::test_what_lets_no_scale_through_ends_it[hardswish]",
    ),
    Mutant(
        "channels that come near a clip are scaled",
        "most[root] > clips",
        "most[root] > 1e9",
        "compressing::test_below_a_clip_a_share_of_it_is_left",
    ),
    Mutant(
        "clips are not minded by how loud a channel becomes",
        "new *= (self.least[ids]/new).max()",
        "pass",
        "compressing::test_below_a_clip_a_share_of_it_is_left",
    ),
    Mutant(
        "a weight that serves for something else is scaled",
        "if part is not mine:",
        "if False:",
        "compressing::test_a_weight_that_serves_twice_stays[bias]",
    ),
    Mutant(
        "a block ends where two tensors are alive",
        "if live == {n}:",
        "if n in live:",
        "compressing::test_blocks_end_where_one_tensor_carries_everything",
    ),
    Mutant(
        "what is learned is kept even where it is worse",
        "if not self.error() < before:",
        "if False:",
        "compressing::test_a_block_is_learned_and_nothing_else_is_touched",
    ),
    Mutant(
        "a mask is lost while a block is learned",
        "return torch.where(self.keep, q, 0.0)",
        "return q",
        "compressing::test_a_block_is_learned_and_nothing_else_is_touched",
    ),
    Mutant(
        "a plan is not mended by what its choices do together",
        "            table[kind] *= min(",
        "            table[kind] += 0 * min(",
        "compressing::test_plans_are_mended_by_what_choices_do_together",
    ),
    Mutant(
        "a layer alone keeps the other weights afterwards",
        "if weight is not None: module.weight.data = was; for hook in hooks",
        "for hook in hooks",
        "compressing::test_alone_is_what_the_whole_net_gives",
    ),
    Mutant(
        "a budget is measured with another adder",
        "s = score(made.graph, tuple(self.judged.shape[1:]), **self.scoring)",
        "s = score(made.graph, tuple(self.judged.shape[1:]), self.scoring['track'])",
        "compressing::test_options_count_in_what_is_measured",
    ),
    Mutant(
        "the image has 8 bits whatever is asked",
        "plan.input_bits.astype(int).to_dict(), first_bits=None, affine=True",
        "plan.input_bits.astype(int).to_dict(), first_bits=8, affine=True",
        "compressing::test_options_count_in_what_is_measured",
    ),
    Mutant(
        "a packed file holds any number of modules",
        "if len(names) > MOST_MODULES:",
        "if False:",
        "strangers::test_a_crowd_of_modules",
    ),
    Mutant(
        "a packed file holds any float",
        "return math.isinf(value) or abs(value) <= torch.finfo(torch.float32).max",
        "return True",
        "strangers::test_numbers_that_float32_does_not_hold",
    ),
    Mutant(
        "lost answers count as gained",
        "difference = (gained - lost)/n",
        "difference = (gained + lost)/n",
        "compressing::test_labels_are_counted_and_intervals_known",
    ),
    # nets and loaders from elsewhere
    Mutant(
        "a loader is read anew for every row of a table",
        "net, images = copy.deepcopy(model).eval(), list(input_batches(images))",
        "net = copy.deepcopy(model).eval()",
        "own_nets::test_tables_read_a_loader_once",
    ),
    Mutant(
        "NaN among images is passed on",
        "if not bool(finite.all()):",
        "if False:",
        "own_nets::test_what_is_no_image_is_refused_with_its_place own_nets::test_norms_stay_where_the_estimate_fails",
    ),
    Mutant(
        "batch norms average with their momentum",
        "m.momentum, m.training = None, True",
        "m.training = True",
        "own_nets::test_norms_are_those_of_torch_and_modes_and_momenta_stay",
    ),
    Mutant(
        "batch norms are estimated under dropout",
        "m.momentum, m.training = None, True",
        "m.momentum = None; net.train()",
        "own_nets::test_norms_see_the_net_without_its_dice",
    ),
    Mutant(
        "a check works on the net itself",
        "copied = copy.deepcopy(getattr(net, '_orig_mod', net))",
        "copied = getattr(net, '_orig_mod', net)",
        "own_nets::test_all_that_is_refused_is_told_at_once_and_the_net_stays",
    ),
    Mutant(
        "a check stops at the first operation that the scorer does not know",
        "unknown = unknown_operations(net, size)",
        "unknown = []",
        "own_nets::test_all_that_is_refused_is_told_at_once_and_the_net_stays",
    ),
    Mutant(
        "a survey of what lower refuses forgets the rules",
        "except MicronetError as e: refused.append(str(e)) except Exception:",
        "except Exception:",
        "own_nets::test_all_that_is_refused_is_told_at_once_and_the_net_stays",
    ),
    Mutant(
        "a net's file is not checked",
        "if checksum != digest:",
        "if checksum == 0:",
        "own_nets::test_a_damaged_file_is_refused",
    ),
    Mutant(
        "parameters of a loaded net have another order",
        "held[child] = held.pop(child)",
        "pass",
        "own_nets::test_a_fresh_net_gets_all_and_goes_on_as_the_other",
    ),
    Mutant(
        "a loaded net trains what was frozen",
        "p.requires_grad_(n not in frozen)",
        "p.requires_grad_(True)",
        "own_nets::test_a_fresh_net_gets_all_and_goes_on_as_the_other",
    ),
    # Operations between the integer layers: docs/OPERATIONS.md
    Mutant(
        "the batch is taken to be in front",
        "return grows[0]",
        "return 0",
        "operations::test_a_net_may_go_on_without_its_batch_in_front_and_with_another_batch",
    ),
    Mutant(
        "a convolution of the Runner takes the scales of columns for its own",
        "return node if m is not None and (len(m.weight) == 1 or m.axis == 1) else None",
        "return node",
        "operations::test_scales_of_columns_are_no_scales_of_channels",
    ),
    Mutant(
        "a file may give a declared function any argument",
        "if k in tests and v is not None and not allowed(tests[k], v):",
        "if False:",
        "operations::test_arguments_in_a_file_are_those_that_a_declaration_allows",
    ),
    Mutant(
        "products of two grids are made in floats",
        "if target in PRODUCTS and not any(t.is_floating_point() for t in args):",
        "if False:",
        "operations::test_products_of_two_grids_are_whole",
    ),
    Mutant(
        "sums of large products stay in 32 bits",
        "dtype = torch.int32 if math.prod(most) * x.shape[-1] < 2**31 else torch.int64",
        "dtype = torch.int32",
        "operations::test_products_that_leave_32_bits",
    ),
    # Files from strangers: docs/FILES.md
    Mutant(
        "a packed net may give what does not depend on its input",
        "if origin.made.isdisjoint(map(id, tree_leaves(out))):",
        "if False:",
        "strangers::test_a_net_that_gives_its_input",
    ),
    Mutant(
        "a part is swept away under the one who writes it",
        "with FileLock(lock, timeout=0): remove_parts(folder)",
        "remove_parts(folder)",
        "files::test_a_run_begins_by_sweeping_where_nobody_writes",
    ),
    Mutant(
        "downloads of others grow without end",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))",
        "pass",
        "files::test_downloads_of_others_have_an_upper_size",
    ),
    Mutant(
        "a truth value is a whole number",
        "if isinstance(value, bool) or not isinstance(value, Integral) or not low <= value <= high:",
        "if not isinstance(value, Integral) or not low <= value <= high:",
        "numbers::test_a_number_that_makes_no_sense",
    ),
    # many processes and machines
    Mutant(
        "workers compute with threads of their own",
        "torch.set_num_threads(self.threads)",
        "pass",
        "clusters::test_work_has_as_many_threads_as_who_asks",
    ),
    Mutant(
        "everything is sent ahead",
        "while len(running) < ahead and (item := next(numbered, None)) is not None:",
        "while (item := next(numbered, None)) is not None:",
        "clusters::test_no_more_is_sent_than_was_asked_for_and_the_rest_is_called_off",
    ),
    Mutant(
        "what waits is not called off",
        "future.cancel()",
        "pass",
        "clusters::test_no_more_is_sent_than_was_asked_for_and_the_rest_is_called_off",
    ),
    Mutant(
        "a lost worker is told before what was finished",
        "sorted(done, key=lambda f: f.exception() is not None)",
        "sorted(done, key=lambda f: f.exception() is None)",
        "clusters::test_what_was_finished_is_handed_on_before_a_lost_worker_is_told",
    ),
    Mutant(
        "a sent net shows its weights without masks and quantisers",
        "parametrize._inject_property(module, name)",
        "pass",
        "clusters::test_a_net_with_masks_and_quantisers_arrives_as_it_was",
    ),
    Mutant(
        "layers in the order in which they were done",
        "for name in names for row in rows[name]",
        "for name in rows for row in rows[name]",
        "clusters::test_tables_are_in_the_order_of_the_layers_whoever_is_first",
    ),
    Mutant(
        "widths in the order in which they were done",
        "for i in range(len(widths)) for row in done[i]",
        "for i in done for row in done[i]",
        "clusters::test_tables_are_in_the_order_of_the_layers_whoever_is_first",
    ),
    # what a user declares
    Mutant(
        "a declaration prices what the scorer knows",
        "if op not in _PRICED and known not in (None, price):",
        "if False:",
        "operations::test_a_declaration_prices_nothing_but_its_own",
    ),
    Mutant(
        "functions of torch.special are no functions of torch",
        "homes = ((home, vars(m)) for home, m in _HOMES.items())",
        "homes = ((home, vars(m)) for home, m in _HOMES.items() if home != 'special')",
        "operations::test_functions_of_torch_that_call_themselves_otherwise",
    ),
    Mutant(
        "a second function takes a name in files",
        "if before is not None and place(before.function) != place(function):",
        "if False:",
        "operations::test_a_name_in_files_stands_for_one_function",
    ),
    Mutant(
        "images are tried together alone",
        "torch.cat([_one(declared, net, image) for image in x.split(1)])",
        "net(x)",
        "operations::test_what_a_declaration_says_of_a_batch_and_of_whole_numbers_is_tried",
    ),
    Mutant(
        "what carries may make numbers",
        "if not torch.isin(got, given).all():",
        "if False:",
        "operations::test_what_a_declaration_says_of_a_batch_and_of_whole_numbers_is_tried",
    ),
    # declarations, attention, and one net of every family
    Mutant(
        "a replaced declaration is called",
        "if op.function is not node.target and hasattr(node.target, 'operation'):",
        "if False:",
        "operations::test_a_declaration_that_was_replaced_is_called_no_more",
    ),
    Mutant(
        "arguments that no declaration names are dropped",
        "if more := [v for v in positional[len(op.arguments) :] if v is not None]:",
        "if more := []:",
        "operations::test_an_argument_that_a_declaration_does_not_name_is_refused",
    ),
    Mutant(
        "a declaration names arguments in any order",
        "want, got = (_tried(declared, '', *declared.example), _tried(declared, ' by name', *tensors, **named))",
        "want = got = _tried(declared, '', *declared.example)",
        "operations::test_a_wrong_declaration_is_one_sentence",
    ),
    Mutant(
        "a declaration may make anything of its example",
        "if not is_batch(out) or len(out) != len(example[0]):",
        "if False:",
        "operations::test_a_wrong_declaration_is_one_sentence",
    ),
    Mutant(
        "a declaration carries for ever",
        "if before is not None: CARRIES.discard(before.function)",
        "",
        "operations::test_a_declaration_that_carries_no_more",
    ),
    Mutant(
        "a test that cannot judge raises",
        "try: return bool(test(value)) except Exception: return False",
        "return bool(test(value))",
        "operations::test_a_test_that_cannot_judge_a_value_of_a_file_refuses_it",
    ),
    Mutant(
        "a declared rule for ONNX may return anything",
        "if not isinstance(written, str):",
        "if False:",
        "operations::test_what_is_tried_and_fails_is_one_sentence",
    ),
    Mutant(
        "a mask of infinities stays infinite",
        "constant, flat = _finite(constant), None",
        "flat = None",
        "operations::test_what_a_mask_of_infinities_hides_is_hidden",
    ),
    Mutant(
        "a mask chooses what it should not",
        "for v, chosen in ((x, mask), (y, ~mask)):",
        "for v, chosen in ((x, ~mask), (y, mask)):",
        "operations::test_what_a_mask_of_infinities_hides_is_hidden",
    ),
    Mutant(
        "a net may give infinities",
        "check_finite(expected, 'what the net gives to the example')",
        "pass",
        "operations::test_a_net_that_gives_infinities_is_refused",
    ),
    Mutant(
        "where a tensor comes from is an operation",
        "if name in LOOKS:",
        "if False:",
        "operations::test_products_quantised_within_attention_are_lowered",
    ),
    Mutant(
        "causal attention sees what comes",
        "attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()",
        "attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu()",
        "operations::test_what_a_mask_of_infinities_hides_is_hidden",
    ),
    Mutant(
        "attention is scaled by its tokens",
        "scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5",
        "scores = query @ key.transpose(-2, -1) * (query.shape[-2] ** -0.5",
        "operations::test_attention_however_it_is_spelt",
    ),
    Mutant(
        "softmax costs a multiplication more",
        "'softmax': (2, 1),",
        "'softmax': (3, 1),",
        "tokens::test_what_a_graph_with_attention_costs_more_than_its_net",
    ),
    Mutant(
        "an end at infinity is an end",
        "if v is not None and v != (-math.inf if k == 'min' else math.inf)",
        "if v is not None",
        "operations::test_ends_that_are_stored_numbers_and_ends_at_infinity",
    ),
    Mutant(
        "a net takes as many tensors as it likes",
        "if len(needed) > 1:",
        "if False:",
        "lowering::test_a_net_of_several_inputs_is_refused_everywhere",
    ),
    Mutant(
        "ceil_mode of a pool asks for indices",
        "'functional.max_pool2d': 6",
        "'functional.max_pool2d': 5",
        "packing::test_a_pool_with_ceil_mode_is_one_tensor",
    ),
    Mutant(
        "half a value lies by itself in a Runner",
        "return Part(narrow + wide, [None] * (len(narrow) + 1) + whole, steps[-1])",
        "return order",
        "runtime::test_floats_of_a_part_have_the_bits_of_the_graph",
    ),
    Mutant(
        "a part lies as it did with two images",
        "whole = [None if a // b == x.shape[d] else a // b",
        "whole = [a // b",
        "runtime::test_parts_with_the_images_in_the_middle",
    ),
    Mutant(
        "inference tensors have versions",
        "before = [(t, t._version) for t in given if not t.is_inference()]",
        "before = [(t, t._version) for t in given]",
        "runtime::test_a_graph_that_was_lowered_in_inference_mode_runs",
    ),
    Mutant(
        "a value that others read is folded",
        """    while len(node.users) == 1 and node.all_input_nodes:
        scale, ends =""",
        """    while node.all_input_nodes:
        scale, ends =""",
        "onnx::test_a_value_that_is_read_twice_is_not_folded[cut]",
    ),
    Mutant(
        "a fused bias counts sums of the weights before they were made finer",
        "whole = (bias / unit).round()",
        "whole = (bias / scale.abs()).round()",
        "onnx::test_a_fused_layer_by_hand",
    ),
    Mutant(
        "a fused bias may be off by two steps",
        "(off <= 0.1 * step)",
        "(off <= 2.0 * step)",
        "onnx::test_what_does_not_fit_stays_in_floats[step]",
    ),
    Mutant(
        "a fused end is divided by the step",
        "np.rint(_scaled(v, scales))",
        "np.rint(v / (1 / math.prod(map(float, scales))))",
        "onnx::test_a_fused_end_is_rounded_as_the_graph_rounds_it",
    ),
    Mutant(
        "zeros around the answer are left out",
        "len(convs) + len(outputs) == len(readers)",
        "len(convs) + sum(r.op == 'output' for r in readers) == len(readers)",
        "onnx::test_zeros_around_the_answer_stay",
    ),
    Mutant(
        "a fused quantiser has the range of its bits alone",
        """        if ends is not None:
            low, high = (int(min(max(np.rint(_scaled(v, scales)), low), high)) for v in ends)
""",
        """        if ends is not None:
            low, high = low, high
""",
        "onnx::test_fused_layers_run_on_integers[8-cuts] onnx::test_fused_layers_run_on_integers[8-relu6]",
    ),
    Mutant(
        "a negative scale is folded through a pool",
        "elif m is not F.max_pool2d or not (scale > 0).all():",
        "elif m is not F.max_pool2d:",
        "onnx::test_fused_layers_run_on_integers[8-negative_scale_behind_a_pool]",
    ),
    Mutant(
        "zeros before a fused layer are lost",
        "plan.pads.update((r, _zeros_around(u)) for u in pads for r in u.users)",
        "plan.pads.update((r, (0, 0, 0, 0)) for u in pads for r in u.users)",
        "onnx::test_fused_weights_of_any_width_and_shape[kwargs1-8]",
    ),
    Mutant(
        "two stored tensors of one name",
        "name if name and name not in self.stored else",
        "name if name else",
        "onnx::test_a_layer_that_is_called_twice_is_stored_for_each_of_its_scales",
    ),
    Mutant(
        "any integer of onnxruntime will do",
        "if bad := int(((got < m(x - slack)) | (got > m(x + slack))).sum()):",
        "if bad := 0:",
        "onnx::test_a_runtime_that_computes_otherwise_is_found",
    ),
    Mutant(
        "the graph goes on with its own integers",
        "other=int((got != value).sum())); return got",
        "other=int((got != value).sum())); return value",
        "onnx::test_a_runtime_that_computes_otherwise_is_found",
    ),
    Mutant(
        "the way back misses products of activations",
        "return products if all(name in node.reads for name in factors) else 0",
        "return 0",
        "families::test_products_on_the_way_back",
    ),
    Mutant(
        "computed constants are not stored",
        "return sum(read.values()), sum(read.values()) + sum(computed.values())",
        "return sum(read.values()), sum(read.values())",
        "families::test_stored_numbers_at_the_border",
    ),
    Mutant(
        "constants without gradients are not seen",
        "with _grad_everywhere(), _in_products(net):",
        "with torch.enable_grad(), _in_products(net):",
        "families::test_constants_that_are_computed_without_gradients_are_stored",
    ),
    Mutant(
        "a sweep lets counts differ",
        "if ours != theirs:",
        "if False:",
        "families::test_a_wrong_count_is_refused",
    ),
    Mutant(
        "a sweep lets answers differ",
        "if not off <= TOLERANCE[stage]:",
        "if False:",
        "families::test_a_wrong_answer_is_refused",
    ),
    Mutant(
        "a sweep does not look at quantisers in ONNX",
        "if not beside.attrs['off'] <= TOLERANCE['ONNX beside']:",
        "if False:",
        "families::test_a_quantiser_that_is_another_in_onnx_is_refused",
    ),
    Mutant(
        "one stage is all the way",
        "(table[[*STAGES]] == 'yes').all(axis=1)",
        "(table[[*STAGES]] == 'yes').any(axis=1)",
        "families::test_the_table_says_who_goes_all_the_way",
    ),
    Mutant(
        "a margin is not emptied",
        _COMPILED,
        _in_compiled(
            "case BORDER: if (t.part == 0) border(w, mem, many); break;",
            "case BORDER: break;",
        ),
        "native::test_what_was_in_memory_does_not_matter",
    ),
    Mutant(
        "threads do not wait for one another",
        _COMPILED,
        _in_compiled(
            "for (int64_t tries = 0; next.load() >> 16 == call; tries++) wait_a_little(tries);",
            "next = (call + 1) << 16;",
        ),
        "native::test_as_many_threads_as_there_are",
    ),
    Mutant(
        "threads are not waited for at the end",
        _COMPILED,
        _in_compiled(
            "for (int64_t tries = 0; inside.load(); tries++) wait_a_little(tries);",
            "",
        ),
        "native::test_as_many_threads_as_there_are",
    ),
    Mutant(
        "two threads take the same images",
        _COMPILED,
        _in_compiled(
            "if (!next.compare_exchange_weak(first, first + many)) continue;",
            "next = first + many + 1;",
        ),
        "native::test_as_many_threads_as_there_are",
    ),
    Mutant(
        "a sixth is a product",
        _COMPILED,
        _in_compiled(
            "return (f8)_mm256_fmadd_ps(_mm256_fnmadd_ps(q, six, a), by, q);",
            "return (f8)q;",
        ),
        "native::test_hard_swish_of_every_order_of_magnitude",
    ),
    Mutant(
        "what is left over is made in vectors",
        _COMPILED,
        _in_compiled(
            "if (w[0] <= at && at < w[1]) y[m][i / 8][i % 8] = alone(x[m][i / 8][i % 8], swish);",
            "",
        ),
        "native::test_means_and_gates_of_any_size",
    ),
    Mutant(
        "a mean is summed from first to last",
        _COMPILED,
        _in_compiled(
            "lanes = pixels < l.pairs ? 1 : l.pairs;",
            "lanes = 1;",
        ),
        "native::test_a_mean_is_that_of_pytorch_to_the_last_bit",
    ),
    Mutant(
        "the last odd tap is lost",
        "full[:channels, :taps] = weight",
        "full[:channels, : taps - taps % 2] = weight[:, : taps - taps % 2]",
        "native::test_a_convolution_of_any_shape",
    ),
    Mutant(
        "memory that two need at once is shared",
        "if f <= last and first <= l)",
        "if f < last and first < l)",
        "native::test_the_bits_of_nets_that_people_use",
    ),
    Mutant(
        "memory of all images is given on within a segment",
        "at = [segment if m.shared else call for segment, call in times]",
        "at = [call for segment, call in times]",
        "native::test_memory_of_all_images_lasts_as_long_as_its_segments",
    ),
    Mutant(
        "a convolution does not ask for zeros around",
        "    source.reach(*geometry['padding'])\n",
        "",
        "native::test_a_convolution_of_any_shape",
    ),
    Mutant(
        "sums that are not exact in the graph are taken",
        "(2**31 if layer.wide else 2**24 + 1)\n",
        "2**31\n",
        "native::test_sums_that_float32_does_not_hold",
    ),
    Mutant(
        "a compiled net of another size is run",
        "getattr(self.way, 'size', x.shape[1:]) == x.shape[1:]",
        "True",
        "native::test_the_runner_takes_it_where_it_is_faster",
    ),
    Mutant(
        "a compiled net is not held against the graph",
        "if not torch.equal(way(x), expected):",
        "if False:",
        "native::test_other_bits_are_not_taken",
    ),
    Mutant(
        "two threads share a Runner's memory",
        "self.alone = _OneAtATime()",
        "self.alone = __import__('contextlib').nullcontext()",
        "native::test_two_threads_that_call_the_same_net",
    ),
    Mutant(
        "an image in another size keeps its pixels where they are",
        "np.divmod(call.geometry['places'], call.reads[0].width)",
        "np.divmod(0 * call.geometry['places'], call.reads[0].width)",
        "native::test_nearest_neighbours",
    ),
    Mutant(
        "a forked process waits for the threads of another",
        "_team(workers, os.getpid())",
        "_team(workers, 0)",
        "native::test_a_forked_process_has_threads_of_its_own",
    ),
]


@functools.cache
def sources():
    "The text of each module of the library."
    files = sorted((ROOT / "micronet_nb").glob("*.py"))
    return {p.stem: p.read_text(encoding="utf-8") for p in files if p.stem not in ("__init__", "_modidx")}


def place_of(mutant):
    "The module that has the mutant's old text, and its first and last token there. ValueError where it is not one."
    try:
        found = [(module, place) for module, text in sources().items() for place in find(mutant.old, text)]
    except ValueError as e:
        raise ValueError(f"{mutant.name!r}: {e}") from e
    if len(found) == 1:
        return found[0]
    told = f"{mutant.name!r}: {mutant.old!r} is {len(found)} times in the library"
    if found:
        rows = [f"micronet_nb/{module}.py:{tokens_of(sources()[module])[first].row}" for module, (first, _) in found]
        raise ValueError(f"{told} ({', '.join(rows[:4])}{', ...' * (len(rows) > 4)}): make it longer")
    length, row, piece, module = max((*nearest(mutant.old, text), module) for module, text in sources().items())
    near = f"; the most of it, {piece!r}, is in micronet_nb/{module}.py:{row}" if length else ""
    raise ValueError(f"{told}: anchor it anew{near}")


def mutated(mutant):
    "The module's name, and its source with the mutant in it. ValueError where that has no one place or does not parse."
    module, place = place_of(mutant)
    text = written(tokens_of(sources()[module]), place, mutant.new)
    try:
        ast.parse(text)
    except SyntaxError as e:
        file = f"micronet_nb/{module}.py:{e.lineno}"
        raise ValueError(f"{mutant.name!r}: {file} does not parse with {mutant.new!r} in it: {e.msg}") from e
    return module, text


def broken():
    "What is wrong with each mutant that has lost its place, by its name."
    told = {}
    for m in MUTANTS:
        try:
            mutated(m)
        except ValueError as e:
            told[m.name] = str(e)
    return told


def node_ids(tests):
    "pytest's names of the tests."
    return [str(ROOT / "tests" / f"test_{t.split('::')[0]}.py") + "::" + t.split("::")[1] for t in tests.split()]


class Swapped(importlib.machinery.SourceFileLoader):
    "Loads a module from another text than its file's; nothing is written."

    def __init__(self, name, path, text):
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec", dont_inherit=True)


class Finder:
    "Finds the mutated module before Python finds the file."

    def __init__(self, mutant):
        module, self.text = mutated(mutant)
        self.name = f"micronet_nb.{module}"

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        file = str(ROOT / "micronet_nb" / f"{name.split('.')[1]}.py")
        return importlib.util.spec_from_file_location(name, file, loader=Swapped(name, file, self.text))


class Outcomes:
    "A pytest plugin that keeps what became of each test, its parameters left out: failed where one failed."

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        name = Path(report.fspath).stem.removeprefix("test_") + "::" + report.nodeid.split("::", 1)[1]
        failed = "error" if report.when != "call" and report.failed else report.outcome
        for key in {name, name.split("[")[0]}:
            if report.when == "call" or failed != "passed":
                order = ("passed", "skipped", "error", "failed")
                self.found[key] = max(self.found.get(key, "passed"), failed, key=order.index)


def child(mutant, tests, out):
    "In a process of its own: runs the tests on a mutant (None: the library as it is), writes what became of them."
    import pytest

    signal.alarm(LIMIT if mutant else 10 * LIMIT)
    with open(out.with_suffix(".log"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if mutant:
        sys.meta_path.insert(0, Finder(mutant))
    outcomes = Outcomes()
    args = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--durations=15", f"--rootdir={ROOT}"]
    code = pytest.main([*args, *node_ids(tests)], plugins=[outcomes])
    out.write_text(json.dumps(dict(code=int(code), found=outcomes.found)))


def verdict(mutant, status, out):
    "'' where a mutant is caught by every test that it names, else what is wrong."
    tail = out.with_suffix(".log").read_text(errors="replace")[-1500:] if out.with_suffix(".log").exists() else ""
    if os.WIFSIGNALED(status):
        return f"its tests did not end in {LIMIT} s (signal {os.WTERMSIG(status)})"
    if not out.exists():
        return f"its process died:\n{tail}"
    told = json.loads(out.read_text())
    wanted = "failed" if mutant else "passed"
    names = mutant.tests.split() if mutant else told["found"]
    wrong = [f"{t}: {o}" for t in names if (o := told["found"].get(t, "not run")) != wanted]
    if wrong:
        return ", ".join(wrong) + ("" if told["code"] in (0, 1) and mutant else f"\n{tail}")
    return "" if told["code"] == (1 if mutant else 0) else f"pytest ended with code {told['code']}:\n{tail}"


def warm_up():
    "What every mutant needs and none changes is imported once, before the first fork; the library is not."
    os.environ |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MICRONET_OFFLINE="1")
    os.environ.pop("MICRONET_DATA", None)  # the table is the same on every machine
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    for name in """torch timm accelerate pandas sklearn.datasets safetensors.torch hypothesis nbformat onnx onnxruntime
                   pyarrow.parquet matplotlib torch.utils.flop_counter pytest psutil""".split():
        try:
            importlib.import_module(name)
        except ImportError:
            pass
    assert not [m for m in sys.modules if m.split(".")[0] == "micronet_nb"]


def run(jobs, folder, at_once=None):
    "Yields (mutant, what is wrong, seconds) of jobs (mutant, tests), as each ends; a fork each, some side by side."
    at_once = at_once or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    todo, under_way = [*enumerate(jobs)], {}
    while todo or under_way:
        while todo and len(under_way) < at_once:
            i, (mutant, tests) = todo.pop(0)
            out = Path(folder) / f"{i if mutant else 'whole'}.json"
            sys.stdout.flush()
            if not (pid := os.fork()):
                try:
                    child(mutant, tests, out)
                finally:
                    os._exit(0)
            under_way[pid] = mutant, out, time.perf_counter()
        pid, status = os.wait()
        mutant, out, start = under_way.pop(pid)
        yield mutant, verdict(mutant, status, out), time.perf_counter() - start


def main(words):
    "All mutants, or those that have one of the words; 0 where all are caught."
    if lost := broken():
        print("\n".join(lost.values()))
        return 2
    module_of = {m.name: place_of(m)[0] for m in MUTANTS}
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.name} {module_of[m.name]}" for w in words)]
    if not chosen:
        print(f"no mutant has one of {words} in its name or module")
        return 2
    start = time.perf_counter()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
        every = " ".join(dict.fromkeys(t for m in chosen for t in m.tests.split()))
        for _, wrong, seconds in run([(None, every)], folder):
            told = f"the library as it is ({len(every.split())} tests, {seconds:.0f} s)"
            print(f"{'FAILED' if wrong else 'passed'}   {told} {wrong}")
            if os.environ.get("DURATIONS"):
                print((Path(folder) / "whole.log").read_text())
        if wrong:
            return 1
        left = []
        for m, wrong, seconds in run([(m, m.tests) for m in chosen], folder):
            told = f"{module_of[m.name]}: {m.name} ({seconds:.1f} s)"
            print(f"{'SURVIVED' if wrong else 'caught  '} {told} {wrong}", flush=True)
            if wrong:
                left.append(m)
    print(f"{len(chosen) - len(left)} of {len(chosen)} mutants caught in {time.perf_counter() - start:.0f} s")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
