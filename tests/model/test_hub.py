"""The hub: a small server in its place answers downloads, and a mock takes uploads."""

import dataclasses
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, MagicMock, call

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from latent_codec.errors import UserError
from latent_codec.model import hub
from latent_codec.model.codec import Codec
from latent_codec.model.hub import CARD, MODEL
from tests.support.errors import refused

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
REFUSALS = {
    "someone/private": (401, "RepoNotFound", "no such repository, or a private one"),
    "someone/gated": (403, "GatedRepo", "is gated; accept its terms"),
    "someone/broken": (500, "", "the hub gives no answer"),
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does about the repository "someone/model" with two revisions, and refuses others."""

    files: dict[tuple[str, str], bytes]  # by revision and name

    def do_GET(self) -> None:
        user, repository, _, revision, name = self.path.lstrip("/").split("?")[0].split("/", 4)
        revision = next((r for r, commit in COMMITS.items() if revision in (r, commit)), "")
        status, code, content = 200, "", self.files.get((revision, name), b"")
        if (repo := f"{user}/{repository}") != "someone/model":
            status, code, _ = REFUSALS.get(repo, (404, "RepoNotFound", ""))
        elif not content:
            status, code = 404, "EntryNotFound" if revision else "RevisionNotFound"
        self.send_response(status)
        found = {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": COMMITS.get(revision, "")}
        for key, value in (found if status == 200 else {"X-Error-Code": code, "X-Error-Message": code}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if status == 200 else 0))
        self.end_headers()
        if self.command == "GET" and status == 200:
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


def variant(codec: Codec, value: float) -> Codec:
    codec.state_dict()["backbone.linear.encoder.bias"][0] = value
    return codec


@pytest.fixture
def remote(codec: Codec, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Yield options that send downloads to the server, with a cache of their own."""
    files = {}
    for revision, value in (("main", 1.0), ("v1", 2.0)):
        variant(codec, value).save(tmp_path / "served.safetensors")
        files[revision, MODEL] = (tmp_path / "served.safetensors").read_bytes()
    files["main", "sub/other.safetensors"] = files["v1", MODEL]
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield {"endpoint": f"http://127.0.0.1:{server.server_address[1]}", "cache_dir": tmp_path / "cache", "token": False}
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repositorys_model_is_loaded_at_a_revision(codec: Codec, remote: dict[str, Any]) -> None:
    assert Codec.from_pretrained("someone/model", **remote).model_id == variant(codec, 1.0).model_id
    for revision in ("v1", COMMITS["v1"]):
        found = Codec.from_pretrained("someone/model", revision=revision, **remote)
        assert found.model_id == variant(codec, 2.0).model_id
    found = Codec.from_pretrained("someone/model", filename="sub/other.safetensors", **remote)
    assert found.model_id == variant(codec, 2.0).model_id
    offline = remote | {"endpoint": "http://127.0.0.1:9", "local_files_only": True}
    assert Codec.from_pretrained("someone/model", **offline).model_id == variant(codec, 1.0).model_id


DOWN = {"endpoint": "http://127.0.0.1:9"}
FAILURES = {
    **{repo: (repo, {}, reason) for repo, (_, _, reason) in REFUSALS.items()},
    "no repository": ("someone/nothing", {}, "no such repository"),
    "no revision": ("someone/model", {"revision": "v9"}, "has no such revision; give a branch, tag or commit"),
    "no file": ("someone/model", {"filename": "none"}, r"has no none; if it is an AutoencoderKL"),
    "not cached": ("someone/model", {"local_files_only": True}, r"the hub gives no answer, and model\.safetensors is"),
    "no network": ("someone/model", DOWN, "the hub gives no answer"),
    "no proper name": ("a--b/c..d", {}, "is no repository's name"),
}


@pytest.mark.parametrize(("repo", "options", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_download_that_fails_is_one_sentence(
    remote: dict[str, Any], repo: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between its tries
    with pytest.raises(UserError, match=f"^{re.escape(repo)}: {reason}") as caught:
        Codec.from_pretrained(repo, **remote | options)
    assert "\n" not in str(caught.value)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"pip install 'latent-codec\[hub\]'", Codec.from_pretrained, "someone/model")


def test_a_saved_folder_is_loaded(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: Any) -> None:
    codec.save_pretrained(tmp_path / "a" / "mine")
    assert {f.name for f in (tmp_path / "a" / "mine").iterdir()} == {MODEL, CARD}
    for source in (tmp_path / "a" / "mine", tmp_path / "a" / "mine" / MODEL):
        found = Codec.from_pretrained(source)
        assert (found.model_id, found.statistics, found.training) == (codec.model_id, codec.statistics, False)
        assert found.priors is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "someone")
    (tmp_path / "someone" / "mine").rename(tmp_path / "someone" / "model")
    assert Codec.from_pretrained("someone/model", **remote).model_id == codec.model_id  # what is there comes first
    assert Codec.from_pretrained("photo").config.latent_channels == 32


def test_places_without_a_model_are_refused(tmp_path: Path, codec: Codec) -> None:
    (tmp_path / "file").write_text("mine")
    for source, reason in (
        (tmp_path, r"no model\.safetensors in it"),
        (tmp_path / "none.safetensors", "neither a file nor a shipped model"),
        ("nothing", "neither a file nor a shipped model"),
        (tmp_path / "file", "not a safetensors file"),
    ):
        refused(reason, Codec.from_pretrained, source)
    refused("cannot be written into", codec.save_pretrained, tmp_path / "file")


def test_the_card_says_what_the_model_is(codec: Codec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path / "mine")
    card = huggingface_hub.ModelCard.load(tmp_path / "mine" / CARD)
    data = card.data.to_dict()
    assert data["library_name"] == "latent-codec" and "image-compression" in data["tags"]
    for fact in (codec.model_id, "4 latent channels", "1/8 of each side", "lite", "made up"):
        assert fact in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0].replace('"mine"', repr(str(tmp_path / "mine")))
    scope: dict[str, Any] = {"pixels": torch.zeros(1, 3, 16, 8, dtype=torch.uint8)}
    exec(snippet, scope)
    assert scope["image"].shape == (1, 3, 16, 8)
    (tmp_path / "mine" / CARD).write_text("my own words")
    codec.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / CARD).read_text() == "my own words"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Return what takes the place of huggingface_hub.HfApi; its `uploaded` are the files by name."""
    api = MagicMock(uploaded={})
    api.return_value = api
    api.create_repo.side_effect = lambda name, **_: SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")
    api.file_exists.return_value = False

    def upload(*, folder_path: str, **_: Any) -> SimpleNamespace:
        api.uploaded |= {f.name: f.read_bytes() for f in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit/1")

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    return api


@pytest.mark.parametrize(("ticks", "fence"), [(0, 3), (1, 3), (2, 3), (3, 4), (5, 6)])
def test_no_name_in_a_model_ends_the_cards_block(codec: Codec, tmp_path: Path, ticks: int, fence: int) -> None:
    assert codec.statistics is not None
    codec.statistics = dataclasses.replace(codec.statistics, source=f"photos{'`' * ticks}\n# Not a heading")
    codec.save_pretrained(tmp_path / "mine")
    text = huggingface_hub.ModelCard.load(tmp_path / "mine" / CARD).text
    block = text.split(f"\n{'`' * fence}\n")[-2]
    assert f"photos{'`' * ticks}" in block and "# Not a heading" in block


@pytest.mark.parametrize("own_card", [False, True])
def test_a_model_is_pushed_and_an_own_card_stays(codec: Codec, api: MagicMock, tmp_path: Path, own_card: bool) -> None:
    api.file_exists.return_value = own_card
    options: dict[str, Any] = {"revision": "next", "commit_message": "Better"} if own_card else {}
    url = codec.push_to_hub("mine", private=True, token="secret", half=own_card, **options)
    assert url == "https://hub/commit/1"
    api.assert_called_once_with(endpoint=None, token="secret")
    api.create_repo.assert_called_once_with("mine", private=True, exist_ok=True)
    branches = [call("me/mine", branch="next", exist_ok=True)] if own_card else []
    assert api.create_branch.call_args_list == branches
    options = {"revision": None, "commit_message": "Upload model", "create_pr": False} | options
    api.file_exists.assert_called_once_with("me/mine", CARD, revision=options["revision"])
    api.upload_folder.assert_called_once_with(folder_path=ANY, repo_id="me/mine", **options)
    assert set(api.uploaded) == ({MODEL} if own_card else {MODEL, CARD})
    assert own_card or b'Codec.from_pretrained("mine")' in api.uploaded[CARD]
    codec.save_pretrained(tmp_path, half=own_card)
    assert api.uploaded[MODEL] == (tmp_path / MODEL).read_bytes()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalTokenNotFoundError("no token"), "needs a login; run hf auth login"),
        (errors.OfflineModeIsEnabled("offline"), "the hub is switched off by HF_HUB_OFFLINE"),
        (errors.HFValidationError("bad"), "is no repository's name"),
        (ConnectionError("no route\nto host"), "the hub refused or gave no answer: no route to host"),
    ],
)
def test_a_push_that_fails_is_one_sentence(codec: Codec, api: MagicMock, error: Exception, reason: str) -> None:
    api.create_repo.side_effect = error
    with pytest.raises(UserError, match=f"^me/mine: {reason}") as caught:
        codec.push_to_hub("me/mine")
    assert "\n" not in str(caught.value) and api.uploaded == {}


def test_mistakes_of_our_own_are_not_the_hubs() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("a/b", "c"):
        raise ZeroDivisionError
