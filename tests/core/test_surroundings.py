"""Torchrun's, Slurm's and Open MPI's variables."""

import pytest

from trainingcompiler.errors import UsageError
from trainingcompiler.processes import cluster_env
from trainingcompiler.processes.cluster_env import Worker

TORCHS = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SLURMS = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
MPIS = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
WORKER = Worker(rank=3, world_size=4, local_rank=1, local_world_size=2)


def test_alone():
    assert cluster_env.read({}) is None
    assert cluster_env.read({"RANK": "0"}) is None  # somebody else's


@pytest.mark.parametrize("environ", [{**TORCHS, **MASTER}, SLURMS, MPIS], ids=["torch", "slurm", "mpi"])
def test_each_source(environ):
    found = cluster_env.read(environ)
    assert (found.worker, found.node_rank) == (WORKER, 1)


def test_where_rank_0_is():
    assert cluster_env.read({**TORCHS, **MASTER}).master == ("a", 29500)
    assert cluster_env.read(TORCHS).master is None
    host, port = cluster_env.read(SLURMS).master
    assert host == "gpu07" and 20000 <= port < 32000
    assert cluster_env.read({**SLURMS, "SLURM_STEP_ID": "1"}).master[1] != port
    assert cluster_env.read(MPIS).master is None
    uri = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"
    assert cluster_env.read({**MPIS, "OMPI_MCA_orte_hnp_uri": uri}).master[0] == "10.96.0.1"
    local = {**MPIS, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert cluster_env.read(local).master[0] == "127.0.0.1"


def test_a_worker_without_a_local_rank_is_alone_on_its_host():
    found = cluster_env.read({"RANK": "1", "WORLD_SIZE": "2", **MASTER})
    assert found.worker == Worker(rank=1, world_size=2, local_rank=0, local_world_size=1)


def test_a_batch_script_is_no_task():
    batch = {name: value for name, value in SLURMS.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    assert cluster_env.read(batch) is None
    assert cluster_env.read({**SLURMS, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_a_launcher_between_has_the_last_word():
    found = cluster_env.read({**SLURMS, **TORCHS, "RANK": "2", "TORCHELASTIC_RUN_ID": "x"})
    assert found.worker.rank == 2


def test_sources_that_agree():
    assert cluster_env.read({**TORCHS, **SLURMS, **MPIS}).worker == WORKER


def test_sources_that_disagree_are_both_shown():
    with pytest.raises(UsageError) as refused:
        cluster_env.read({**SLURMS, "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"})
    assert str(refused.value) == (
        "two sources disagree on which worker this is: RANK=0 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=4, but "
        "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NODEID=1. Unset the variables of the one that does not "
        "hold"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "4"}, "these do not fit together: RANK=4 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2; ranks begin "
         "with 0"),
        ({"RANK": "one"}, "RANK=one: must be a whole number, 0 or more"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is not set, though others say that this is one of several"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x: must be a whole number"),
    ],
)  # fmt: skip
def test_mistakes(changed, said):
    with pytest.raises(UsageError) as refused:
        cluster_env.read({**TORCHS, **MASTER, **changed})
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("gpu[07-09,12],login", ["gpu07", "gpu08", "gpu09", "gpu12", "login"]),
        ("rack1-n[1-2]-ib,b[3]", ["rack1-n1-ib", "rack1-n2-ib", "b3"]),
    ],
)
def test_lists_of_hosts(text, expected):
    assert list(cluster_env.hosts(text)) == expected
    assert cluster_env.first_host(text) == expected[0]


def test_tasks_per_node():
    assert cluster_env.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
