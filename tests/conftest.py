"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data():
    """Path of a file or folder that is no part of the project (large or third-party data); skips where it is absent.

    EVNAS_TEST_DATA names the folder they are in; without it, `shared/data` beside the project is looked at.
    """
    folder = Path(os.environ.get("EVNAS_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared/data")

    def find(name):
        if not (folder / name).exists():
            pytest.skip(f"needs {name}, which is not in {folder} (EVNAS_TEST_DATA names the folder)")
        return folder / name

    return find
