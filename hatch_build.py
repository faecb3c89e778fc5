"""Writes the commit into the package when a release is built, for `trainer --version`."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """A wheel that is built from an sdist takes the sdist's commit, since there is no checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add trainer/commit.txt where the project is a checkout."""
        root = Path(self.root)
        if version == "editable" or not (root / ".git").exists():
            return
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        file = Path(self.directory) / "commit.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(commit + "\n")
        build_data["force_include"][str(file)] = "trainer/commit.txt"
