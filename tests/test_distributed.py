"""A process finds its place among others from flags or from what its launcher sets, and says so where it cannot."""

import jax
import numpy as np
import pytest

from msr_jax.errors import UserError
from msr_jax.train.distributed import Cluster, agree, any_process, find_cluster, initialize

JAX = {"JAX_COORDINATOR_ADDRESS": "host:1234"}
SLURM = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.mark.parametrize(
    "env,expected",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"}, None),  # inside an allocation, but not of srun's making
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (SLURM, Cluster(method="slurm")),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": "uri"}, Cluster(method="ompi")),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Cluster()),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({**JAX, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, Cluster("host:1234", 2, 1, "deactivate")),
        ({**JAX, "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "0"}, Cluster("host:1234", 2, 0, "deactivate")),
        ({**JAX, **OMPI}, Cluster("host:1234", 4, 2, "deactivate")),
        ({**JAX, **SLURM}, Cluster("host:1234", 16, 3, "deactivate")),
    ],
)
def test_the_environment_tells_where_a_process_stands(env, expected):
    assert find_cluster(env) == expected


def test_flags_come_before_the_environment_and_a_flag_lets_jax_ask_the_machine():
    assert find_cluster(SLURM, "h:1", 2, 0) == Cluster("h:1", 2, 0, "deactivate")
    assert find_cluster({}, is_wanted=True) == Cluster()


@pytest.mark.parametrize(
    "env,flags,words",
    [
        ({}, ("h:1", 2, None), "given together or not at all"),
        ({}, ("h", 2, 0), "written HOST:PORT, not 'h'"),
        ({}, ("h:1", 2, 2), "process 2 of 2: they are counted from 0"),
        (JAX, (), "not JAX_NUM_PROCESSES"),
        ({**JAX, "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, (), "must be a number, not 'two'"),
        ({**JAX, "JAX_NUM_PROCESSES": "²", "JAX_PROCESS_ID": "0"}, (), "must be a number, not '²'"),
        (OMPI, (), "does not name a coordinator"),
    ],
)
def test_what_does_not_fit_is_answered(env, flags, words):
    with pytest.raises(UserError, match=words):
        find_cluster(env, *flags)


def test_a_cluster_that_is_not_there_is_answered():
    with pytest.raises(UserError, match="cannot join the other processes"):
        initialize(Cluster())
    initialize(None)  # a process on its own has nobody to wait for
    assert jax.process_count() == 1


def test_alone_everybody_agrees():
    def fail():
        raise UserError("no")

    assert agree(lambda: 3) == 3 and agree(lambda: 3, main_only=True) == 3
    with pytest.raises(UserError, match="no"):
        agree(fail)
    assert np.asarray(any_process(True)) == 1 and np.asarray(any_process(False)) == 0
