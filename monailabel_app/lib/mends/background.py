"""MONAI Label starts background tasks that cannot succeed, and answers 200; until test_mends.py::test_background.

Training, scoring and batches run in a process of their own, whose failure shows in its log alone. Here the app is asked first.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Let the app's ``check_background`` refuse what MONAI Label would start."""
    from monailabel.interfaces.utils.app import app_instance
    from monailabel.utils.async_tasks.task import AsyncTask

    start = AsyncTask.run

    def run(method: str, request=None, params=None, force_sync=False, enqueue=False) -> Any:
        app_instance().check_background(method, {**(request or {}), **(params or {})})
        return start(method, request, params, force_sync, enqueue)

    AsyncTask.run = staticmethod(run)
