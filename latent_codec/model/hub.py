"""Exchange models with the Hugging Face hub, as folders with model.safetensors and README.md, the model card."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_codec.errors import UserError
from latent_codec.model import file
from latent_codec.model.describe import describe_model, factor_of
from latent_codec.model.file import ModelFile
from latent_codec.model.shipped import resolve
from latent_codec.storage.files import make_folder, write_text
from latent_codec.storage.removal import made_now, remove

MODEL = "model.safetensors"
CARD = "README.md"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Says how a model is uploaded; the fields that are not commented are those of `huggingface_hub.HfApi`."""

    half: bool = False
    """Store float16."""
    private: bool | None = None
    """Visibility of a repository that is created; None for the account's default."""
    revision: str | None = None
    """Branch to commit to, created if there is none."""
    commit_message: str = "Upload model"
    create_pr: bool = False
    """Open a pull request instead of committing to the branch."""
    token: str | bool | None = None
    endpoint: str | None = None


def find(source: str | Path, *, filename: str = MODEL, **options: Any) -> Path:
    """Return the file of a model given by path, by a folder that holds `filename`, by shipped name or as "user/name".

    What is there locally comes first. `options` are those of `huggingface_hub.hf_hub_download`: revision, token,
    cache_dir, local_files_only ... Raises `UserError` if there is no such model, or the hub refuses it.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / filename).is_file():
            raise UserError(f"{source}: no {filename} in it; if it is an AutoencoderKL, use latent-codec import")
        return path / filename
    if path.is_file() or path.suffix == ".safetensors" or not _REPOSITORY.fullmatch(str(source)):
        return resolve(source)
    with hub_errors(str(source), filename):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), filename, **options))


def save(model: ModelFile, folder: Path, *, name: str | None = None, half: bool = False) -> None:
    """Write a folder that `find` takes. A card that is there already is kept; a new one calls the model `name`.
    Raises `UserError` if the folder cannot be written into or holds another kind of file under the model's name, or,
    with `half`, if a tensor exceeds float16."""
    file.check_destination(folder / MODEL)
    make_folder(folder)
    file.write(folder / MODEL, model, half=half)
    if not (folder / CARD).exists():
        write_text(folder / CARD, card(file.read(folder / MODEL), folder / MODEL, name or folder.name))


def push(model: ModelFile, repo_id: str, options: PushOptions) -> str:
    """Upload model and card in one commit to a repository, created if there is none, and return the commit's URL.
    A card that is there stays as it is. Raises `UserError` if the hub refuses or cannot be reached."""
    with tempfile.TemporaryDirectory() as temporary:
        save(model, Path(temporary), name=repo_id, half=options.half)
        with hub_errors(repo_id, MODEL):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=options.endpoint, token=options.token)
            repo_id = api.create_repo(repo_id, private=options.private, exist_ok=True).repo_id
            if options.revision is not None and not options.create_pr:
                api.create_branch(repo_id, branch=options.revision, exist_ok=True)
            if api.file_exists(repo_id, CARD, revision=options.revision):
                remove(Path(temporary) / CARD, made_now)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=temporary,
                revision=options.revision,
                commit_message=options.commit_message,
                create_pr=options.create_pr,
            )
    return str(commit.commit_url)


def card(model: ModelFile, path: Path, name: str) -> str:
    """Return a model card: front matter for the hub, a snippet that uses the model, and its description.
    `path` is the model's file, of which the card gives name and size."""
    config, factor = model.config, factor_of(model.config)
    description = describe_model(model, path)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", description)), default=0))  # no name in it ends the block
    return f"""---
library_name: latent-codec
tags:
- vae
- autoencoder
- image-compression
- latent-diffusion
---

# {name.split("/")[-1]}

An image VAE: {config.latent_channels} latent channels at 1/{factor} of each side, a {config.backbone.kind} \
backbone, a {config.likelihood.kind} likelihood.

```python
from latent_codec import Codec

codec = Codec.from_pretrained("{name}")
posterior = codec.encode(pixels)  # (b, {config.image_channels}, h, w) uint8, sides multiples of {factor}
image = codec.decode_uint8(posterior.mode())
```

In a pipeline of diffusers: `vae=latent_codec.interop.autoencoder_kl.adapter.CodecAutoencoder.from_codec(codec)`.

{fence}
{description}
{fence}
"""


@contextmanager
def hub_errors(repo_id: str, filename: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a `UserError` of one sentence; say how to install it if it is missing."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f"{repo_id}: the hub needs huggingface_hub: pip install 'latent-codec[hub]'") from error
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library, which differs by version
    sentences: tuple[tuple[type[Exception], str], ...] = (  # subclasses before their bases
        (errors.HFValidationError, "is no repository's name, which is user/name"),
        (errors.GatedRepoError, "is gated; accept its terms on its page, and log in (hf auth login)"),
        (errors.RepositoryNotFoundError, "no such repository, or a private one; check the name, or log in"),
        (errors.RevisionNotFoundError, "has no such revision; give a branch, tag or commit that it has"),
        (errors.OfflineModeIsEnabled, "the hub is switched off by HF_HUB_OFFLINE; unset it"),
        (errors.LocalTokenNotFoundError, "needs a login; run hf auth login, or give a token"),
        (errors.LocalEntryNotFoundError, f"the hub gives no answer, and {filename} is not in the cache"),
        (errors.EntryNotFoundError, f"has no {filename}; if it is an AutoencoderKL, use latent-codec import"),
    )
    try:
        yield
    except (OSError, errors.HFValidationError, errors.EntryNotFoundError, transport) as error:
        reasons = (sentence for kind, sentence in sentences if isinstance(error, kind))
        reason = next(reasons, f"the hub refused or gave no answer: {' '.join(str(error).split())}")
        raise UserError(f"{repo_id}: {reason}") from error
