"""The micro model and the data of the end-to-end tests, for runs of several ranks."""

from tests.end_to_end.conftest import bench as bench
