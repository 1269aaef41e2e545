"""`PretrainedSiT`: an exported model with the methods of the Hugging Face Hub's libraries."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download

from srepa_ds.errors import CheckpointError
from srepa_ds.fetching.hub_errors import Action, explained
from srepa_ds.files import write_aside, writing
from srepa_ds.model.sit import SiT
from srepa_ds.weights.exported import CARD, ExportDocument, read_model, write_model
from srepa_ds.weights.pushing import Push, push_model

LIBRARY = "srepa_ds"
TAGS = ("diffusion", "flow-matching", "sit", "srepa")
"""What finds these models on the Hub."""

_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_DISK = "free some space, or give cache_dir another folder"


class PretrainedSiT(SiT, ModelHubMixin, library_name=LIBRARY, tags=list(TAGS)):
    """A SiT with the experiment that trained it; its folders are those of `srepa-ds export`.

    `forward` is that of `SiT`: it takes latents, times (1 is noise) and labels.
    """

    def __init__(self, model: SiT, document: ExportDocument):
        """Takes the weights of `model`, frozen, and what `document` says of them."""
        with torch.device("meta"):
            super().__init__(model.config)
        self.load_state_dict(model.state_dict(), assign=True)
        self.eval().requires_grad_(False)
        self.document = document

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **model_kwargs: Any,
    ) -> "PretrainedSiT":
        """Returns the model of a folder, or of a repository (`owner/name`) at `revision`.

        The weights are compared with the hash that was written with them; nothing is unpickled.
        Raises CheckpointError for a folder or repository without a whole model, DataError for a Hub
        that cannot be used.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            found = read_model(Path(name))
            return cls(found.model, found.document)
        with explained(Action(name, revision, disk_advice=_DISK)):
            return super().from_pretrained(
                name,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
                **model_kwargs,
            )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> "PretrainedSiT":
        """Downloads a repository and returns its model, for `from_pretrained`."""
        folder = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=list(_FILES),
        )
        try:
            found = read_model(Path(folder))
        except CheckpointError as error:
            advice = "if the download was damaged, download again with force_download=True"
            raise CheckpointError(f"{model_id}: {error}; {advice}") from error
        return cls(found.model, found.document)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes the model as `srepa-ds export` does; returns the commit's address after a push.

        `config` is ignored: the experiment's is written. A model card that is there stays. Raises
        OutputError if the folder holds anything else or cannot be written.
        """
        # Not the mixin's, which removes the configuration of an earlier model before it writes.
        folder = Path(save_directory)
        self._save_pretrained(folder)
        card = folder / CARD
        if not card.exists():
            with writing(card, cure="choose another folder, or make room"):
                text = str(self.generate_model_card())
                write_aside(card, lambda aside: aside.write_text(text, encoding="utf-8"))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, **push_to_hub_kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_model(
            save_directory,
            self.state_dict(),
            config=self.document.config,
            provenance={**self.document.provenance, "dtype": "fp32"},
        )

    # Not all that the mixin takes: a push to another branch, or of some files, is no whole model.
    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        replace: bool = False,
    ) -> str:
        """Uploads the model in one commit, and returns the commit's address.

        A model card that is there stays. The token is that of `HF_TOKEN` or of `hf auth login`.
        Raises OutputError as `srepa-ds export --push` does: also for a repository with a model of
        another run, unless `replace`.
        """
        message = commit_message or f"step {self.document.provenance['step']}"
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            push = Push(repo_id, is_private=bool(private))
            # That of an export says more.
            pushed = push_model(
                Path(folder), push, message=message, replace=replace, keeps_card=True
            )
        return f"{pushed.address}/commit/{pushed.commit}"

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Returns a short card; `srepa-ds export` writes one about the whole run."""
        data = ModelCardData(library_name=LIBRARY, tags=list(TAGS), license="other")
        facts = self.document.provenance
        return ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {self.config.variant}\n\n"
            f"The weights `{facts['weights']}` of step {facts['step']}. Load them with "
            "`srepa_ds.weights.hub.PretrainedSiT.from_pretrained`.\n"
        )
