"""The Hub of the tests and the real client: what was uploaded comes back, what the Hub refuses is refused."""

import os
import re
from pathlib import Path

import huggingface_hub
import pytest
from components import (
    assert_same_tensors,
    make_pipeline,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_transformer,
    tiny_vae_kl,
)
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from hub_api import LARGEST_REGULAR
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http
from loopback_hub import LoopbackHub
from tiny_runs import run
from transformers import CLIPTextModel, CLIPTokenizer


httpx = vars(_http).get("httpx2") or _http.httpx  # by the version of the client
# Its own, too.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning", "ignore:The `local_dir_use_symlinks` argument:UserWarning"
)

CARD = "---\nlicense: mit\ntags: [dit]\nlibrary_name: diffusers\n---\n# A model\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_user("ana", orgs=("lab",))
        hub.add_user("bob")
        hub.add_token("hf_ana", user="ana")
        hub.add_token("hf_bob", user="bob")
        hub.patched(monkeypatch, tmp_path / "home", token="hf_ana")
        yield hub


# By content, by name and by size.
LFS = {"pictures/grid, 4 x 4 ü.png", "transformer/model.safetensors", "transformer/deep/notes.txt"}


@pytest.fixture
def folder(tmp_path):
    """Files that go to git, and files that go to LFS."""
    contents = {
        "README.md": CARD.encode(),
        "config.json": b"{}",
        "empty.safetensors": b"",
        "pictures/grid, 4 x 4 ü.png": b"\x89PNG\r\n\0" + os.urandom(100),
        "transformer/model.safetensors": os.urandom(5000),
        "transformer/deep/notes.txt": b"a" * (LARGEST_REGULAR + 1),
    }
    for path, content in contents.items():
        file = tmp_path / "folder" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "folder"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    }


def without_attributes(files):
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def sent(hub):
    """The log as lines "METHOD path"."""
    return [f"{request.method} {request.path}" for request in hub.requests]


def count(hub, pattern):
    return sum(bool(re.search(pattern, line)) for line in sent(hub))


# -- upload and download ----------------------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(hub, folder):
    huggingface_hub.create_repo("ana/dit")
    commit = huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder, commit_message="everything")
    repo = hub.repos["ana/dit"]
    assert without_attributes(repo.files()) == contents(folder)
    assert repo.commits() == [(commit.oid, "everything"), (repo.commits()[1][0], "initial commit")]
    assert {path for path in repo.files() if repo.is_lfs(path)} == LFS
    assert {request.user for request in hub.requests if request.path.startswith("/api")} == {"ana"}

    snapshot = huggingface_hub.snapshot_download("ana/dit")
    assert snapshot == os.path.join(constants.HF_HUB_CACHE, "models--ana--dit", "snapshots", commit.oid)
    assert contents(Path(snapshot)) == repo.files()
    local = huggingface_hub.snapshot_download("ana/dit", local_dir=folder.with_name("local"))
    assert contents(Path(local)) == repo.files() and local == str(folder.with_name("local"))


def test_only_what_has_changed_is_sent_again(hub, folder):
    repo = hub.create("ana/dit")
    first = huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder)
    hub.requests.clear()
    assert huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder).oid == first.oid
    assert len(repo.commits()) == 2 and not count(hub, "PUT|/commit/")

    # What LFS holds is known by its content, under any name.
    (folder / "copy.safetensors").write_bytes((folder / "transformer" / "model.safetensors").read_bytes())
    (folder / "config.json").write_text('{"a": 1}')
    huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder)
    assert without_attributes(repo.files()) == contents(folder) and repo.is_lfs("copy.safetensors")
    assert len(repo.commits()) == 3 and not count(hub, "PUT")


def test_files_one_by_one(hub):
    repo = hub.create("ana/dit", files={"a/b.json": b"{}", "a/c/m.safetensors": b"weights"})
    assert len(repo.commits()) == 1 and repo.is_lfs("a/c/m.safetensors")
    huggingface_hub.upload_file(repo_id="ana/dit", path_or_fileobj=b"new", path_in_repo="a/c/n.bin")
    names = [".gitattributes", "a/b.json", "a/c/m.safetensors", "a/c/n.bin"]
    assert huggingface_hub.list_repo_files("ana/dit") == names == sorted(repo.files())
    assert repo.files()["a/c/n.bin"] == b"new"

    huggingface_hub.delete_file("a/b.json", "ana/dit", commit_message="less", commit_description="why")
    assert set(repo.files()) == {".gitattributes", "a/c/m.safetensors", "a/c/n.bin"}
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.delete_file("a/b.json", "ana/dit")
    last, *_ = huggingface_hub.list_repo_commits("ana/dit")
    assert (last.commit_id, last.title) == repo.commits()[0] and last.message == "why" and last.authors == ["ana"]

    # On top of what is not the newest commit any more.
    with pytest.raises(HfHubHTTPError, match="412"):
        huggingface_hub.upload_file(
            repo_id="ana/dit", path_or_fileobj=b"", path_in_repo="x", parent_commit=repo.commits()[1][0]
        )


def test_what_is_told_of_files(hub):
    files = {"README.md": CARD.encode(), "a/b.json": b"{}", "a/c/m.safetensors": b"weights"}
    repo = hub.create("ana/dit", files=files)
    info = huggingface_hub.model_info("ana/dit", files_metadata=True)
    assert (info.id, info.author, info.sha, info.private) == ("ana/dit", "ana", repo.branches["main"], False)
    assert info.card_data.license == "mit" and info.tags == ["dit"] and info.library_name == "diffusers"
    sizes = {path: len(content) for path, content in repo.files().items()}
    assert {file.rfilename: file.size for file in info.siblings} == sizes
    assert {file.size for file in huggingface_hub.model_info("ana/dit").siblings} == {None}

    tree = {item.path: item for item in HfApi().list_repo_tree("ana/dit", recursive=True)}
    assert tree.keys() == {*repo.files(), "a", "a/c"}
    weights = tree["a/c/m.safetensors"]
    assert weights.size == weights.lfs.size == 7 and tree["a/b.json"].lfs is None
    assert [item.path for item in HfApi().list_repo_tree("ana/dit", "a")] == ["a/b.json", "a/c"]
    asked = HfApi().get_paths_info("ana/dit", ["a", "a/b.json", "wrong"])
    assert [(item.path, hasattr(item, "size")) for item in asked] == [("a", False), ("a/b.json", True)]
    assert asked[1].blob_id == tree["a/b.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git's own
    assert huggingface_hub.file_exists("ana/dit", "a/b.json") and not huggingface_hub.file_exists("ana/dit", "b.json")


def test_revisions(hub):
    repo = hub.create("ana/dit", files={"a.json": b"1"})
    first = repo.commits()[0][0]
    huggingface_hub.create_tag("ana/dit", tag="v1.0")
    huggingface_hub.create_branch("ana/dit", branch="more/data")
    huggingface_hub.upload_file(repo_id="ana/dit", path_or_fileobj=b"2", path_in_repo="a.json")
    second = repo.commits()[0][0]
    huggingface_hub.upload_file(
        repo_id="ana/dit", path_or_fileobj=b"3", path_in_repo="a.json", revision="more/data", commit_message="third"
    )
    huggingface_hub.create_tag("ana/dit", tag="v2.0", revision="more/data")
    huggingface_hub.create_branch("ana/dit", branch="old", revision="v1.0")
    third = repo.branches["more/data"]
    shas = {first, second, third}
    assert len(shas) == 3 and all(re.fullmatch("[0-9a-f]{40}", sha) for sha in shas)
    assert repo.tags == {"v1.0": first, "v2.0": third}
    assert repo.branches == {"main": second, "more/data": third, "old": first}
    assert repo.commits("more/data") == [(third, "third"), (first, "initial commit")]
    refs = huggingface_hub.list_repo_refs("ana/dit")
    assert {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)} == repo.branches | repo.tags

    expected = {None: b"2", "main": b"2", "more/data": b"3", "v1.0": b"1", "v2.0": b"3", first: b"1", second: b"2"}
    for revision, content in expected.items():
        assert Path(huggingface_hub.hf_hub_download("ana/dit", "a.json", revision=revision)).read_bytes() == content
        assert repo.files(revision or "main")["a.json"] == content
    huggingface_hub.delete_tag("ana/dit", tag="v2.0")
    huggingface_hub.delete_branch("ana/dit", branch="more/data")
    assert repo.tags == {"v1.0": first} and repo.branches == {"main": second, "old": first}
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.delete_tag("ana/dit", tag="v2.0")
    for create in (
        lambda **kwargs: huggingface_hub.create_tag("ana/dit", tag="v1.0", **kwargs),
        lambda **kwargs: huggingface_hub.create_branch("ana/dit", branch="main", **kwargs),
    ):
        create(exist_ok=True)
        with pytest.raises(HfHubHTTPError, match="409"):
            create()


def test_what_is_not_there(hub):
    hub.create("ana/dit", files={"a.json": b"1"})
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("ana/dit", "b.json")
    with pytest.raises(RemoteEntryNotFoundError):
        list(HfApi().list_repo_tree("ana/dit", "folder"))
    for ask in (huggingface_hub.model_info, huggingface_hub.snapshot_download, huggingface_hub.list_repo_files):
        with pytest.raises(RevisionNotFoundError):
            ask("ana/dit", revision="v9")
        with pytest.raises(RepositoryNotFoundError):
            ask("ana/wrong")
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.upload_file(repo_id="ana/dit", path_or_fileobj=b"", path_in_repo="x", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.upload_file(repo_id="ana/wrong", path_or_fileobj=b"", path_in_repo="x")
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.hf_hub_download("gpt2", "config.json")
    assert not huggingface_hub.repo_exists("ana/wrong") and huggingface_hub.repo_exists("ana/dit")
    # Not everything of the Hub is here, and that is not hidden.
    with pytest.raises(HfHubHTTPError, match="501"):
        huggingface_hub.create_repo("ana/data", repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="501"):
        huggingface_hub.delete_repo("ana/dit")
    with pytest.raises(HfHubHTTPError, match="501"):
        huggingface_hub.upload_file(repo_id="ana/dit", path_or_fileobj=b"", path_in_repo="x", create_pr=True)


# -- users ------------------------------------------------------------------------------------------------------------


def test_creating_repositories(hub):
    url = huggingface_hub.create_repo("dit")
    repo = hub.repos["ana/dit"]
    assert url == f"{hub.url}/ana/dit" and url.repo_id == "ana/dit" and list(repo.files()) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError, match="409.*\n*.*already created") as refused:
        huggingface_hub.create_repo("ana/dit")
    assert refused.value.response.json()["url"] == url
    assert huggingface_hub.create_repo("ana/dit", exist_ok=True, private=True) == url and not repo.private
    huggingface_hub.create_repo("lab/dit", private=True)
    assert hub.repos["lab/dit"].private and huggingface_hub.model_info("lab/dit").private
    with pytest.raises(HfHubHTTPError, match='403.*under the namespace "bob"'):
        huggingface_hub.create_repo("bob/dit")


def outcome(ask, *args, **kwargs):
    """The status of what is refused, 200 of what is not."""
    try:
        ask(*args, **kwargs)
    except HfHubHTTPError as error:
        return error.response.status_code
    return 200


@pytest.mark.parametrize(
    ("token", "read", "write", "create"),
    [
        # of ana/one (public), ana/two (private), lab/three (private); a new one of ana's
        ("hf_ana", (200, 200, 200), (200, 200, 200), 200),
        ("hf_ana_read", (200, 200, 200), (403, 403, 403), 403),
        ("hf_ana_one", (200, 200, 200), (200, 403, 403), 403),
        ("hf_ana_lab", (200, 200, 200), (403, 403, 200), 403),
        ("hf_bob", (200, 404, 404), (403, 404, 404), 403),
        ("hf_wrong", (401, 401, 401), (401, 401, 401), 401),
        (False, (200, 401, 401), (401, 401, 401), 401),
    ],
)
def test_what_a_token_may(token, read, write, create, hub):
    hub.add_token("hf_ana_read", user="ana", role="read")
    hub.add_token("hf_ana_one", user="ana", role="fineGrained", can_write=("ana/one",))
    hub.add_token("hf_ana_lab", user="ana", role="fineGrained", can_write=("lab",))
    names = ("ana/one", "ana/two", "lab/three")
    for name in names:
        hub.create(name, private=name != "ana/one", files={"a.json": b"{}"})
    api = HfApi(token=token)
    assert tuple(outcome(api.model_info, name) for name in names) == read
    assert tuple(outcome(api.hf_hub_download, name, "a.json") for name in names) == read
    assert tuple(outcome(api.auth_check, name) for name in names) == read
    assert tuple(outcome(api.auth_check, name, write=True) for name in names) == write
    for path in ("b.json", "b.bin"):
        upload = {"path_or_fileobj": b"{}", "path_in_repo": path}
        assert tuple(outcome(api.upload_file, repo_id=name, **upload) for name in names) == write
        assert [path in hub.repos[name].files() for name in names] == [status == 200 for status in write]
    assert tuple(outcome(api.create_tag, name, tag="v1") for name in names) == write
    assert outcome(api.create_repo, "ana/new") == create and ("ana/new" in hub.repos) == (create == 200)


def test_who_one_is(hub):
    hub.add_token("hf_ana_some", user="ana", role="fineGrained", can_write=("ana/one", "ana", "lab"))
    me = huggingface_hub.whoami()
    assert me["name"] == "ana" and [org["name"] for org in me["orgs"]] == ["lab"]
    assert me["auth"]["accessToken"]["role"] == "write"
    token = huggingface_hub.whoami("hf_ana_some")["auth"]["accessToken"]
    assert token["role"] == "fineGrained"
    assert [(scope["entity"]["type"], scope["entity"]["name"]) for scope in token["fineGrained"]["scoped"]] == [
        ("model", "ana/one"),
        ("user", "ana"),
        ("org", "lab"),
    ]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        huggingface_hub.whoami("hf_wrong")
    assert [request.user for request in hub.requests] == ["ana", "ana", None]


def test_cards_are_validated(hub):
    repo = hub.create("ana/dit")
    card = ModelCard(CARD)
    card.push_to_hub("ana/dit")
    assert repo.files()["README.md"].decode() == str(card) == str(ModelCard.load("ana/dit"))
    upload = {"repo_id": "ana/dit", "path_in_repo": "README.md"}
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        huggingface_hub.upload_file(path_or_fileobj=b"# No block", **upload)
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        huggingface_hub.upload_file(path_or_fileobj=b"---\na: [\n---\n", **upload)


# -- faults -----------------------------------------------------------------------------------------------------------


FAULTS = {
    "500": {"status": 500},
    "503": {"status": 503},
    "429": {"status": 429, "retry_after": 2},
    "dropped": {"drop": True},
    "answer lost": {"drop": True, "after": True},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["preupload", "objects/batch", "PUT /lfs", "/verify", "/tree/"])
def test_faults_that_the_client_survives(where, fault, hub, folder):
    repo = hub.create("ana/dit")
    hub.fail(match=where, **FAULTS[fault])
    huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder, delete_patterns="*.old")
    assert without_attributes(repo.files()) == contents(folder) and len(repo.commits()) == 2
    # It obeys `Retry-After`, and adds a second.
    assert hub.waits == [3 if fault == "429" else 1]
    failed, again = [request for request in hub.requests if re.search(where, f"{request.method} {request.path}")][:2]
    assert (failed.status, again.status) == (FAULTS[fault].get("status", 0), 200)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("where", "ask"),
    [
        ("whoami", lambda folder: huggingface_hub.whoami()),
        ("create", lambda folder: huggingface_hub.create_repo("ana/new", exist_ok=True)),
        ("auth-check", lambda folder: HfApi().auth_check("ana/dit")),
        ("GET /api/models", lambda folder: huggingface_hub.model_info("ana/dit")),
        ("/tag/", lambda folder: huggingface_hub.create_tag("ana/dit", tag="v1")),
        ("/commit/", lambda folder: huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_that_the_client_does_not_survive(where, ask, fault, hub, folder):
    """A user of the client repeats these, and finds that a lost answer may stand for work that was done."""
    repo = hub.create("ana/dit")
    hub.fail(match=where, **FAULTS[fault])
    with pytest.raises((HfHubHTTPError, httpx.RemoteProtocolError)):
        ask(folder)
    assert hub.waits == [] and count(hub, where) == 1
    done = {"create": "ana/new" in hub.repos, "/tag/": "v1" in repo.tags, "/commit/": len(repo.commits()) == 2}
    assert done.get(where, False) == (fault == "answer lost" and where in done)
    if where == "/tag/" and done[where]:
        with pytest.raises(HfHubHTTPError, match="409"):
            ask(folder)
    else:
        ask(folder)
    assert hub.waits == [] and len(repo.commits()) == (2 if where == "/commit/" else 1)


def test_a_fault_that_stays(hub, folder):
    repo = hub.create("ana/dit")
    hub.fail(match="PUT", status=503, times=100)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=folder, allow_patterns="*.safetensors")
    assert hub.waits == [1, 2, 4, 8, 8] and count(hub, "PUT") == 6 and len(repo.commits()) == 1


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, monkeypatch):
    """Where its last whole piece has ended: of 10 MB, if it were not changed here."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 400)
    weights = os.urandom(3000)
    hub.create("ana/dit", files={"m.safetensors": weights, "a.json": b"{}"})
    hub.fail(match="GET .*safetensors", truncate=1000)
    hub.fail(match="GET .*safetensors", truncate=500)
    path = huggingface_hub.hf_hub_download("ana/dit", "m.safetensors")
    assert Path(path).read_bytes() == weights and hub.waits == [1, 1]
    assert [request.status for request in hub.requests if request.method == "GET"] == [200, 206, 206]
    # Too often, and nothing that is not whole is left.
    hub.fail(match="GET .*json", truncate=1, times=100)
    with pytest.raises(httpx.RemoteProtocolError):
        huggingface_hub.hf_hub_download("ana/dit", "a.json")
    assert huggingface_hub.try_to_load_from_cache("ana/dit", "a.json") is None


@pytest.mark.parametrize(("asked", "expected"), [("bytes=2-", b"2345"), ("bytes=1-3", b"123"), ("bytes=4-99", b"45")])
def test_parts_of_files(asked, expected, hub):
    hub.create("ana/dit", files={"a.txt": b"012345"})
    url = f"{hub.url}/ana/dit/resolve/main/a.txt"
    answer = huggingface_hub.get_session().get(url, headers={"Range": asked})
    start = int(re.search(r"\d+", asked)[0])
    assert (answer.status_code, answer.content) == (206, expected)
    assert answer.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/6"
    assert huggingface_hub.get_session().get(url, headers={"Range": "bytes=6-"}).status_code == 416


def test_a_hub_that_is_down(hub):
    hub.create("ana/dit", files={"a.json": b"{}", "b.json": b"{}"})
    path = huggingface_hub.hf_hub_download("ana/dit", "a.json")
    hub.close()
    with pytest.raises(httpx.ConnectError):
        huggingface_hub.model_info("ana/dit")
    assert huggingface_hub.hf_hub_download("ana/dit", "a.json") == path
    with pytest.raises(OSError, match="cannot find the requested files in the local cache"):
        huggingface_hub.hf_hub_download("ana/dit", "b.json")


def test_objects_are_checked(hub):
    hub.create("ana/dit")
    answer = huggingface_hub.get_session().put(f"{hub.url}/lfs/ana/dit/{'0' * 64}", content=b"other")
    assert answer.status_code == 400 and not hub.repos["ana/dit"].objects
    operation = huggingface_hub.CommitOperationAdd("m.safetensors", b"weights")
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="does not exist"):
        HfApi().create_commit("ana/dit", [operation], commit_message="not uploaded")


# -- what is built on the client --------------------------------------------------------------------------------------


def test_a_pipeline_of_diffusers(hub, monkeypatch):
    unet = UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).push_to_hub("ana/ddpm", private=True)
    repo = hub.repos["ana/ddpm"]
    assert repo.private and repo.is_lfs("unet/diffusion_pytorch_model.safetensors")
    loaded = DiffusionPipeline.from_pretrained("ana/ddpm")
    assert type(loaded) is DDPMPipeline
    assert_same_tensors(loaded.unet.state_dict(), unet.state_dict())
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_tensors(DiffusionPipeline.from_pretrained("ana/ddpm").unet.state_dict(), unet.state_dict())
    assert hub.requests == []


def test_components_and_code_of_a_repository(hub, tmp_path):
    vae, text_encoder = tiny_vae_kl(), tiny_text_encoder()
    tokenizer = tiny_tokenizer(tmp_path / "vocabulary")
    make_pipeline(tiny_transformer(), vae=vae).save_pretrained(tmp_path / "pipeline")
    text_encoder.save_pretrained(tmp_path / "pipeline" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "pipeline" / "tokenizer")
    hub.create("ana/dit")
    huggingface_hub.upload_folder(repo_id="ana/dit", folder_path=tmp_path / "pipeline")

    loaded = AutoencoderKL.from_pretrained("ana/dit", subfolder="vae")
    assert_same_tensors(loaded.state_dict(), vae.state_dict())
    loaded = CLIPTextModel.from_pretrained("ana/dit", subfolder="text_encoder")
    assert_same_tensors(loaded.state_dict(), text_encoder.state_dict())
    loaded = CLIPTokenizer.from_pretrained("ana/dit", subfolder="tokenizer")
    assert loaded("a cat").input_ids == tokenizer("a cat").input_ids
    pipeline = DiffusionPipeline.from_pretrained("ana/dit", trust_remote_code=True)
    assert_same_tensors(pipeline.transformer.state_dict(), tiny_transformer().state_dict())
    assert type(pipeline).__module__.startswith("diffusers_modules")
    assert (tmp_path / "home" / "modules" / "diffusers_modules").is_dir()
    assert {request.status for request in hub.requests} == {200, 404}


def test_another_process(hub, tmp_path):
    script = (
        "import huggingface_hub as hub\n"
        "hub.create_repo('ana/dit')\n"
        "hub.upload_file(repo_id='ana/dit', path_or_fileobj=b'weights', path_in_repo='m.safetensors')\n"
        "print(hub.hf_hub_download('ana/dit', 'm.safetensors'))\n"
    )
    done = run("python", "-c", script, **hub.environment(tmp_path / "other", token="hf_ana"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "other" / "hub")) and done.stderr == ""
    assert hub.repos["ana/dit"].files()["m.safetensors"] == b"weights"
    assert "401" in run("python", "-c", script, **hub.environment(tmp_path / "other")).stderr


def test_this_process_is_as_before(hub, tmp_path):
    held = (constants.ENDPOINT, constants.HF_HUB_CACHE, huggingface_hub.hf_api.api.endpoint, os.environ["HF_ENDPOINT"])
    assert held == (hub.url, str(tmp_path / "home" / "hub"), hub.url, hub.url)
    assert huggingface_hub.hf_hub_url("ana/dit", "a.json") == f"{hub.url}/ana/dit/resolve/main/a.json"
    with LoopbackHub() as other, pytest.MonkeyPatch.context() as patch:
        other.patched(patch, tmp_path / "other")
        assert HfApi().endpoint == constants.ENDPOINT == other.url and huggingface_hub.get_token() is None
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.model_info("ana/dit")
        assert hub.requests == [] and len(other.requests) == 1
    assert huggingface_hub.get_token() == "hf_ana"
    assert held == (
        constants.ENDPOINT,
        constants.HF_HUB_CACHE,
        huggingface_hub.hf_api.api.endpoint,
        os.environ["HF_ENDPOINT"],
    )
