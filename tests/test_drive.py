"""One run of many that fails fails the tests that read it, and no other."""

from pathlib import Path

import conftest
import pytest
from conftest import case, finished, losses


def test_a_failed_run_fails_what_reads_it_alone(drive, settings, tmp_path: Path) -> None:
    """An exception, an unexpected exit code, and runs before, between and after them."""
    steps = [*settings, "train.steps=2"]
    broken = case("baseline", "tiny", tmp_path / "broken", steps) | {"module": "common.errors"}
    cases = [
        case("megatron", "tiny", tmp_path / "first", [*steps, "megatron.tp=2"]),
        broken,
        case("deepspeed", "tiny", tmp_path / "second", [*steps, "deepspeed.zero_stage=3"]),
        case("baseline", "tiny", tmp_path / "refused", [*steps, "train.global_batch=3"]),
        case("baseline", "tiny", tmp_path / "third", steps),
    ]
    drive(cases, 2)
    try:
        first, second, third = (losses(tmp_path / name) for name in ("first", "second", "third"))
        assert sorted(first) == sorted(second) == sorted(third) == [1, 2]
        assert abs(first[2]["loss"] - third[2]["loss"]) <= 1e-5
        messages = {"broken": "'common.errors' has no attribute 'main'", "refused": "exit code 2: .*global_batch"}
        for name, message in messages.items():
            with pytest.raises(pytest.fail.Exception, match=message):
                finished(tmp_path / name)
    finally:
        for name in ("broken", "refused"):
            conftest.FAILED.pop(tmp_path / name, None)
