"""Errors of the hub's client as `MetaPeftError`: what was refused, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from meta_peft.errors import MetaPeftError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(what: str, *, writing: bool = False) -> Iterator[None]:
    """Raise what the client refuses inside as ``{what}: {reason}``. Only errors of the client are taken for such.

    Args:
        what: the beginning of the message.
        writing: whether something was to be uploaded, which a token may not be allowed to.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # Of which library's HTTP errors those of the client are depends on its version.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except MetaPeftError:
        raise
    except (HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, http_error) as error:
        raise MetaPeftError(f"{what}: {reason(error, writing=writing)}") from error
    except ValueError as error:
        if not isinstance(error.__cause__, http_error):
            raise
        raise MetaPeftError(f"{what}: {' '.join(str(error).split())}") from error  # a card that it cannot read


def reason(error: BaseException, *, writing: bool = False) -> str:
    """Why the hub's client failed, in words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError

    first_line = " ".join(str(error).split())[:500]
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:  # the client wraps what it was answered
        cause = cause.__cause__
    status = None if cause is None else cause.response.status_code  # type: ignore[attr-defined]
    if isinstance(error, HFValidationError):
        return f"it is not an id of the hub, such as 'user/name' ({first_line})"
    if status is None and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set" + ("" if writing else ", and it is not in the cache")
    if isinstance(cause, GatedRepoError):
        return f"its owner has to grant access: ask for it on its page, and {LOG_IN}"
    if isinstance(cause, RevisionNotFoundError):
        return "it has no such revision: give a branch, a tag or a commit that is there"
    if status == 401:
        missing = "no token that the hub accepts" if writing else "there is none of this name that everybody may read"
        return f"{missing}: {LOG_IN} (401)"
    if status == 403:
        right = "write to it" if writing else "read it"
        return f"your token may not {right}: {LOG_IN} to one that may, or name a repository of your own (403)"
    if status == 404:
        return "there is none of this name that you may read, or the name is misspelt (404)"
    return f"the hub could not be asked, or refused ({first_line})"
