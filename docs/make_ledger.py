"""Writes docs/ledger.md: for every recipe, which equations are tested and which tables were made, with which command.

python docs/make_ledger.py          write it
python docs/make_ledger.py --check  exit with 1 where it is not up to date
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

from perpetune.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "docs" / "ledger.md"

# the tests that hold a piece to its equation; a name that is no test stops the ledger
EQUATIONS = {
    "ProductL1": [
        "tests/rules/test_product_l1.py::test_gradient_is_that_of_the_equation",
        "tests/rules/test_product_l1.py::test_product_of_any_shape_in_any_chunks",
    ],
    "ReleasedProductL1": [
        "tests/rules/test_product_l1.py::test_gradient_is_that_of_the_equation",
        "tests/rules/test_product_l1.py::test_released_form_of_any_square_shape",
    ],
    "OrthogonalToPast": [
        "tests/rules/test_orthogonal.py::test_gradient_is_that_of_the_equation",
        "tests/rules/test_orthogonal.py::test_any_shape_on_both_sides_of_the_switch",
    ],
    "InfLoRA": [
        "tests/rules/test_inflora.py::test_a_spans_the_leading_directions_of_what_is_left_of_the_new_inputs",
        "tests/rules/test_inflora.py::test_the_bases_are_those_of_dual_gpm",
        "tests/rules/test_inflora.py::test_old_outputs_stay_whatever_the_optimizer_does",
        "tests/rules/test_inflora.py::test_without_it_old_outputs_move",
    ],
    "SubspaceProjection": [
        "tests/rules/test_projection.py::test_step_is_the_equation_for_any_mixture_of_shapes",
        "tests/rules/test_projection.py::test_old_outputs_stay_under_adamw",
        "tests/rules/test_projection.py::test_projecting_the_gradient_alone_drifts_under_adam",
        "tests/rules/test_projection_branches.py::test_fresh_lora_leaves_old_outputs_alone_whatever_b_does",
        "tests/benchmarks/test_drift.py::test_old_outputs_stay",
    ],
    "StepMask": [
        "tests/rules/test_step_mask.py::test_gradient_is_that_of_the_equation",
        "tests/rules/test_step_mask.py::test_update_is_that_of_the_equation_to_the_bit",
        "tests/rules/test_step_mask.py::test_under_adam_it_is_a_smaller_learning_rate",
    ],
    "FixedMask": [
        "tests/rules/test_fixed_mask.py::test_mask_is_that_of_the_equation",
        "tests/rules/test_fixed_mask.py::test_largest_is_a_sort",
        "tests/rules/test_fixed_mask.py::test_outside_the_mask_no_bit_moves",
    ],
    "SoftOrthogonal": [
        "tests/rules/test_soft_orthogonal.py::test_gradient_is_that_of_the_equation",
        "tests/rules/test_soft_orthogonal.py::test_it_brings_columns_to_right_angles",
    ],
    "RotationBall": [
        "tests/rules/test_rotation_ball.py::test_projection_is_that_of_the_equation",
        "tests/rules/test_rotation_ball.py::test_it_never_leaves_the_ball_under_adamw",
        "tests/rules/test_rotation_ball.py::test_it_learns_where_the_default_of_peft_does_not",
    ],
    "GivensConfig": [
        "tests/tuners/test_givens_rotations.py::test_equation",
        "tests/tuners/test_givens_rotations.py::test_orthogonal_after_a_thousand_steps",
        "tests/tuners/test_givens_tuner.py::test_number_of_parameters",
    ],
    "OFTConfig": [
        "tests/rules/test_rotation_ball.py::test_exact_cayley_stays_orthogonal_where_the_neumann_series_does_not",
        "tests/consolidation/test_rotations.py::"
        "test_merged_weights_are_the_base_times_the_rotations_of_all_tasks_in_order",
    ],
    "AdapterConfig": [
        "tests/tuners/test_adapter.py::test_equation",
        "tests/tuners/test_adapter.py::test_projection_keeps_old_outputs",
    ],
    "BiasConfig": [
        "tests/tuners/test_bias.py::test_equation",
        "tests/tuners/test_bias.py::test_projection_freezes_biases_after_the_first_task",
    ],
    "PrefixConfig": [
        "tests/tuners/test_prefix.py::test_equation_bert",
        "tests/tuners/test_prefix.py::test_equation_llama",
        "tests/tuners/test_prefix.py::test_what_the_conditions_are_worth",
    ],
    "DeepPromptConfig": [
        "tests/tuners/test_prompt.py::test_equation",
        "tests/tuners/test_prompt.py::test_what_the_conditions_are_worth",
    ],
    "IA3Config": ["tests/rules/test_projection_branches.py::test_ia3_is_protected_element_by_element"],
    "Merge": [
        "tests/learning/test_learner.py::test_merge_and_stack_compute_the_same_function",
        "tests/learning/test_learner.py::test_adapters_load_in_plain_peft",
    ],
    "DeltaMerge": [
        "tests/consolidation/test_delta_merge.py::test_the_model_is_the_base_plus_the_stored_deltas",
        "tests/consolidation/test_delta_merge.py::test_soup_is_the_average_of_the_tuned_models",
        "tests/deltas/test_delta.py::test_a_merge_is_the_base_and_the_masked_deltas",
    ],
    "TopMagnitude": ["tests/deltas/test_combination.py::test_trimming_keeps_the_largest_of_all_tensors"],
    "ElectSign": [
        "tests/deltas/test_combination.py::test_ties_is_the_published_algorithm",
        "tests/deltas/test_combination.py::test_signs_that_weigh_the_same_change_nothing",
        "tests/consolidation/test_ties.py::test_the_model_is_the_base_plus_the_merge_of_the_trimmed_deltas",
    ],
    "PerTask": [
        "tests/consolidation/test_per_task.py::test_the_posterior_is_the_sum_over_tasks_of_route_times_class",
        "tests/consolidation/test_per_task.py::test_later_tasks_change_nothing_of_an_earlier_one",
    ],
    "KMeansRouter": ["tests/routers/test_kmeans.py::test_the_route_is_the_task_of_the_nearest_kmeans_centre"],
    "PooledRouter": [
        "tests/routers/test_class_router.py::test_the_pool_is_the_geometric_mean_of_its_experts",
        "tests/routers/test_class_router.py::test_the_posterior_is_a_softmax_of_class_scores_summed_over_a_task",
        "tests/routers/test_class_router.py::"
        "test_the_temperature_comes_from_the_moments_of_the_holdout_samples_themselves",
        "tests/routers/test_ridge_router.py::"
        "test_the_posterior_from_moments_is_the_one_from_the_holdout_samples_themselves",
    ],
    "Stack": [
        "tests/learning/test_learner.py::test_merge_and_stack_compute_the_same_function",
        "tests/learning/test_learner.py::test_a_stacked_run_opens_with_all_its_branches",
    ],
    "RidgeHead": [
        "tests/heads/test_ridge.py::test_ridge_from_moments_is_ridge_on_stacked_features",
        "tests/heads/test_ridge.py::test_holdout_error_from_moments_is_the_direct_error",
        "tests/heads/test_ridge.py::test_same_bits_under_any_order_of_tasks_labels_samples_and_any_batch_size",
    ],
    "PrototypeHead": [
        "tests/heads/test_prototype.py::test_scores_are_cosines_to_class_means",
        "tests/heads/test_prototype.py::test_same_bits_under_any_order_and_batch_size",
    ],
    "LinearHead": [
        "tests/heads/test_linear.py::test_loss_is_cross_entropy_over_the_classes_of_the_loss",
        "tests/heads/test_linear.py::test_old_rows_do_not_decay_under_adamw",
    ],
    "LabelTextHead": ["tests/heads/test_label_text.py::test_scores_are_cosines_over_the_temperature"],
    "Replay": ["tests/learning/test_learner.py::test_the_state_is_the_base_plus_the_commits"],
    "Joint": ["tests/learning/test_learner.py::test_joint_has_only_the_last_row"],
    "Frozen": ["tests/learning/test_learner.py::test_frozen_features_are_computed_once"],
}
# every recipe is run, opened again and asked for the same predictions
FOR_ALL = "tests/learning/test_learner.py::test_every_recipe_learns_predicts_and_opens_again"


def check_tests_exist() -> None:
    for name in {FOR_ALL, *(test for tests in EQUATIONS.values() for test in tests)}:
        path, function = name.split("::")
        defined = {n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)}
        if function not in defined:
            raise SystemExit(f"docs/make_ledger.py names {name}, but there is no such test")


def pieces(name: str) -> list[str]:
    recipe = RECIPES[name]()
    tuner = getattr(recipe.tuner, "config", recipe.tuner)
    found = [type(tuner).__name__, type(recipe.consolidation).__name__]
    inner = (getattr(recipe.consolidation, slot, None) for slot in ("router", "keep", "combine"))
    found += [type(piece).__name__ for piece in inner if piece is not None]
    return [*found, *(type(r).__name__ for r in recipe.rules), *(type(h).__name__ for h in recipe.heads)]


def tables() -> dict[str, list[tuple[str, str]]]:
    """Recipe -> (table, command) of every result that is kept in docs/results."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "docs" / "results").glob("*.json")):
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            continue  # a benchmark's records
        for recipe in {row["recipe"] for row in data["rows"]}:
            found.setdefault(recipe, []).append((f"results/{path.stem}.md", data["command"]))
    return found


def ledger() -> str:
    check_tests_exist()
    made = tables()
    lines = [
        "# Ledger",
        "",
        "What each recipe is made of, which tests hold its pieces to their equations, and in which tables it stands.",
        "Made by `python docs/make_ledger.py`; not edited by hand. Every recipe is also run, opened again and asked",
        f"for the same predictions by `{FOR_ALL}`.",
        "",
    ]
    for name in RECIPES:
        lines += [f"## `{name}`", "", " ".join((RECIPES[name].__doc__ or "").split("\n\n")[0].split()), ""]
        tested = [(piece, test) for piece in dict.fromkeys(pieces(name)) for test in EQUATIONS.get(piece, ())]
        lines += [f"- {piece}: `{test}`" for piece, test in tested]
        lines += [f"- table [{table}]({table}): `{command.splitlines()[0]}`" for table, command in made.get(name, ())]
        if name not in made:
            lines.append("- no table yet")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    text = ledger()
    if "--check" in sys.argv:
        sys.exit(0 if LEDGER.is_file() and LEDGER.read_text() == text else f"{LEDGER.name} is out of date")
    LEDGER.write_text(text)
    print(f"wrote {LEDGER.relative_to(ROOT)}")
