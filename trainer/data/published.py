"""The published FineWeb export, fetched from the Hugging Face Hub into the Hub's own cache."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from trainer.data.retokenize import MarkedCopy
from trainer.data.shards import open_shard
from trainer.data.source import PreparedText, Source
from trainer.errors import UserError, first_line
from trainer.files import sha256_of
from trainer.logging import counted, logger

MANIFEST = "datasets/manifest.json"
CHALLENGE = "willdepueoai/parameter-golf"
# The challenge publishes the vocabulary of 1,024; an entrant, Kevin Clark, published larger ones of the same text.
PUBLISHERS = dict.fromkeys(("fineweb10B_sp4096", "fineweb10B_sp8192"), "kevclark/parameter-golf")
USUAL_SPEED = 20e6  # bytes per second, for a first idea of the time


class Published(NamedTuple):
    """What the Hub says of a file: its bytes, and its sha256 where it is a large one."""

    size: int
    sha256: str | None


class PublishedFineWeb(Source):
    """The challenge's tokenized FineWeb, downloaded once.

    The files stay in the Hub's cache, whose settings apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Names and
    layout come from the manifest in openai/parameter-golf's dataset.
    """

    def __init__(
        self,
        variant: str = "fineweb10B_sp1024",
        train_shards: int | None = 10,
        repo_id: str | None = None,
        revision: str = "main",
        parallel_files: int = 8,
    ) -> None:
        """Fetch the first training shards and the whole validation split of one export.

        Args:
            variant: Name of the export, which determines its tokenizer.
            train_shards: Number of training shards, each of 100 million tokens (200 MB); null: all.
            repo_id: Name of the dataset on the Hub. null: the one that is known to have the variant.
            revision: Branch, tag or commit of the dataset.
            parallel_files: Number of files downloaded at once.
        """
        self.variant = variant
        self.train_shards = train_shards
        self.repo_id = repo_id or PUBLISHERS.get(variant, CHALLENGE)
        self.revision = revision
        self.parallel_files = parallel_files

    def check(self) -> None:
        """Refuse fewer than one shard."""
        if self.train_shards is not None and self.train_shards < 1:
            raise UserError(f"data.source.train_shards must be at least 1, or null for all, not {self.train_shards}")
        if self.case_markup:
            self._copy().check()

    def is_prepared(self) -> bool:
        """Whether there is a copy with case markup, where one is asked for."""
        return not self.case_markup or self._copy().is_prepared()

    def known_vocab_size(self) -> int | None:
        """The number that ends the names of the challenge's exports; of a copy with case markup, that of the model."""
        if self.case_markup:
            return None
        named = re.search(r"_sp(\d+)$", self.variant)
        return int(named[1]) if named else None

    def prepare(self, only_if_missing: bool = False) -> None:
        """Download what is missing, and compare it with the hashes that are published.

        Size and header of every shard are checked each time, and a damaged one is downloaded again.

        Raises:
            UserError: If the export or that number of shards does not exist, the disk has no space for it, or the
                download fails.
        """
        self.check()
        if self.case_markup and self._copy().is_prepared():
            return
        text = self._find(local=False)
        damaged = [path for path in [*text.train, *text.val] if not _is_whole(path)]
        for path in damaged:
            logger.warning(f"{path}: is damaged; it is downloaded again")
            path.resolve().unlink()  # the cache stores contents and names separately
            path.unlink(missing_ok=True)
        if damaged:
            self._find(local=False)
        for path in damaged:
            open_shard(path)
        if self.case_markup:
            self._copy().prepare(only_if_missing)

    def prepared(self) -> PreparedText:
        """The shards in the cache, without asking the network, or their copy."""
        return self._copy().prepared() if self.case_markup else self._find(local=True)

    def _copy(self) -> MarkedCopy:
        return MarkedCopy(self.variant, lambda: self._find(local=True), self.model_vocab_size)

    def _find(self, local: bool) -> PreparedText:
        """Files of the export, downloaded unless `local`."""
        folder = self._fetch([MANIFEST], self.revision, local)
        dataset, tokenizer = self._entries(folder / MANIFEST)
        available, validation = dataset["stats"]["files_train"], dataset["stats"]["files_val"]
        count = available if self.train_shards is None else self.train_shards
        if not 1 <= count <= available:
            raise UserError(
                f"data.source.train_shards is {count}, but {self.variant} in {self.repo_id} has {available}; "
                f"give 1 to {available}, or null for all"
            )
        names = {
            "train": [f"{self.variant}/fineweb_train_{number:06d}.bin" for number in range(count)],
            "val": [f"{self.variant}/fineweb_val_{number:06d}.bin" for number in range(validation)],
            "tokenizer": [tokenizer["model_path"]],
        }
        wanted = [name for group in names.values() for name in group]
        missing = [] if local else [name for name in wanted if not list(folder.rglob(name))]
        published = self._announce(folder.name, missing, len(wanted)) if missing else {}
        # The snapshot's folder is named by its commit, so the files belong together even if the branch moves meanwhile.
        self._fetch([f"*/{name}" for name in wanted], folder.name, local)
        paths = {group: [self._only(folder, name) for name in members] for group, members in names.items()}
        for name, file in published.items():
            self._check_content(folder / name, file)
        return PreparedText(paths["train"], paths["val"], paths["tokenizer"][0])

    def _entries(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """The manifest's entries of the export and of its tokenizer."""
        if not path.is_file():
            raise UserError(f"{self.repo_id}: has no {MANIFEST}; check data.source.repo_id and data.source.revision")
        try:
            manifest = json.loads(path.read_text())
            datasets = {entry["name"]: entry for entry in manifest["datasets"]}
            tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
            if self.variant in datasets:
                entry = datasets[self.variant]
                int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
                return entry, {"model_path": str(tokenizers[entry["tokenizer_name"]]["model_path"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a manifest of the challenge's data ({error!r})") from error
        known = ", ".join(sorted(datasets)) or "none"
        raise UserError(f"data.source.variant {self.variant!r} is not in {self.repo_id}; there are: {known}")

    def _announce(self, commit: str, missing: list[str], count: int) -> dict[str, Published]:
        """Say how much is downloaded, and where to; what the Hub says of the files, by their path in the dataset.

        Raises:
            UserError: If the disk has no space for it.
        """
        try:
            api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT)
            tree = api.list_repo_tree(self.repo_id, repo_type="dataset", revision=commit, recursive=True)
            listed = [each for each in tree if isinstance(each, huggingface_hub.RepoFile)]
            files = {
                each.path: Published(each.size, each.lfs.sha256 if each.lfs else None)
                for each in listed
                if any(each.path.endswith(f"/{name}") for name in missing)
            }
        except Exception as error:  # the Hub's HTTP library, and with it the classes, differs between its versions
            raise UserError(
                f"{self.repo_id}: is not completely in the Hub's cache, and its list of files cannot be read "
                f"({first_line(error)}); go online once and run `trainer prepare`, or use another data.source"
            ) from error
        size, cache = sum(each.size for each in files.values()), Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        logger.info(
            f"downloading {len(missing)} of {counted(count, 'file')} of {self.variant} from {self.repo_id}: "
            f"{size / 1e9:.2f} GB into {cache} ({free / 1e9:.0f} GB free); at 20 MB/s that takes "
            f"{size / USUAL_SPEED / 60:.0f} minutes"
        )
        if size > free:
            raise UserError(
                f"{cache}: has {free / 1e9:.2f} GB free, and {size / 1e9:.2f} GB are to be downloaded; set HF_HOME to "
                "a larger disk, or lower --data.source.train_shards"
            )
        return files

    def _check_content(self, path: Path, published: Published) -> None:
        """Compare a file that was just downloaded with what the Hub says of it.

        Raises:
            UserError: If it is another content; it is removed.
        """
        if published.sha256 is None or (found := sha256_of(path)) == published.sha256:
            return
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path.name}: what was downloaded is not what {self.repo_id} publishes (sha256 {found[:12]}..., "
            f"published {published.sha256[:12]}...); it was removed, run the command again"
        )

    def _only(self, folder: Path, name: str) -> Path:
        matches = list(folder.rglob(name))
        if len(matches) != 1:
            raise UserError(
                f"{self.repo_id}: its manifest promises {name}, but the repository has {len(matches)} such files; "
                "try another data.source.revision"
            )
        return matches[0]

    def _fetch(self, patterns: list[str], revision: str, local: bool) -> Path:
        """Folder of the snapshot with the files of these patterns."""
        try:
            folder = huggingface_hub.snapshot_download(
                self.repo_id,
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
                max_workers=self.parallel_files,
                local_files_only=local,
            )
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{self.repo_id}: is not completely in the Hub's cache and {constants.ENDPOINT} cannot be reached; "
                "go online once and run `trainer prepare`, or use another data.source"
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(f"{self.repo_id}: has no revision {revision}; set data.source.revision to main") from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"{self.repo_id}: there is no such dataset, or it is not public; "
                "check data.source.repo_id, or set HF_TOKEN"
            ) from error
        except Exception as error:  # the Hub's HTTP library, and with it the classes, differs between its versions
            raise UserError(
                f"{self.repo_id}: the download failed ({first_line(error)}); run it again, what has arrived is kept"
            ) from error
        return Path(folder)


def _is_whole(path: Path) -> bool:
    try:
        open_shard(path)
    except UserError:
        return False
    return True
