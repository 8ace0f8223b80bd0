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

import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote

import huggingface_hub
from hub_api import ROUTES, Answer, Call, Refusal, Repo, Request, Token, in_json


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
