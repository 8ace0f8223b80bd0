"""A Hugging Face Hub on 127.0.0.1, in memory: the part of its HTTP API with which models are pushed and loaded.

    with LoopbackHub() as hub:
        hub.add_user("ana")
        hub.add_token("hf_ana_write", user="ana")
        hub.patched(monkeypatch, tmp_path, token="hf_ana_write")
        huggingface_hub.create_repo("ana/dit")

Status codes and headers are the Hub's, so that the client raises the errors that it raises there, skips what is there
already and resumes what broke off. What is not spoken is answered with 501: Xet (the client is told not to use it),
pull requests, gated repositories, data sets, Spaces, deleting and renaming repositories, lists in pages.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

import huggingface_hub
import yaml


LFS_PATTERNS = ("*.bin", "*.ckpt", "*.npz", "*.parquet", "*.pt", "*.pth", "*.safetensors", "*tfevents*", "*.zip")
# Larger files go to LFS whatever their name. The Hub: 10 MB.
LARGEST_REGULAR = 1_000_000
DATE = "2026-01-01T00:00:00.000Z"


# -- what is stored ---------------------------------------------------------------------------------------------------


class File(NamedTuple):
    content: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.blob_id

    @property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {size}\n".encode()

    @property
    def blob_id(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def described(self) -> dict:
        """As an item of the tree, and of the siblings, which have other names for the same."""
        known = {"oid": self.blob_id, "blobId": self.blob_id, "size": len(self.content)}
        if not self.lfs:
            return known
        lfs = {"oid": self.etag, "sha256": self.etag, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {**known, "lfs": lfs}


class Commit(NamedTuple):
    sha: str
    files: dict[str, File]
    title: str
    description: str = ""
    author: str = ""
    parent: "Commit | None" = None


class Repo:
    """A model repository. `branches` and `tags` are name -> commit sha, `objects` is the LFS store."""

    def __init__(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None):
        self.id, self.private = repo_id, private
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self._commits: dict[str, Commit] = {}
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
        held = {".gitattributes": File(attributes)}
        for path, content in (files or {}).items():
            held[path] = File(content, goes_to_lfs(path, len(content), content[:512], attributes))
        self.add("main", held, "initial commit")

    def add(self, branch: str, files: dict[str, File], title: str, description: str = "", author: str = "") -> Commit:
        """A commit on top of a branch."""
        parent = self.commit(branch) if branch in self.branches else None
        content = [parent and parent.sha, title, description, sorted((path, files[path].blob_id) for path in files)]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.branches[branch] = sha
        self._commits[sha] = Commit(sha, files, title, description, author, parent)
        return self._commits[sha]

    def commit(self, revision: str = "main") -> Commit:
        """Of a branch, a tag or a full sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self._commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self._commits[sha]

    def history(self, revision: str = "main") -> list[Commit]:
        commits = [self.commit(revision)]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def commits(self, revision: str = "main") -> list[tuple[str, str]]:
        """`(sha, message)`, newest first."""
        return [(commit.sha, commit.title) for commit in self.history(revision)]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content, of LFS files too."""
        return {path: file.content for path, file in self.commit(revision).files.items()}

    def is_lfs(self, path: str, revision: str = "main") -> bool:
        return self.commit(revision).files[path].lfs


def goes_to_lfs(path: str, size: int, sample: bytes, gitattributes: bytes) -> bool:
    """As preupload decides: by `.gitattributes`; large and binary files anyway."""
    patterns = [line.split()[0] for line in gitattributes.decode().splitlines() if "filter=lfs" in line]
    return any(fnmatch(path, pattern) for pattern in patterns) or size > LARGEST_REGULAR or b"\0" in sample


# -- what is asked and answered ---------------------------------------------------------------------------------------


class Token(NamedTuple):
    user: str
    role: str
    can_write: tuple[str, ...]


class Request(NamedTuple):
    """A line of the log. `path` is as sent, without the query; `status` is 0 if no answer was sent."""

    method: str
    path: str
    status: int
    user: str | None


class Call(NamedTuple):
    token: Token | None
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)

    def asks(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")


@dataclass(frozen=True)
class Answer:
    """Without an answer (status 0), or after the first `sent` bytes of the body, the connection is closed."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    sent: int | None = None


def in_json(content, status: int = 200, headers: dict | None = None) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


class Refusal(Exception):
    """An error of the Hub. The client chooses its exception by the code."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **body):
        super().__init__(message)
        named = {"X-Error-Code": code} if code else {}
        text = message.encode("ascii", "replace").decode()
        self.answer = in_json(
            {"error": message, **body}, status, {"X-Error-Message": text, **named, **(headers or {})}
        )


ROUTES: list[tuple[str, re.Pattern, Callable]] = []
REPO = "(?P<repo_id>[^/]+(?:/[^/]+)?)"
REVISION = "(?P<revision>[^/]+)"
OBJECT = f"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})"
MODEL = f"/api/models/{REPO}"


def route(methods: str, pattern: str):
    """Register `endpoint(hub, call, **groups of the pattern)`, which returns an `Answer` or what JSON can hold."""

    def register(endpoint):
        ROUTES.append((methods, re.compile(pattern), endpoint))
        return endpoint

    return register


# -- users and cards --------------------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
def whoami(hub, call):
    user, role, can_write = hub.signed_in(call)
    access = {"displayName": "test", "role": role}
    if role == "fineGrained":
        kinds = {name: "model" if "/" in name else "user" if name == user else "org" for name in can_write}
        permissions = ["repo.content.read", "repo.write"]
        scoped = [{"entity": {"type": kinds[name], "name": name}, "permissions": permissions} for name in can_write]
        access["fineGrained"] = {"global": [], "scoped": scoped}
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in hub.users[user]]
    return {"type": "user", "name": user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, call):
    try:
        data = metadata(call.json()["content"])
    except yaml.YAMLError as error:
        return in_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


def metadata(card: str) -> dict:
    """The YAML block at the head of a card."""
    block = re.match(r"\s*---\r?\n(.*?)\n---", card, re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}


# -- repositories -----------------------------------------------------------------------------------------------------


@route("POST", "/api/repos/create")
def create_repo(hub, call):
    asked, token = call.json(), hub.signed_in(call)
    if asked.get("type", "model") != "model":
        raise Refusal(501, f"no repositories of type {asked['type']} here")
    namespace = asked.get("organization") or token.user
    repo_id = f"{namespace}/{asked['name']}"
    url = f"{hub.url}/{repo_id}"
    if not hub.may_write(token, repo_id if repo_id in hub.repos else namespace):
        raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if repo_id in hub.repos:
        raise Refusal(409, "You already created this model repo", url=url)
    hub.create(repo_id, private=asked.get("visibility") == "private" or asked.get("private", False))
    return {"url": url, "name": repo_id}


@route("GET", f"{MODEL}/auth-check(?P<write>/write)?")
def auth_check(hub, call, repo_id, write):
    (hub.writable if write else hub.readable)(call, repo_id)
    return {}


@route("GET", f"{MODEL}(?:/revision/{REVISION})?")
def model_info(hub, call, repo_id, revision):
    repo = hub.readable(call, repo_id)
    sha, files, *_ = repo.commit(revision or "main")
    card = metadata(files["README.md"].content.decode()) if "README.md" in files else {}
    info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "private": repo.private, "gated": False}
    info |= {"createdAt": DATE, "lastModified": DATE, "cardData": card, "tags": card.get("tags", [])}
    info |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
    more = call.asks("blobs")
    return {**info, "siblings": [{"rfilename": path, **(files[path].described() if more else {})} for path in files]}


@route("GET", f"{MODEL}/tree/{REVISION}(?:/(?P<path>.+))?")
def tree(hub, call, repo_id, revision, path):
    files = hub.readable(call, repo_id).commit(revision).files
    prefix = f"{path}/" if path else ""
    inside = sorted(name for name in listed(files) if name.startswith(prefix))
    if path and not inside:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    return [listed(files)[name] for name in inside if call.asks("recursive") or "/" not in name[len(prefix) :]]


@route("POST", f"{MODEL}/paths-info/{REVISION}")
def paths_info(hub, call, repo_id, revision):
    known = listed(hub.readable(call, repo_id).commit(revision).files)
    return [known[path] for path in parse_qs(call.body.decode())["paths"] if path in known]


def listed(files: dict[str, File]) -> dict[str, dict]:
    """Files and folders by path, as items of the tree."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    items = {path: {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders}
    return items | {path: {"type": "file", "path": path, **file.described()} for path, file in files.items()}


@route("GET", f"{MODEL}/refs")
def refs(hub, call, repo_id):
    repo = hub.readable(call, repo_id)

    def items(kind, names):
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

    return {"branches": items("heads", repo.branches), "tags": items("tags", repo.tags), "converts": []}


@route("GET", f"{MODEL}/commits/{REVISION}")
def commits(hub, call, repo_id, revision):
    def item(made):
        authors = [{"user": made.author}]
        return {"id": made.sha, "title": made.title, "message": made.description, "date": DATE, "authors": authors}

    return [item(made) for made in hub.readable(call, repo_id).history(revision)]


@route("POST", f"{MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
def create_ref(hub, call, repo_id, kind, name):
    """The name is in the address of a branch, and of a tag the revision."""
    repo, asked = hub.writable(call, repo_id), call.json()
    name, revision = (name, asked.get("startingPoint", "main")) if kind == "branch" else (asked["tag"], name)
    known = repo.branches if kind == "branch" else repo.tags
    if name in known:
        raise Refusal(409, f"Reference already exists: {name}")
    known[name] = repo.commit(revision).sha
    return {}


@route("DELETE", f"{MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
def delete_ref(hub, call, repo_id, kind, name):
    repo = hub.writable(call, repo_id)
    known = repo.branches if kind == "branch" else repo.tags
    if name not in known:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del known[name]
    return {}


# -- files ------------------------------------------------------------------------------------------------------------


@route("HEAD|GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub, call, repo_id, revision, path):
    sha, files, *_ = hub.readable(call, repo_id).commit(revision)
    if path not in files:
        raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
    content, etag = files[path].content, f'"{files[path].etag}"'
    headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
    if files[path].lfs:
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if not asked:
        return Answer(200, content, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start > end:
        raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


@route("POST", f"{MODEL}/preupload/{REVISION}")
def preupload(hub, call, repo_id, revision):
    """Open to whoever can read, for they may propose a change: refused are the LFS objects, or the commit."""
    hub.signed_in(call, "RepoNotFound")
    files = hub.readable(call, repo_id).commit(revision).files

    def decided(path, size, sample):
        lfs = goes_to_lfs(path, size, base64.b64decode(sample), files[".gitattributes"].content)
        known = {"oid": files[path].etag} if path in files else {}
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known}

    return {"files": [decided(**file) for file in call.json()["files"]]}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub, call, repo_id):
    repo = hub.writable(call, repo_id)

    def item(oid, size):
        place = f"{hub.url}/lfs/{repo_id}/{oid}"
        actions = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
        return {"oid": oid, "size": size, **({} if oid in repo.objects else {"actions": actions})}

    return {"transfer": "basic", "objects": [item(**wanted) for wanted in call.json()["objects"]]}


@route("PUT", OBJECT)
def lfs_upload(hub, call, repo_id, oid):
    """Without a token: on the Hub the address is signed."""
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refusal(400, "The content is not what its address says")
    hub.repos[repo_id].objects[oid] = call.body
    return Answer()


@route("POST", f"{OBJECT}/verify")
def lfs_verify(hub, call, repo_id, oid):
    if len(hub.writable(call, repo_id).objects.get(oid, b"")) != call.json()["size"]:
        raise Refusal(404, "The object was not uploaded")
    return {}


@route("POST", f"{MODEL}/commit/{REVISION}")
def commit(hub, call, repo_id, revision):
    repo = hub.writable(call, repo_id, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.")
    if call.asks("create_pr"):
        raise Refusal(501, "no pull requests here")
    if revision not in repo.branches:
        raise Refusal(404, f"Invalid rev id: refs/heads/{revision}", "RevisionNotFound")
    head, *changes = [json.loads(line)["value"] | json.loads(line) for line in call.body.split(b"\n") if line]
    parent = repo.commit(revision)
    if head.get("parentCommit", parent.sha) != parent.sha:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for change in changes:
        apply(change["key"], change, files, repo.objects)
    made = repo.add(revision, files, head["summary"], head.get("description", ""), call.token.user)
    return {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{made.sha}"}


def apply(key: str, change: dict, files: dict[str, File], objects: dict[str, bytes]):
    """Change `files` as a line of a commit says."""
    path = change["path"]
    if key == "file":
        files[path] = File(base64.b64decode(change["content"]))
    elif key == "lfsFile" and change["oid"] in objects:
        files[path] = File(objects[change["oid"]], lfs=True)
    elif key == "lfsFile":
        raise Refusal(400, "LFS pointer pointed to a file that does not exist")
    elif key == "deletedFile" and path in files:
        del files[path]
    elif key == "deletedFile":
        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    else:
        raise Refusal(501, f"no {key} in commits here")


# -- the server -------------------------------------------------------------------------------------------------------


class LoopbackHub:
    """The server, and what it holds: `repos` (id -> `Repo`), `users` (name -> organisations), `requests` (the log).

    `waits` is how long the client in this process would have waited between its tries, in seconds (see `patched`).
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, tuple[str, ...]] = {}
        self.requests: list[Request] = []
        self.waits: list[float] = []
        self._tokens: dict[str, Token] = {}
        self._faults: list[list] = []
        self._lock = threading.RLock()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> "LoopbackHub":
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Stop. From now on connections are refused, and those that the client has kept are closed."""
        self._server.shutdown()
        self._server.server_close()
        for connection in [*self._server.connections]:
            with suppress(OSError):  # closed by now
                connection.shutdown(socket.SHUT_RDWR)
        forget_remote_code()

    def add_user(self, name: str, orgs: tuple[str, ...] = ()):
        """A user, who can write to all of their organisations."""
        self.users[name] = orgs

    def add_token(self, token: str, user: str, role: str = "write", can_write: tuple[str, ...] = ()):
        """With role "read", "write" or "fineGrained"; the last writes only to repositories and namespaces named."""
        self._tokens[token] = Token(user, role, can_write)

    def create(self, repo_id: str, private: bool = False, files: dict[str, bytes] | None = None) -> Repo:
        """A repository with one commit, of `files` (path -> content) and `.gitattributes`."""
        with self._lock:
            self.repos[repo_id] = Repo(repo_id, private, files)
        return self.repos[repo_id]

    def fail(self, *, times=1, match="", status=500, retry_after=None, drop=False, truncate=None, after=False):
        """Spoil the next `times` requests in whose "METHOD path" the regular expression `match` is found.

        They are answered with `status` (and `Retry-After: retry_after`), or not at all (`drop`), or with the first
        `truncate` bytes of the body. With `after` the request is carried out, and only its answer is lost.
        """
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

        def spoil(carry_out: Callable[[], Answer]) -> Answer:
            answer = carry_out() if after or truncate is not None else None
            if truncate is not None:
                return replace(answer, sent=truncate)
            return Answer(0) if drop else in_json({"error": "a fault of the test"}, status, headers)

        self._faults.append([times, match, spoil])

    def environment(self, home: str | Path, token: str = "") -> dict[str, str]:
        """Variables for a process whose Hub is this one and whose cache is in the folder `home`."""
        home = Path(home)
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def patched(self, monkeypatch, home: str | Path, token: str = ""):
        """Do to this process, until `monkeypatch` is undone, what `environment` does to a new one.

        The client does not sleep between its tries: `waits` says how long it would have.
        """
        environment = self.environment(home, token)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        clock = SimpleNamespace(**{**vars(time), "sleep": self.waits.append})
        # What was read at import, where it is held.
        for place, value in {
            "huggingface_hub.constants.ENDPOINT": self.url,
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": template,
            "huggingface_hub.constants.HF_HOME": environment["HF_HOME"],
            "huggingface_hub.constants.HF_HUB_CACHE": environment["HF_HUB_CACHE"],
            "huggingface_hub.constants.HF_TOKEN_PATH": environment["HF_TOKEN_PATH"],
            "huggingface_hub.constants.HF_STORED_TOKENS_PATH": environment["HF_TOKEN_PATH"] + "s",
            "huggingface_hub.constants.HF_HUB_OFFLINE": False,
            "huggingface_hub.constants.HF_HUB_DISABLE_XET": True,
            "huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY": True,
            # The functions of the package are methods of this object.
            "huggingface_hub.hf_api.api.endpoint": self.url,
            "huggingface_hub.hf_api.api._whoami_cache": {},
            "huggingface_hub.utils._cache_manager.HF_HUB_CACHE": environment["HF_HUB_CACHE"],
            "huggingface_hub.utils._http.time": clock,
            "huggingface_hub.file_download.time": clock,
            "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE": environment["HF_MODULES_CACHE"],
            "transformers.dynamic_module_utils.HF_MODULES_CACHE": environment["HF_MODULES_CACHE"],
            "sys.path": [*sys.path],
        }.items():
            monkeypatch.setattr(place, value)
        # A class has taken the name of this module in its package.
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "progress_bar_states", {"_global": False})
        # The next connection heeds NO_PROXY.
        huggingface_hub.close_session()
        forget_remote_code()

    # -- what endpoints ask

    def signed_in(self, call: Call, code: str = "") -> Token:
        if call.token is None:
            raise Refusal(401, "Invalid username or password.", code)
        return call.token

    def readable(self, call: Call, repo_id: str) -> Repo:
        """The repository, unless it is hidden from the caller."""
        repo = self.repos.get(repo_id)
        if repo and (not repo.private or call.token and self._owns(call.token, repo_id)):
            return repo
        self.signed_in(call, "RepoNotFound")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, call: Call, repo_id: str, refusal: str = "Authorization error") -> Repo:
        repo = self.readable(call, repo_id)
        if not self.may_write(self.signed_in(call, "RepoNotFound"), repo_id):
            raise Refusal(403, refusal)
        return repo

    def may_write(self, token: Token, name: str) -> bool:
        """To a repository (its id), or to a namespace."""
        named = {name, name.split("/")[0]} & {*token.can_write}
        return self._owns(token, name) and (token.role == "write" or token.role == "fineGrained" and bool(named))

    def _owns(self, token: Token, name: str) -> bool:
        return name.split("/")[0] in (token.user, *self.users[token.user])

    # -- from a request to its answer

    def answer(self, method: str, target: str, headers, body: bytes) -> Answer:
        path, _, query = target.partition("?")
        key = headers.get("Authorization", "").removeprefix("Bearer ")
        token = self._tokens.get(key)
        call = Call(token, parse_qs(query), headers, body)

        def carry_out():
            return self._carry_out(method, path, call, known=not key or bool(token))

        with self._lock:
            answer = self._fault(f"{method} {path}")(carry_out)
            # Before it is sent, so that the caller finds it there.
            self.requests.append(Request(method, path, answer.status, token and token.user))
        return answer

    def _fault(self, line: str) -> Callable[[Callable[[], Answer]], Answer]:
        for fault in self._faults:
            times, match, spoil = fault
            if times and re.search(match, line):
                fault[0] -= 1
                return spoil
        return lambda carry_out: carry_out()

    def _carry_out(self, method: str, path: str, call: Call, known: bool) -> Answer:
        try:
            if not known:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for methods, pattern, endpoint in ROUTES:
                match = pattern.fullmatch(path)
                if match and method in methods.split("|"):
                    groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    answer = endpoint(self, call, **groups)
                    return answer if isinstance(answer, Answer) else in_json(answer)
            raise Refusal(501, f"{method} {path} is not spoken here")
        except Refusal as refusal:
            return refusal.answer


def forget_remote_code():
    """Modules that were imported from a repository, whose files are gone after the test."""
    for name in [*sys.modules]:
        if name.split(".")[0] in ("diffusers_modules", "transformers_modules"):
            del sys.modules[name]


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # the client may hang up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept open
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        super().finish()

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.hub.answer(self.command, self.path, self.headers, body)
        self.close_connection |= not answer.status or answer.sent is not None
        if not answer.status:
            return
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.sent])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def log_message(self, *arguments):
        """Not to the terminal: `requests` is the log."""
