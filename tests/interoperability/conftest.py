"""Third-party warnings that a user does not see either, each by its message."""

import os

import pytest

_OF_OTHERS = (
    "ignore:Use `@` matmul instead of:PendingDeprecationWarning",  # rasterio on affine 3
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",
)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            for message in _OF_OTHERS:
                item.add_marker(pytest.mark.filterwarnings(message), append=False)
