"""Patience with foreign chat templates: these tests run beside others."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded machine may need more than the two seconds that a template gets to render."""
    monkeypatch.setattr("solollm.chat_template.RENDER_SECONDS", 30.0)
