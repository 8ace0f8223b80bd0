"""Pipelines from and to the Hugging Face Hub: what is downloaded, what is checked, and errors that say what to do.

`FreqGateDiTPipeline.from_pretrained` comes here for repositories and folders, so that their classes are the package's
and no code of a repository is downloaded or run. `prepare_repository` and `push_folder` are the other direction.
"""

import glob
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from freqgate_dit.doctor import without_user
from freqgate_dit.files import read_json
from freqgate_dit.model_card import is_edited, write_card
from freqgate_dit.pipeline_folder import (
    INDEX,
    PACKAGE_MODULES,
    WEIGHTS,
    DamagedPipelineError,
    check_folder,
    component_classes,
    files_to_load,
    is_weights,
    package_class,
    refuse_incomplete,
    refuse_incomplete_repository,
    refuse_links,
    refuse_misfit,
    refuse_other_pipeline,
    refuse_without_index,
    split_strange,
    variants_of,
    weights_variant,
)


logger = logging.getLogger(__name__)

# The base of connection errors belongs to the HTTP library, which is another one in other versions of the client.
HTTP_ERROR = HfHubHTTPError.__bases__[0]
CLIENT_ERRORS = (OSError, HFValidationError, HTTP_ERROR)

# Seconds between tries: of reading, where somebody waits, and of writing; and the longest that the Hub may ask for.
READ_WAITS = (1, 4)
WAITS = (1, 4, 15, 60)
LONGEST_WAIT = 300
# What describes the weights that a repository had, and not those that it gets.
DESCRIPTIONS = (
    "evaluation/",
    "figures/",
    "analysis.json",
    "training_config.yaml",
    "training_summary.json",
    "posthoc_ema.json",
)


class HubError(OSError):
    """The Hub, or the way there, refused something; the message is one sentence on what to do."""


# -- what went wrong, in one sentence -------------------------------------------------------------------------------


def explain(
    error: Exception,
    repo_id: str,
    revision: str | None = None,
    writing: bool = False,
    token: str | bool | None = None,
) -> OSError | ValueError:
    """What to raise instead of an error of the Hub's client: one sentence that says what to do.

    Returns:
        `ValueError` if `repo_id` cannot be one; an error that says so already as it is; otherwise `HubError`.
    """
    if isinstance(error, (HubError, DamagedPipelineError)):
        return error
    if isinstance(error, HFValidationError):
        no_folder = "" if writing else "is no folder, and "
        return ValueError(
            f"{repo_id!r} {no_folder}cannot be the name of a repository on the Hub, which looks like 'user/name': "
            "check the spelling."
        )
    has_token = bool(get_token() if token in (None, True) else token)
    return HubError(without_user(_sentence(error, repo_id, revision, writing, has_token)))


def _sentence(error: Exception, repo_id: str, revision: str | None, writing: bool, has_token: bool) -> str:
    status = status_of(error)
    login = "`hf auth login`, or set HF_TOKEN"
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and writing and not has_token):
        return f"writing to {repo_id} on the Hub needs a token with write access, from {tokens}: {login}."
    if status in (403, 404) and writing:
        said = f" (The Hub says: {error.server_message})" if error.server_message else ""
        return f"the token that was sent may not write to {repo_id}: use one with write access, from {tokens}.{said}"
    if status == 401 and has_token:
        return f"the Hub does not accept the token that was sent: make a new one at {tokens}, and {login}."
    if isinstance(error, RevisionNotFoundError):
        return f"the repository {repo_id} has no `revision` {revision!r}: name one of its branches, tags or commits."
    if isinstance(error, GatedRepoError):
        return f"the repository {repo_id} is gated: ask for access at {constants.ENDPOINT}/{repo_id}, then {login}."
    if isinstance(error, RepositoryNotFoundError):
        seen = "that this token may see" if has_token else f"that is open to everybody (for a private one, {login})"
        return f"{repo_id!r} is neither a folder here nor a repository on the Hub {seen}: check the spelling."
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} needs the Hub, but HF_HUB_OFFLINE is set: unset it."
    if isinstance(error, LocalEntryNotFoundError):
        return f"{repo_id} is not in the cache, and downloads are switched off or fail: go online, or name a folder."
    if status is not None and may_pass(error):
        return f"the Hub answered {status} for {repo_id}: try again later."
    if status is not None:
        return f"the Hub answered {status} for {repo_id}: {error.server_message or error}"
    if may_pass(error):
        reason = type(error).__name__
        return (
            f"the Hub ({constants.ENDPOINT}) cannot be reached for {repo_id}, or the connection broke off ({reason}): "
            "try again later."
        )
    return f"{repo_id} cannot be copied: {error}"


def status_of(error: Exception) -> int | None:
    """HTTP status of an answer of the Hub, or `None` if the error is not an answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


# -- from the Hub ---------------------------------------------------------------------------------------------------


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = False,
    force_download: bool = False,
    trust_remote_code: bool = False,
    weights: bool = True,
    class_name: str = "FreqGateDiTPipeline",
    **others,
) -> str:
    """Download what a pipeline is loaded from, without its code; the folder in the cache.

    Where the Hub cannot be reached the cache's copy is taken, with a warning. With `local_files_only`, or
    `HF_HUB_OFFLINE` set, the network is not touched.

    Args:
        repo_id, revision, variant, token, cache_dir, local_files_only, force_download, trust_remote_code: as in
            `DiffusionPipeline.from_pretrained`.
        weights: whether to download more than what describes the pipeline.
        class_name: of the pipeline, for subclasses.
        others: components that are given to `from_pretrained` are not downloaded; what else it takes is ignored.

    Raises:
        ValueError: if `repo_id` cannot be the name of a repository, or holds no pipeline of this package.
        HubError: if it does not exist, is not open to this token, or can be neither reached nor found in the cache.
    """
    where = {"revision": revision, "token": token, "cache_dir": cache_dir}

    def wanted() -> list[str]:
        files = list_files(repo_id, revision, token)
        refuse_without_index(files, repo_id)
        index = read_json(Path(hf_hub_download(repo_id, INDEX, force_download=force_download, **where)))
        refuse_other_pipeline(index, repo_id, class_name)
        components = [name for name in component_classes(index) if name not in others]
        refuse_incomplete_repository(files, repo_id, components, variant, weights)
        if not weights:
            return descriptions(files)
        return files_to_load(files, components, variant, trust_remote_code, others.get("use_safetensors") is False)

    def from_hub() -> str:
        names = wanted()
        patterns = [glob.escape(name) for name in names]
        folder = snapshot_download(repo_id, allow_patterns=patterns, force_download=force_download, **where)
        if not all((Path(folder) / name).is_file() for name in names):
            # After an error of the Hub the client hands out what is in the cache.
            raise ConnectionError("the download is incomplete")
        return folder

    def from_cache() -> str:
        folder = snapshot_download(repo_id, allow_patterns=[INDEX], local_files_only=True, **where)
        if weights:
            check_folder(folder, variant, others, class_name)
        return folder

    def explained(error: Exception) -> Exception:
        return explain(error, repo_id, revision, token=token)

    if local_files_only or constants.HF_HUB_OFFLINE:
        try:
            return from_cache()
        except DamagedPipelineError as error:
            raise HubError(f"{repo_id} is not whole in the cache: {error}") from error
        except CLIENT_ERRORS as error:
            raise explained(error) from error
    try:
        folder = with_retries(from_hub, explained, READ_WAITS)
    except (HubError, ValueError) as error:
        if not isinstance(error.__cause__, CLIENT_ERRORS) or isinstance(error.__cause__, HFValidationError):
            raise
        try:
            folder = from_cache()
        except (*CLIENT_ERRORS, ValueError):  # nothing, or not all that is needed
            raise error from error.__cause__
        logger.warning(f"{error} Using the copy in the cache.")
        return folder
    if weights:
        check_folder(folder, variant, others, class_name)
    return folder


def descriptions(files: Iterable[str]) -> list[str]:
    """Of a repository's files those that say what it is: configurations and results, no weights."""
    return [
        name
        for name in files
        if name.endswith((".json", ".yaml", ".md"))
        and ("/" not in name or name.startswith("evaluation/") or name.endswith("config.json"))
    ]


def list_files(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> dict[str, int]:
    """Path -> bytes of a repository's files.

    Raises:
        OSError: of the Hub's client.
    """
    info = HfApi().model_info(repo_id, revision=revision, token=token, files_metadata=True)
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}


def fetch_pipeline(source: str | os.PathLike, **options) -> Path:
    """Folder of a pipeline, `source` itself or the cache's copy of a repository; options are those of `download`.

    Raises:
        ValueError, HubError: as `download`, and for a folder that holds no pipeline of this package.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return Path(download(str(source), **options))
    if options.get("weights", True):
        check_folder(folder, options.get("variant"))
    return folder


# -- to the Hub -----------------------------------------------------------------------------------------------------


def prepare_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that `repo_id` is there and can be written to, before anything is computed for it.

    Args:
        repo_id: "user/name"; "name" alone is a repository of the token's owner.
        private: of a repository that is made now.
        token: by default that of `hf auth login` or HF_TOKEN.

    Returns:
        The whole id, "user/name".

    Raises:
        ValueError: if `repo_id` cannot be the name of a repository.
        HubError: without a token, with one that may not write there, or if the Hub cannot be reached.
    """
    api = HfApi(token=token)

    def prepare() -> str:
        user = api.whoami()["name"]
        whole = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        validate_repo_id(whole)
        whole = api.create_repo(whole, private=private, exist_ok=True).repo_id
        api.auth_check(whole, write=True)
        _refuse_public(api.model_info(whole), private)
        return whole

    return with_retries(prepare, lambda error: explain(error, repo_id, writing=True, token=token), WAITS)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    branch: str | None = None,
    tell: Callable[[str], object] = logger.warning,
) -> str:
    """Upload a pipeline folder as one commit, with retries. The repository is made if it is not there.

    Uploaded is what a pipeline has: index, components, code, card, licence, how it was trained, evaluations, figures.
    Whatever else lies in the folder stays here, and is named.

    The repository is this pipeline afterwards: weights of the same variant in another format go, and with other
    weights also figures and measurements that the folder does not have. A card that somebody has edited is kept, in
    the folder or else in the repository; otherwise the card is made anew, with the repository's name.

    Args:
        folder: what `save_pretrained` or the trainer wrote.
        repo_id: "user/name", or "name" for a repository of your own.
        private: of a repository that is made now.
        commit_message, create_pr: of the commit.
        token: by default that of `hf auth login` or HF_TOKEN.
        tag: name that the commit gets in the repository, for `revision`; an older tag of the name is moved.
        branch: to commit to instead of `main`; it is made if it is not there.
        tell: is called with a sentence before each retry, and with what is left out.

    Returns:
        Address of the repository, or of the pull request.

    Raises:
        ValueError: if the folder holds no pipeline or a link that leaves it, or `repo_id` cannot be the name of a
            repository.
        HubError: if the Hub refuses, or still cannot be reached after the last retry.
    """
    folder = Path(folder)
    check_to_push(folder)
    refuse_links(folder)
    _, strange = split_strange(folder)
    if strange:
        more = f" and {len(strange) - 10} more" if len(strange) > 10 else ""
        tell(f"not uploaded, since no pipeline has them: {', '.join(strange[:10])}{more}")
    api = HfApi(token=token)

    def upload() -> str:
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(whole, write=True)
        if branch:
            api.create_branch(whole, branch=branch, exist_ok=True)
        info = api.model_info(whole, revision=branch, files_metadata=True)
        _refuse_public(info, private)
        there = {sibling.rfilename: sibling.lfs for sibling in info.siblings}
        outdated = outdated_files(folder, there)
        with_card = _renew_card(folder, whole, branch, api, changes_weights(folder, there))
        try:
            commit = api.upload_folder(
                repo_id=whole,
                folder_path=folder,
                commit_message=commit_message or "Upload FreqGateDiTPipeline",
                create_pr=create_pr,
                revision=branch,
                allow_patterns=[glob.escape(name) for name in split_strange(folder)[0]],
                ignore_patterns=None if with_card else ["README.md"],
                delete_patterns=[glob.escape(name) for name in outdated] or None,
            )
        except RuntimeError as error:  # in which the client wraps what went wrong with one file
            raise error.__cause__ or HubError(str(error)) from error
        if tag:
            if tag in [reference.name for reference in api.list_repo_refs(whole).tags]:
                api.delete_tag(whole, tag=tag)
            api.create_tag(whole, tag=tag, revision=commit.oid)
        return without_user(commit.pr_url or str(commit.repo_url))

    return with_retries(upload, lambda error: explain(error, repo_id, writing=True, token=token), WAITS, tell)


def outdated_files(folder: Path, there: dict[str, object]) -> list[str]:
    """Of the files of a repository (path -> what is known of LFS) those that a push of `folder` makes wrong."""
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    outdated = []
    for component in {name.split("/")[0] for name in here if "/" in name and name.endswith(WEIGHTS)}:
        variants = {weights_variant(name) for name in here if name.startswith(f"{component}/") and is_weights(name)}
        outdated += [
            name
            for name in there
            if name.startswith(f"{component}/") and is_weights(name) and weights_variant(name) in variants
        ]
    if changes_weights(folder, there):
        outdated += [name for name in there if name.startswith(DESCRIPTIONS)]
    return [name for name in outdated if name not in here]


def changes_weights(folder: Path, there: dict[str, object]) -> bool:
    """Whether full-precision weights of the transformer are pushed that the repository does not have."""
    for path in (folder / "transformer").iterdir():
        if path.name.endswith(WEIGHTS) and weights_variant(path.name) is None:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            known = there.get(f"transformer/{path.name}")
            if known is None or known.sha256 != digest:
                return True
    return False


def check_to_push(folder: Path):
    """Raise unless `folder` is a pipeline that others can load once it is a repository."""
    if not folder.is_dir():
        raise ValueError(f"`folder` ({folder}) is not there: name the folder of a pipeline.")
    names = [path.name for path in folder.iterdir()]
    refuse_without_index(names, folder)
    index = read_json(folder / INDEX)
    refuse_other_pipeline(index, folder, index.get("_class_name", [None])[-1])
    for name, (library, class_name) in component_classes(index).items():
        refuse_incomplete(folder, name, any_variant=True)
        if library in PACKAGE_MODULES and (folder / name / "config.json").is_file():
            for variant in variants_of(folder / name):
                refuse_misfit(folder, name, package_class(library, class_name), variant)
    if isinstance(index["_class_name"], list) and f"{index['_class_name'][0]}.py" not in names:
        raise ValueError(
            f"{str(folder)!r} lacks its code, {index['_class_name'][0]}.py, so that nobody could load it without the "
            f"package: load it with `FreqGateDiTPipeline.from_pretrained` and use `push_to_hub`."
        )


def _renew_card(folder: Path, repo_id: str, branch: str | None, api: HfApi, new_weights: bool) -> bool:
    """Make the card of `folder` anew unless somebody has edited it. Returns whether it is to be uploaded."""
    card = folder / "README.md"
    if is_edited(card):
        return True
    if api.file_exists(repo_id, "README.md", revision=branch):
        with tempfile.TemporaryDirectory() as place:
            there = Path(api.hf_hub_download(repo_id, "README.md", revision=branch, local_dir=place))
            edited = is_edited(there)
        # Of the same weights the repository may know more than a folder without a card.
        if edited or not (card.exists() or new_weights):
            return False
    write_card(folder, repo_id)
    return True


def _refuse_public(info: ModelInfo, private: bool | None):
    if private and not info.private:
        raise HubError(
            f"{info.id} is public, and `private` is for repositories that are made now: make it private at "
            f"{without_user(constants.ENDPOINT)}/{info.id}/settings, or leave `private` out."
        )


def with_retries(
    call: Callable,
    explained: Callable[[Exception], Exception],
    waits: Iterable[float],
    tell: Callable[[str], object] = logger.warning,
):
    """What `call` returns. What may pass (a lost connection, a busy Hub) is tried again after each of `waits` seconds.

    Raises:
        ValueError, HubError: by `explained`, in place of the client's errors.
    """
    for wait in (*waits, None):
        try:
            return call()
        except CLIENT_ERRORS as error:
            if wait is None or not may_pass(error):
                raise explained(error) from error
            wait = max(wait, _retry_after(error))
            tell(f"{explained(error)} (Next try in {wait:g} s.)")
            time.sleep(wait)


def may_pass(error: Exception) -> bool:
    """Whether the same call may work a little later: no connection, too many requests, or an error of the server."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status is None:
        return isinstance(error, (HTTP_ERROR, ConnectionError, TimeoutError))
    return status in (408, 429) or status >= 500


def _retry_after(error: Exception) -> float:
    header = error.response.headers.get("retry-after", "") if isinstance(error, HfHubHTTPError) else ""
    return min(float(header), LONGEST_WAIT) if header.isdigit() else 0.0
