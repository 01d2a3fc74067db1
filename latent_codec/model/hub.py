"""Models on the Hugging Face hub, and in folders as they lie there: model.safetensors and README.md, the card."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_codec.errors import UserError
from latent_codec.info import describe
from latent_codec.model.codec import Codec
from latent_codec.model.shipped import resolve
from latent_codec.storage.files import make_folder, write_text

MODEL = "model.safetensors"
CARD = "README.md"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find(source: str | Path, *, filename: str = MODEL, **options: Any) -> Path:
    """The file of a model: a path, a folder with `filename` in it, a shipped model's name or a repository "user/name".

    What is there locally comes first. `options` are those of `huggingface_hub.hf_hub_download`: revision, token,
    cache_dir, local_files_only ... Raises `UserError` if there is none, or the hub does not give it.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / filename).is_file():
            raise UserError(f"{source}: no {filename} in it; of an AutoencoderKL, latent-codec import makes one")
        return path / filename
    if path.is_file() or path.suffix == ".safetensors" or not _REPOSITORY.fullmatch(str(source)):
        return resolve(source)
    with _hub_errors(str(source), filename):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), filename, **options))


def save(codec: Codec, folder: Path, *, name: str | None = None, half: bool = False) -> None:
    """Write a folder that `find` takes. A README.md that is there already is kept; `name` is what the new one says.

    Raises `UserError` if the folder cannot be written into or, with `half`, a tensor exceeds float16.
    """
    make_folder(folder)
    codec.save(folder / MODEL, half=half)
    if not (folder / CARD).exists():
        write_text(folder / CARD, card(codec, folder / MODEL, name or folder.name))


def push(
    codec: Codec,
    repo_id: str,
    *,
    half: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload model and card in one commit, to a repository that is created if there is none; returns the commit's URL.

    A card that the repository has already stays as it is. `revision` is a branch, created if there is none. Raises
    `UserError` if the hub refuses or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as temporary:
        save(codec, Path(temporary), name=repo_id, half=half)
        with _hub_errors(repo_id, MODEL):
            from huggingface_hub import HfApi

            api = HfApi(endpoint=endpoint, token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if api.file_exists(repo_id, CARD, revision=revision):
                (Path(temporary) / CARD).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=temporary,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
    return str(commit.commit_url)


def card(codec: Codec, file: Path, name: str) -> str:
    """A model card: front matter for the hub, how to use the model, and what `latent-codec info` says of its file."""
    config = codec.config
    return f"""---
library_name: latent-codec
tags:
- vae
- autoencoder
- image-compression
- latent-diffusion
---

# {name.split("/")[-1]}

An image VAE: {config.latent_channels} latent channels at 1/{codec.factor} of each side, a {config.backbone.kind} \
backbone, a {config.likelihood.kind} likelihood.

```python
from latent_codec import Codec

codec = Codec.from_pretrained("{name}")
posterior = codec.encode(pixels)  # (b, {config.image_channels}, h, w) uint8, sides multiples of {codec.factor}
image = codec.decode_uint8(posterior.mode())
```

In a pipeline of diffusers: `vae=latent_codec.interop.autoencoder_kl.adapter.CodecAutoencoder.from_codec(codec)`.

```
{describe(str(file))}
```
"""


@contextmanager
def _hub_errors(repo_id: str, filename: str) -> Iterator[None]:
    """What huggingface_hub raises as one sentence each; without it, how to get it."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f"{repo_id}: the hub needs huggingface_hub: pip install 'latent-codec[hub]'") from error
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library, of which there were several
    sentences: tuple[tuple[type[Exception], str], ...] = (  # a special case before what it is a case of
        (errors.HFValidationError, "is no repository's name, which is user/name"),
        (errors.GatedRepoError, "is gated; accept its terms on its page, and log in (hf auth login)"),
        (errors.RepositoryNotFoundError, "no such repository, or a private one; check the name, or log in"),
        (errors.RevisionNotFoundError, "has no such revision; give a branch, tag or commit that it has"),
        (errors.OfflineModeIsEnabled, "the hub is switched off by HF_HUB_OFFLINE; unset it"),
        (errors.LocalTokenNotFoundError, "needs a login; run hf auth login, or give a token"),
        (errors.LocalEntryNotFoundError, f"the hub gives no answer, and {filename} is not in the cache"),
        (errors.EntryNotFoundError, f"has no {filename}; of an AutoencoderKL, latent-codec import makes one"),
    )
    try:
        yield
    except (OSError, errors.HFValidationError, errors.EntryNotFoundError, transport) as error:
        reasons = (sentence for kind, sentence in sentences if isinstance(error, kind))
        reason = next(reasons, f"the hub refused or gave no answer: {' '.join(str(error).split())}")
        raise UserError(f"{repo_id}: {reason}") from error
