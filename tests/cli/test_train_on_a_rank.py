"""`dynmoe train` where a launcher has set RANK, with a stand-in for the training itself: messages and certain ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The training is replaced, and a thread that never ends stands for whatever would keep an interpreter from leaving.
RANK = """
import sys, threading, time, types
from dynmoe_ds.errors import DataError
def train(config, should_stop):
    threading.Thread(target=time.sleep, args=(300,)).start()
    print("training", flush=True)
    {body}
module = types.ModuleType("dynmoe_ds.training.run")
module.train = train
package = types.ModuleType("dynmoe_ds.training")
sys.modules.update({{"dynmoe_ds.training": package, "dynmoe_ds.training.run": module}})
from dynmoe_ds.cli import train as verb
from dynmoe_ds.cli.main import main
sys.exit(main(["train", "--local_rank=0", *sys.argv[1:]]))
"""


def start(folder: Path, body: str, *overrides: str, rank: int = 0, world_size: int = 2) -> subprocess.Popen[str]:
    environment = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), DYNMOE_RUN_DIR=str(folder / "run"))
    command = [sys.executable, "-c", RANK.format(body=body), *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        said, complained = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said, complained


def test_another_number_of_ranks_than_configured_is_refused(tmp_path: Path) -> None:
    code, said, complained = end(start(tmp_path, "pass", world_size=4))
    assert code == 2 and said == ""
    assert complained == (
        "[rank 0] parallel.num_ranks is 2 but the launcher started 4. Add parallel.num_ranks=4, or start 2 ranks.\n"
    )


def test_a_users_fault_ends_at_once_with_a_message(tmp_path: Path) -> None:
    code, _, complained = end(start(tmp_path, "raise DataError('No text. Write some.')"))
    assert (code, complained) == (2, "[rank 0] No text. Write some.\n")


def test_garbage_is_collected_in_training_but_not_among_what_was_imported(tmp_path: Path) -> None:
    body = "import gc; print(gc.isenabled(), any(one is sys for one in gc.get_objects()), flush=True)"
    code, said, complained = end(start(tmp_path, f"{body}; raise DataError('Enough.')"))
    assert (code, said.splitlines()[-1]) == (2, "True False"), complained


def test_another_rank_lets_rank_zero_speak_first(tmp_path: Path) -> None:
    process = start(tmp_path, "raise DataError('Only here.')", rank=1)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    begun = time.monotonic()
    code, _, complained = end(process)
    assert (code, complained) == (2, "[rank 1] Only here.\n")
    assert time.monotonic() - begun > 1.5, "longer than the launcher takes to notice that rank 0 has said the same"


def test_a_rank_that_is_stopped_while_it_waits_says_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "raise DataError('Everywhere.')", rank=1)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    time.sleep(0.5)
    process.terminate()
    assert end(process) == (143, "", "")


def test_any_other_error_is_a_traceback_and_a_certain_end(tmp_path: Path) -> None:
    code, _, complained = end(start(tmp_path, "1 / 0", "parallel=single", world_size=1))
    assert code == 1
    assert complained.startswith("[rank 0] Traceback (most recent call last):")
    assert complained.endswith("ZeroDivisionError: division by zero\n")


def test_ctrl_c_interrupts_and_later_signals_do_not_disturb_the_end(tmp_path: Path) -> None:
    body = """
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("closing", flush=True)
        time.sleep(1)
        print("closed", flush=True)
        raise
    """
    process = start(tmp_path, body.strip().replace("\n", "\n"))
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "closing\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "closed\n", "")


def test_both_signals_at_the_same_moment_end_the_run_in_order(tmp_path: Path) -> None:
    body = """
    import signal
    both = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        signal.raise_signal(number)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.1)
        print("closed", flush=True)
        raise
    """
    assert end(start(tmp_path, body.strip())) == (130, "training\nclosed\n", "")


@pytest.mark.parametrize(("rank", "seen"), [(0, "note\nwarning\nerror\n"), (1, "[rank 1] error\n")])
def test_the_log_is_rank_zeros_and_the_errors_of_the_others(rank: int, seen: str, tmp_path: Path) -> None:
    body = """
    import logging
    logger = logging.getLogger("dynmoe_ds.training.trainer")
    logger.info("note"); logger.warning("warning"); logger.error("error")
    logging.getLogger("a.library").info("chatter")
    raise SystemExit(0)
    """
    assert end(start(tmp_path, body.strip(), rank=rank)) == (0, "training\n", seen)


def test_warnings_of_deepspeed_about_its_own_calls_are_not_shown(tmp_path: Path) -> None:
    body = """
    import warnings
    for old, new in (("all_gather_into_tensor", "all_gather_single"), ("other", "another")):
        text = f"`torch.distributed.{old}` is deprecated. Please use `torch.distributed.{new}` instead."
        warnings.warn(text, FutureWarning)
    raise SystemExit(0)
    """
    _, _, complained = end(start(tmp_path, body.strip()))
    assert "all_gather" not in complained and "`torch.distributed.other` is deprecated" in complained


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_ask_the_training_to_stop(number: int, tmp_path: Path) -> None:
    body = """
    while not should_stop():
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(0.5)
    raise SystemExit(85)
    """
    process = start(tmp_path, body.strip())
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)  # the launcher's, after the first rank has left
    assert end(process) == (85, "", "")


def test_a_file_that_asks_the_training_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNMOE_STOP_FILE", f"{tmp_path}/stop")
    process = start(tmp_path, "while not should_stop(): time.sleep(0.01)\n    raise SystemExit(85)")
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    (tmp_path / "stop").touch()
    assert end(process) == (85, "", "")


def test_what_slurm_started_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DYNMOE_RUN_DIR", f"{tmp_path}/run")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "dynmoe_ds", "train"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("[rank 1] parallel.num_ranks is 2 but the launcher started 4. Add parallel.num_ranks")


def test_ctrl_c_ends_a_rank_that_was_asked_to_stop(tmp_path: Path) -> None:
    process = start(tmp_path, "time.sleep(0.5); print('saving', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "")


def test_a_rank_that_is_gone_is_explained_before_the_traceback(tmp_path: Path) -> None:
    error = "RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4190.')"
    code, _, complained = end(start(tmp_path, f"raise {error}", "parallel=single", world_size=1))
    assert code == 1
    first, second = complained.splitlines()[:2]
    assert first.startswith("[rank 0] Another rank (10.0.0.2) has gone: its connection was closed. What that rank or")
    assert "parallel.process_group_timeout_s" in first and "The same command goes on" in first
    assert second == "[rank 0] Traceback (most recent call last):"


def test_an_end_in_order_is_noted_where_the_front_end_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNMOE_EXIT_NOTE", f"{tmp_path / 'note'}")
    assert end(start(tmp_path, "1 / 0", "parallel=single", world_size=1))[0] == 1
    assert not (tmp_path / "note").exists()
    assert end(start(tmp_path, "raise SystemExit(85)"))[0] == 85
    assert (tmp_path / "note").read_text() == "85"


def test_a_rank_whose_front_end_has_gone_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNMOE_FRONT_PID", "999999999")
    assert end(start(tmp_path, "raise SystemExit(85)")) == (1, "", "")


def test_an_exit_asked_for_by_the_training_keeps_its_code(tmp_path: Path) -> None:
    assert end(start(tmp_path, "raise SystemExit(85)"))[0] == 85
