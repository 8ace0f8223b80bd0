"""What a Hub stores, and its endpoints: the part of the Hugging Face Hub's HTTP API that `loopback_hub` serves."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs

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
