"""Writes the commit into the package when a release is built, for `trainer --version`."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):
    """A wheel that is built from an sdist takes the sdist's commit, since there is no checkout."""

    folder = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add trainer/commit.txt where the project is a checkout that git can read."""
        root = Path(self.root)
        if version == "editable" or not (root / ".git").exists():
            return
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return
        self.folder = tempfile.mkdtemp()
        file = Path(self.folder) / "commit.txt"
        file.write_text(commit + "\n")
        build_data["force_include"][str(file)] = "trainer/commit.txt"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the file."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
