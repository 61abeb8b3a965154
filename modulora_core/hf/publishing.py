"""Save a packed model with a model card, and upload it to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from modulora_core.checkpoints.model_card import FILE, model_card
from modulora_core.checkpoints.outputs import DIGESTS
from modulora_core.checkpoints.packed_modules import current_record


class Publishing:
    """``save_pretrained`` and ``push_to_hub`` of a packed model."""

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write the packed folder that :func:`modulora_core.load_model` opens, with a README.md.

        With an adapter of PEFT on the model, transformers writes the adapter alone.

        Args:
            options: of transformers' ``save_pretrained``. Names stay as they are in memory, since
                packed tensors can't be split into the original ones.
        """
        model: Any = self
        its_own: Any = super()
        described = model.config.quantization_config
        described.record = model.hf_quantizer.quantization_config.record = current_record(
            model, described.record
        )
        its_own.save_pretrained(save_directory, **options | {"save_original_format": False})
        folder = Path(save_directory)
        if not options.get("is_main_process", True):
            return
        if (folder / "config.json").is_file():  # else an adapter
            (folder / DIGESTS).unlink(missing_ok=True)  # of the files that were replaced
            (folder / FILE).write_text(model_card(described.record))
        if push_to_hub:
            upload(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what ``save_pretrained`` writes, and return the commit's address.

        Args:
            options: of transformers' ``push_to_hub``.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            return upload(folder, repo_id, **options)


def upload(folder: str | Path, repo_id: str | None = None, **options: Any) -> str:
    """Upload a folder to a model repository, which is made if it is missing.

    A README.md that the repository has stays, since somebody may have edited it.

    Args:
        repo_id: the folder's name if it is None.
        options: ``token``, ``private``, ``revision``, ``create_pr``, ``commit_message`` and
            ``commit_description``, as of ``HfApi.upload_folder``; others are left out.

    Returns:
        the commit's address.
    """
    api, revision = HfApi(token=options.get("token")), options.get("revision")
    made = api.create_repo(
        repo_id or Path(folder).name, private=options.get("private"), exist_ok=True
    )
    has_card = api.file_exists(made.repo_id, FILE, revision=revision)
    commit = api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message=options.get("commit_message") or "Upload model",
        commit_description=options.get("commit_description"),
        revision=revision,
        create_pr=options.get("create_pr", False),
        ignore_patterns=[FILE] if has_card else None,
    )
    return str(commit.commit_url)
