"""Every synchronisation is missed by a named test when it is taken out.

Each site (see ``tests/mutants.py``) becomes a call that does nothing, one at a time, and the test
that is named for it here has to fail, on two ranks where it runs on two.
"""

import pytest

from tests.forks import run_pytest
from tests.mutants import sites

WAITS = "test_waits.py::test_everything_waits_for_what_it_uses"
SUBGROUPS = "test_collectives.py::test_subgroups_whose_ranks_know_different_numbers_of_groups"
PACKED = "test_collectives.py::test_lists_of_tensors_arrive_packed_or_not"
TEXTS = "test_collectives.py::test_small_messages"
OTHER_TARGET = "test_state.py::test_ranks_that_consolidate_differently_are_named"
OTHER_STATE = "test_state.py::test_ranks_that_load_different_states_are_named"
MISFIT = "test_state.py::test_what_does_not_fit_is_refused_on_every_rank"
STUCK = "test_state.py::test_state_that_cannot_travel_is_refused_on_every_rank"
OTHER_VALUE = "test_construction.py::test_a_value_that_differs_comes_with_a_remedy"
OTHER_FACT = "test_construction.py::test_a_difference_is_named_on_every_rank"
OTHER_GRADIENT = "test_construction.py::test_a_gradient_that_differs_is_named_on_every_rank"
REFUSED = "test_construction.py::test_what_one_rank_refuses_is_refused_by_all"
REFUSED_GROUP = "test_groups.py::test_a_group_that_one_rank_refuses_is_added_nowhere"
SPARSE = (
    "test_refusals.py::test_a_sparse_gradient_on_one_rank_is_named_on_every_rank_at_the_first_step"
)
REFUSED_STEP = "test_optim_db.py::test_raises_what_the_class_raises"
PART = "test_misuse.py::test_a_class_that_fails_over_its_part_fails_on_every_rank"
HOOK = "test_misuse.py::test_a_load_hook_that_fails_on_one_rank_fails_on_all"
CLASS_LOAD = "test_misuse.py::test_a_class_that_cannot_load_on_one_rank_fails_on_all"
UNSENDABLE = "test_misuse.py::test_state_that_cannot_be_sent_fails_on_all"
OTHER_OPTION = "test_misuse.py::test_options_that_differ_are_never_saved"
SCHEDULE = "test_sched.py::test_another_class_on_one_rank_is_named"
METRIC = "test_sched.py::test_plateau_decides_alike_from_different_metrics"

SEARCH = "test_lbfgs.py::test_everything_waits_for_what_it_uses"
SEARCH_AGAIN = (
    "test_lbfgs.py::test_a_step_waits_for_the_one_before_and_each_evaluation_for_its_place"
)
SEARCH_OTHER_OPTION = (
    "test_lbfgs.py::test_another_option_on_one_rank_is_named_before_any_evaluation"
)
SEARCH_OTHER_STATE = "test_lbfgs.py::test_state_that_differs_between_ranks_is_never_saved"
NO_CLOSURE = "test_lbfgs.py::test_a_closure_that_one_rank_lacks_is_missed_on_all"
FAILING_CLOSURE = "test_lbfgs.py::test_a_closure_that_fails_on_one_rank_fails_on_all"
LAST_MOVE = "test_lbfgs.py::test_a_network_on_unequal_parts_of_the_data"
LOSS = "test_lbfgs.py::test_the_loss_is_averaged_and_keeps_its_type"

GRADIENTS = "test_waits.py::test_gradients_wait_for_what_they_use"
PRODUCERS = "test_waits.py::test_a_bucket_waits_for_the_producers_of_its_gradients"
OTHER_LR = "test_waits.py::test_another_lr_on_one_rank_is_named_before_the_step"
ROWS = "test_waits.py::test_rows_of_tables_wait_for_what_they_use"
LOOKS = "test_overlap.py::test_looking_waits"
DROPPED = "test_overlap.py::test_changing_a_parameter_and_dropping_the_optimizer_wait"
METHOD = "test_waits.py::test_a_method_of_the_class_waits_for_the_step_before"
OTHER_METHOD = "test_third_party.py::test_ranks_that_call_different_methods_are_told"
FAILED_METHOD = "test_third_party.py::test_what_a_method_raises_on_one_rank_is_raised_on_all"
TWO_STEPS = "test_overlap.py::test_a_step_waits_for_the_one_before"
SCALER = "test_scaler.py::test_equals_torchs_scaler_on_the_mean"
MESH = "test_mesh.py::test_as_on_one_axis_within_rounding"
MESH_STATE = "test_mesh.py::test_state_is_put_together_in_every_replica_and_loaded_there"
MESH_START = "test_mesh.py::test_parameters_start_as_those_of_the_first_rank"
MESH_NAMES = "test_mesh.py::test_what_one_rank_does_is_named_in_every_replica"
MESH_STREAMS = "test_mesh.py::test_each_waits_on_its_own_stream_whoever_has_gone_on_with_it"
MESH_SUMS = "test_mesh.py::test_many_ranks_agree_by_sums_over_both_axes"
RESUMED = "test_checkpoint_contents.py::test_a_run_goes_on_as_if_undisturbed"
UNKEPT = "test_checkpoint_contents.py::test_what_cannot_be_kept_is_refused_by_its_place"
OTHER_SAVE = "test_checkpoint_agreement.py::test_ranks_that_save_differently_are_told"
OTHER_LOAD = "test_checkpoint_agreement.py::test_ranks_that_load_differently_are_told"
OTHER_DISK = "test_checkpoint_agreement.py::test_ranks_that_see_different_files_are_told"
BAD_SCHEDULE = (
    "test_checkpoint_agreement.py::test_schedulers_that_differ_or_fail_on_one_rank_are_told"
)
UNVERIFIED = "test_checkpoint_agreement.py::test_where_no_step_verifies_every_rank_is_told"
UNOPENED = "test_checkpoint_agreement.py::test_a_checkpoint_that_one_rank_cannot_open"
UNREAD = (
    "test_checkpoint_agreement.py::test_a_checkpoint_that_one_rank_cannot_read_is_loaded_by_none"
)
UNLOADED = (
    "test_checkpoint_agreement.py::test_what_user_code_refuses_on_one_rank_changes_nothing_else"
)
FIRST_RANK = "test_checkpoint_faults.py::test_every_part_of_the_first_rank_may_fail"
FULL_DISK = "test_checkpoint_faults.py::test_a_file_that_cannot_grow"
IN_FLIGHT = "test_checkpoint_async.py::test_its_error_is_raised_on_every_rank_at_the_next_call"
ON_ITS_WAY = "test_checkpoint_async.py::test_a_load_is_not_overwritten_by_what_was_on_its_way"
HOSTS = "test_bootstrap.py::test_the_group_that_is_there_counts"
MPI = "test_mpi.py::test_the_collectives_and_some_of_the_bank"
SUMS = "test_traffic.py::test_many_ranks_agree_by_one_sum_and_nothing_else"
FLIPPED = "test_guards.py::test_a_flipped_bit_in_one_copy_is_found"
COPIES_UNDER_WAY = "test_guards.py::test_copies_under_way_are_waited_for"
TAKEN_OUT = "test_guards.py::test_a_parameter_that_cannot_be_taken_back_is_told_on_all"
LATE = "test_guards.py::test_a_rank_that_comes_late_is_named"
ON_FOUR_RANKS = (SUBGROUPS, MESH, MESH_STATE, MESH_START, MESH_NAMES, MESH_SUMS)

# The beginning of a site's name -> the test; the longest that fits counts.
KILLERS = {
    "algos/lbfgs.py": SEARCH,
    "arrivals.py": LOOKS,
    "arrivals.py::Arrivals.expect": WAITS,
    "arrivals.py::Arrivals.__del__": DROPPED,
    "checkpoint/job.py::Job.__init__": OTHER_SAVE,
    "checkpoint/job.py::Job.collect::agree": OTHER_SAVE,
    "checkpoint/job.py::Job.collect::all_or_none": BAD_SCHEDULE,
    "checkpoint/job.py::Job.collect::all_or_none#2": UNKEPT,
    "checkpoint/job.py::Job.write::all_or_none": FIRST_RANK,
    "checkpoint/job.py::Job.write::all_or_none#2": FULL_DISK,
    "checkpoint/job.py::Job.write::gather_texts": RESUMED,
    "checkpoint/restoring.py::_agree_on_path::agree": OTHER_LOAD,
    "checkpoint/restoring.py::_agree_on_path::all_or_none": UNVERIFIED,
    "checkpoint/restoring.py::_agree_on_path::gather_texts": RESUMED,
    "checkpoint/restoring.py::_load::agree": OTHER_DISK,
    "checkpoint/restoring.py::_put_back_on_failure::wait": ON_ITS_WAY,
    "checkpoint/restoring.py::_load::all_or_none": UNOPENED,
    "checkpoint/restoring.py::_load::all_or_none#2": UNREAD,
    "checkpoint/restoring.py::_load::all_or_none#3": UNLOADED,
    "checkpoint/restoring.py::_load::all_or_none#4": UNLOADED,
    "checkpoint/saving.py": IN_FLIGHT,
    "comm/bootstrap.py": HOSTS,
    "checks.py::CheckedOptimizer._check_first_step::agree_on_gradients": OTHER_GRADIENT,
    "checks.py::CheckedOptimizer._check_first_step::all_or_none": SPARSE,
    "checks.py::CheckedOptimizer._compare_replicas": COPIES_UNDER_WAY,
    "checks.py::CheckedOptimizer.agree": SCHEDULE,
    "checks.py::CheckedOptimizer.check_replicas": TAKEN_OUT,
    "comm/board.py": LATE,
    "comm/collectives.py": WAITS,
    "comm/collectives.py::Reduced": GRADIENTS,
    "comm/collectives.py::gather_texts": TEXTS,
    "comm/mesh.py": MESH,
    "comm/mesh.py::_MeanOfMeans.wait": MESH_STREAMS,
    "comm/mesh.py::MeshCollectives.all_gather_rows": MESH_NAMES,
    "comm/mesh.py::MeshCollectives.sum_rows": MESH_SUMS,
    "comm/mesh.py::MeshCollectives.broadcast": MESH_START,
    "comm/mesh.py::MeshCollectives.send": MESH_STATE,
    "comm/mesh.py::MeshCollectives.receive": MESH_STATE,
    "comm/mpi.py": MPI,
    "comm/torch_group.py": WAITS,
    "comm/torch_group.py::TorchCollectives.all_to_all": GRADIENTS,
    "comm/torch_group.py::TorchCollectives.reduce_scatter": GRADIENTS,
    "comm/torch_group.py::TorchCollectives.sum_rows": SUMS,
    "comm/torch_group.py::_know_equally_many_groups": SUBGROUPS,
    "comm/transfer.py": WAITS,
    "comm/transfer.py::receive_tensors": PACKED,
    "comm/transfer.py::send_tensors": PACKED,
    "evaluation.py": SEARCH,
    "evaluation.py::search::agree": SEARCH_OTHER_OPTION,
    "evaluation.py::search::gather": LAST_MOVE,
    "evaluation.py::search::all_or_none": NO_CLOSURE,
    "evaluation.py::search::wait": SEARCH_AGAIN,
    "evaluation.py::Evaluation.__call__::wait": SEARCH_AGAIN,
    "evaluation.py::Evaluation._evaluate": FAILING_CLOSURE,
    "evaluation.py::Evaluation._mean": LOSS,
    "gradients/": GRADIENTS,
    "gradients/reducer.py::Reducer._refuse_uneven": OTHER_LR,
    "gradients/report.py::_add_up": SUMS,
    "gradients/replicated.py::Replicated.settle::agree": OTHER_LR,
    "gradients/rounds.py::Rounds._launch": PRODUCERS,
    "guard.py::agree::": OTHER_TARGET,
    "guard.py::all_or_none": MISFIT,
    "guard.py::fail_everywhere": MISFIT,
    "guard.py::agree_on_buckets": FLIPPED,
    "guard.py::agree_on_values": OTHER_VALUE,
    "guard.py::agree_on_gradients": OTHER_GRADIENT,
    "guard.py::_agree_on_tensors": OTHER_VALUE,
    "inner.py::InnerMethods._call_together::wait": METHOD,
    "inner.py::InnerMethods._call_together::gather_everything": METHOD,
    "inner.py::InnerMethods._call_together::agree": OTHER_METHOD,
    "inner.py::InnerMethods._call_together::all_or_none": FAILED_METHOD,
    "optimizer.py::ShardedOptimizer.__init__": REFUSED,
    "optimizer.py::ShardedOptimizer._add_built_group": REFUSED_GROUP,
    "optimizer.py::ShardedOptimizer._build::agree": OTHER_FACT,
    "optimizer.py::ShardedOptimizer._build::all_or_none": PART,
    "optimizer.py::ShardedOptimizer._build::broadcast": GRADIENTS,
    "optimizer.py::ShardedOptimizer.__deepcopy__": LOOKS,
    "optimizer.py::ShardedOptimizer.wait": LOOKS,
    "optimizer.py::ShardedOptimizer._build::agree_on_values": OTHER_VALUE,
    "optimizer.py::ShardedOptimizer._step": TWO_STEPS,
    "optimizer.py::ShardedOptimizer._update": REFUSED_STEP,
    "optimizer.py::ShardedOptimizer._update::gather": WAITS,
    "rows.py": ROWS,
    "scaler.py": SCALER,
    "sched/agreement.py": SCHEDULE,
    "sched/plateau.py": METRIC,
    "state/consolidate.py": WAITS,
    "state/consolidate.py::_exchange_outlines::all_or_none": STUCK,
    "state/flat.py": SEARCH,
    "state/flat.py::consolidate_flat::agree": SEARCH_OTHER_STATE,
    "state/load.py": WAITS,
    "state/load.py::load::agree": OTHER_STATE,
    "state/load.py::load::all_or_none": MISFIT,
    "state/load.py::take_in::all_or_none": CLASS_LOAD,
    "state/load.py::_scatter::all_or_none": UNSENDABLE,
    "state/methods.py": HOOK,
    "state/snapshot.py": OTHER_TARGET,
    "state/snapshot.py::Snapshot.agree::agree#2": OTHER_OPTION,
    "update.py": WAITS,
    "update.py::gather_everything": SEARCH,
    "update.py::broadcast": GRADIENTS,
}


def fitting(site: str) -> list[str]:
    """The lines that speak of a site, the most particular last."""
    return sorted((line for line in KILLERS if site.startswith(f"shardopt/{line}")), key=len)


def test_every_site_has_a_line_and_every_line_a_site():
    assert [site for site in sites() if not fitting(site)] == []
    assert set(KILLERS) == {fitting(site)[-1] for site in sites()}


@pytest.mark.slow
@pytest.mark.parametrize("site", sites())
def test_a_mutant_dies(site, tmp_path):
    killer = KILLERS[fitting(site)[-1]]
    ranks = "ranks4" if killer in ON_FOUR_RANKS else "ranks2"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-k", ranks]
    code, output = run_pytest(
        *options,
        f"tests/ranked/{killer}",
        folder=tmp_path,
        SHARDOPT_MUTANT=site,
        SHARDOPT_TEST_TIMEOUT="6",
        OMP_NUM_THREADS="1",
    )
    assert code == 1, f"{killer} did not fail:\n{output[-2000:]}"
    assert "1 failed" in output, output[-2000:]
