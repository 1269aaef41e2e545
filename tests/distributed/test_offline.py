import os
from importlib import import_module

import pytest

from srepa_ds.distributed.offline import stay_offline

NAMES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")


@pytest.fixture
def unset(monkeypatch):
    for name in NAMES:
        # Set first, so that it is restored.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("arguments", "is_offline"),
    [
        (["train", "x"], True),
        (["--version"], True),
        ([], True),
        (["fetch", "x"], False),
        (["export", "x"], True),
        (["export", "x", "--push", "owner/name"], False),
        (["export", "--push=owner/name", "x"], False),
        (["train", "--push"], True),
    ],
)
def test_all_commands_but_fetch_and_a_push_stay_off_the_network(unset, arguments, is_offline):
    stay_offline(arguments)
    assert ("HF_HUB_OFFLINE" in os.environ) == is_offline
    assert all(os.environ[name] == "1" for name in NAMES[1:])


def test_a_choice_of_the_user_stays(unset):
    unset.setenv("HF_HUB_OFFLINE", "0")
    stay_offline(["train", "x"])
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_library_changes_no_variable(unset):
    for name in ("srepa_ds.cli", "srepa_ds.encoders.published"):
        import_module(name)
    assert not any(name in os.environ for name in NAMES)
