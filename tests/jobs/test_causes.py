"""Causes of failed jobs, from log texts as users of Slurm and PyTorch have reported them; each names its source."""

from __future__ import annotations

import pytest

from mama.jobs.causes import cause_of

TRACEBACK = """\
submitit ERROR (2026-08-22 02:06:11,453) - Submitted job triggered an exception
Traceback (most recent call last):
  File "/env/lib/python3.11/site-packages/submitit/core/submission.py", line 55, in process_job
    result = delayed.result()
             ^^^^^^^^^^^^^^^^
"""
# log of the only task -> cause
REPORTED = {
    # chrisknewman/tusas#149
    """slurmstepd: error: Detected 1 oom_kill event in StepId=440575.0. Some of the step tasks have been OOM Killed.
srun: error: nid001277: tasks 1-3: Out Of Memory
srun: Terminating StepId=440575.0
slurmstepd: error: *** STEP 440575.0 ON nid001277 CANCELLED AT 2023-12-05T07:16:01 ***
""": "out of memory on nid001277 (rank 1-3); raise mem_gb",
    # ArjunaCluster/ArjunaUsers#52, RickKessler/SNANA#199
    """/var/spool/slurmd/job00191/slurm_script: line 28:  8156 Killed                  python3 main.py --prop hform
slurmstepd: error: Detected 1 oom-kill event(s) in StepId=191.batch cgroup. Some of your processes may have been killed
""": "out of memory on the node; raise mem_gb",
    """/tmp/slurmd/job3361579/slurm_script: line 20: 42150 Killed                  snlc_fit.exe /scratch/midway2/x.nml
slurmstepd-midway2-0320: error: Detected 1 oom-kill event(s) in step 3361579.batch cgroup. Some of your processes
""": "out of memory on the node; raise mem_gb",
    # pytorch/pytorch#16417, as torch has written it since 2.5
    TRACEBACK + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity "
    "of 23.65 GiB of which 11.06 MiB is free. Including non-PyTorch memory, this process has 23.60 GiB memory in use.\n"
    : "out of memory on the GPU: Tried to allocate 22.00 MiB",
    # OPIXray-author/OPIXray#5, as torch wrote it before
    TRACEBACK + "RuntimeError: CUDA out of memory. Tried to allocate 264.00 MiB (GPU 0; 2.00 GiB total capacity)\n"
    : "out of memory on the GPU: Tried to allocate 264.00 MiB",
    # SystemsGenetics/GEMmaker#242; ZettaAI/zetta_utils#671; bcbio/bcbio-nextgen#741
    "slurmstepd: error: *** JOB 32391783 ON cn119 CANCELLED AT 2021-06-18T13:05:36 DUE TO PREEMPTION ***\n"
    : "preempted, and not coming back",
    """srun: Job step aborted: Waiting up to 47 seconds for job step to finish.
slurmstepd: error: *** JOB 494583 ON cn2 CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***
slurmstepd: error: *** STEP 494583.0 ON cn2 CANCELLED AT 2024-04-20T09:09:37 DUE TO TIME LIMIT ***
""": "time limit, and not coming back",
    "slurmstepd: *** JOB 1479012 CANCELLED AT 2015-02-04T06:33:25 *** on sh-2-3\n": "cancelled",
    # slurmd's own text (src/slurmd/slurmd/req.c)
    "slurmstepd: error: *** JOB 12 ON n2 CANCELLED AT 2026-01-02T03:04:05 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR "
    "DETAILS ***\n": "node failure",
    # jade-hpc-gpu/jade-hpc-gpu.github.io#194
    TRACEBACK + """RuntimeError: CUDA error: uncorrectable ECC error encountered
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1.
""": "GPU error: uncorrectable ECC error encountered",
    # wilicc/gpu-burn#1
    "[74889.644138] NVRM: Xid (PCI:0000:02:00): 79, GPU has fallen off the bus.\n"
    : "GPU error: Xid 79, GPU has fallen off the bus.",
    # vllm-project/vllm#39015
    TRACEBACK + "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
    "address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use\n"
    : "port 29500 is in use on the first node",
    # meta-pytorch/torchtune#392
    TRACEBACK + "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
    "address. The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use). The server "
    "socket has failed to bind to 0.0.0.0:29500 (errno: 98 - Address already in use).\n"
    : "port 29500 is in use on the first node",
    # hiyouga/LlamaFactory#5155
    TRACEBACK + "safetensors_rust.SafetensorError: Error while serializing: IoError(Os { code: 28, kind: StorageFull, "
    'message: "No space left on device" })\n'
    : "disk full: safetensors_rust.SafetensorError: Error while serializing: IoError(Os { code: 28, kind: StorageFull, "
      'message: "No space left on device" })',
    # open-mmlab/mmdetection#12069
    TRACEBACK + "OSError: [Errno 122] Disk quota exceeded\n": "disk full: OSError: [Errno 122] Disk quota exceeded",
    # h2oai/h2o-llmstudio#214
    TRACEBACK + "RuntimeError: [enforce fail at inline_container.cc:471] . PytorchStreamWriter failed writing file "
    "data/228: file write failed\n": "disk full: RuntimeError: [enforce fail at inline_container.cc:471] . "
    "PytorchStreamWriter failed writing file data/228: file write failed",
    # pytorch/pytorch#108861
    TRACEBACK + "RuntimeError: DataLoader worker (pid 11011) is killed by signal: Bus error. It is possible that "
    "dataloader's workers are out of shared memory. Please try to raise your shared memory limit.\n"
    : "out of shared memory (/dev/shm)",
    # envmodules/modules#339
    "/var/spool/slurmd/job00156/slurm_script: line 4: ml: command not found\n": "environment: ml: command not found",
    "slurmstepd: error: execve(): ml: No such file or directory\n"
    "srun: error: cm-wsb-c8m16d200-1: task 0: Exited with exit code 2\n": "environment: ml: No such file or directory",
    TRACEBACK + "ModuleNotFoundError: No module named 'deepspeed'\n": "environment: No module named 'deepspeed'",
    TRACEBACK + "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory\n"
    : "environment: libcudart.so.12: cannot open shared object file: No such file or directory",
    # hkproj/pytorch-transformer-distributed#1
    """torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1333, \
unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.18.6
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host
""": "NCCL: unhandled system error (ncclSystemError) socketStartConnect: Connect to 192.168.19.14<52822> failed : No "
     "route to host",
    # NVIDIA/nccl#2076
    """torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, \
remote process exited or there was a network error, NCCL version 2.21.5
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
Last error:
socketProgressOpt: Call to recv from 172.1.1.2<33759> failed : Connection reset by peer
""": "NCCL: the connection to another rank broke: socketProgressOpt: Call to recv from 172.1.1.2<33759> failed : "
     "Connection reset by peer",
    # XPixelGroup/BasicSR#737
    "[rank1]:[E626 06:24:44.903881913 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=808, OpType=ALLREDUCE, NumelIn=9801523, NumelOut=9801523, Timeout(ms)=600000) ran for 600020 "
    "milliseconds before timing out.\n": "NCCL: rank 1 waited 600 s in ALLREDUCE number 808 for another rank",
    # pytorch/pytorch#75512
    TRACEBACK + "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:598] Connection closed by peer "
    "[18.25.6.30]:28048\n": "gloo: Connection closed by peer [18.25.6.30]:28048",
    # OpenRLHF/OpenRLHF#1040
    TRACEBACK + "torch.distributed.DistStoreError: Timed out after 1801 seconds waiting for clients. 1/3 clients "
    "joined.\n"
    : "the ranks did not find each other: Timed out after 1801 seconds waiting for clients. 1/3 clients joined.",
    # hafs-community/HAFS#101
    "srun: error: Orion-18-69: task 289: Bus error\nsrun: Terminating job step 3495450.0\n"
    "slurmstepd: error: *** STEP 3495450.0 ON orion-01-04 CANCELLED AT 2021-10-27T20:22:22 ***\n"
    : "rank 289 on Orion-18-69 crashed: Bus error",
}  # fmt: skip


@pytest.mark.parametrize(("log", "cause"), REPORTED.items())
def test_a_reported_log_has_this_cause(log: str, cause: str) -> None:
    assert cause_of({0: log}, "FAILED") == cause
    prefixed = "".join(
        f"[rank0]: {line}\n" if not line.startswith("[rank") else f"{line}\n" for line in log.splitlines()
    )
    if "Traceback" in log:
        assert cause_of({0: prefixed}, "FAILED") == cause


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "mama.errors.TrainingError: runs/x: the checkpoint of step 5 cannot be written ([Errno 28] No space left "
            "on device); free disk space and run again",
            "runs/x: the checkpoint of step 5 cannot be written ([Errno 28] No space left on device); free disk space "
            "and run again",
        ),
        ("mama.errors.ConfigError: optim.lr: -1 is not positive", "optim.lr: -1 is not positive"),
        ("shards.errors.ShardError: shards/train-000001.tar: is damaged", "data: shards/train-000001.tar: is damaged"),
        ("slurm.profile.SlurmError: no sbatch", "no sbatch"),
        ("ValueError: bad\nthing", "ValueError: bad"),
        ("mama.errors.RankError: rank 1 failed: KeyError: 'a'\nTraceback (most recent call last):\nKeyError: 'a'",
         "rank 1 failed: KeyError: 'a'"),
        ("mama.errors.RankError: rank 1 failed: Signal 9 (SIGKILL) received by PID 77",
         "rank 1 was killed (SIGKILL), most often for want of memory"),
        ("mama.errors.RankError: rank 1 failed: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
         "out of memory on the GPU: Tried to allocate 2 GiB"),
    ],
)  # fmt: skip
def test_the_message_of_an_exception_is_the_cause(log: str, cause: str) -> None:
    assert cause_of({0: f"{TRACEBACK}{log}\n"}) == cause


def test_a_line_of_the_command_line_is_the_cause() -> None:
    assert (
        cause_of({0: "epoch 1\nmama: data.shards: is empty; name a folder\n"}) == "data.shards: is empty; name a folder"
    )


def test_the_chain_of_exceptions_ends_in_our_own_message() -> None:
    log = (
        "OSError: [Errno 28] No space left on device\n\nThe above exception was the direct cause of the following "
        f"exception:\n\n{TRACEBACK}mama.errors.TrainingError: runs/x: the checkpoint cannot be written\n"
    )
    assert cause_of({0: log}) == "runs/x: the checkpoint cannot be written"


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", "time limit, and not coming back"),
        ("PREEMPTED", "preempted, and not coming back"),
        ("NODE_FAIL", "node failure"),
        ("OUT_OF_MEMORY", "out of memory on the node; raise mem_gb"),
        ("CANCELLED", "cancelled"),
        ("FAILED", ""),
        ("", ""),
    ],
)
def test_the_state_of_slurm_is_enough_where_it_says_why(state: str, cause: str) -> None:
    assert cause_of({0: "train: 3/10 steps\n"}, state) == cause
    assert cause_of({}, state) == cause


GLOO = "RuntimeError: [pair.cc:598] gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:28048\n"
WAITED = "mama.errors.TrainingError: the ranks have waited too long for each other: rank 0 (n1, pid 3) was in step 5\n"
LOST = (TRACEBACK + GLOO, TRACEBACK + WAITED, "Traceback (most recent call last):\nKeyboardInterrupt\n")


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_cause_is_that_of_the_rank_that_failed_and_not_of_those_it_took_down(
    lost: str, order: tuple[int, ...]
) -> None:
    logs = {0: lost, 1: lost, 2: TRACEBACK + "ZeroDivisionError: division by zero\n"}
    assert cause_of({rank: logs[rank] for rank in order}) == "rank 2: ZeroDivisionError: division by zero"


def test_of_two_errors_that_of_the_task_counts_that_srun_saw_first() -> None:
    own = [TRACEBACK + f"ValueError: of {number}\n" for number in "abcd"]
    own[0] += (
        "srun: error: n1: tasks 2-3: Exited with exit code 1\nsrun: Terminating StepId=7.0\n"
        "srun: error: n1: tasks 0-1: Exited with exit code 1\n"
    )
    assert cause_of(dict(enumerate(own))) == "rank 2: ValueError: of c"


def test_without_srun_it_is_that_of_the_log_that_ended_first() -> None:
    logs = {1: "KeyError: 'one'\n", 0: "KeyError: 'nought'\n"}
    assert cause_of(logs) == "rank 1: KeyError: 'one'"


# facebookincubator/submitit#1708
REQUEUED = """\
submitit WARNING (2022-08-12 02:06:11,453) - Caught signal SIGUSR2 on SERVER_NAME: this job is preempted.
slurmstepd: error: *** JOB 608 ON SERVER_NAME CANCELLED AT 2022-08-12T02:06:12 DUE TO JOB REQUEUE ***
slurmstepd: error: *** STEP 608.0 ON SERVER_NAME CANCELLED AT 2022-08-12T02:06:12 DUE TO JOB REQUEUE ***
submitit WARNING (2022-08-12 02:06:12,299) - Bypassing signal SIGCONT
submitit WARNING (2022-08-12 02:06:12,301) - Bypassing signal SIGTERM
slurmstepd: error: Failed to send MESSAGE_TASK_EXIT: Connection refused
srun: error: SERVER_NAME: tasks 2-3: Exited with exit code 1
"""


def test_an_earlier_start_of_the_job_is_not_its_cause() -> None:
    earlier = TRACEBACK + "KeyError: 'earlier'\n" + REQUEUED
    assert cause_of({0: earlier + TRACEBACK + "KeyError: 'later'\n"}) == "KeyError: 'later'"
    assert cause_of({0: earlier + "resumed from step 3\n"}) == "it was requeued, and did not come back"
    preempted = REQUEUED.replace("JOB REQUEUE", "PREEMPTION")
    assert cause_of({0: earlier + preempted}) == "preempted, and not coming back"


def test_a_warning_is_no_cause() -> None:
    quiet = (
        "[W socket.cpp:426] [c10d] The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in "
        "use).\nUserWarning: the cache is off: No space left on device\ntrain: 40/40 steps, done\n"
    )
    assert cause_of({0: quiet, 1: ""}) == ""


def test_a_cause_is_one_line_of_bounded_length() -> None:
    cause = cause_of({0: f"mama.errors.ConfigError: a\x1b[31m\tb {'x' * 1000}\n"})
    assert "\x1b" not in cause
    assert len(cause) == 300
    assert cause.startswith("a [31m b x")
