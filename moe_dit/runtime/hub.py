"""Why the hub (huggingface.co, or what HF_ENDPOINT names) did not give a file, in words.

Libraries above huggingface_hub say of a hub that cannot be reached, of one that has no such repository, and of a
repository without the file, that the repository has no such file. What they met first tells these apart.
"""

import re
from collections.abc import Iterator


def away(repository: str, file: str) -> Exception | None:
    """What says that nobody answers in the hub's place, asked once for a file; None where somebody does.

    huggingface_hub (2.4) itself would ask seven times, and wait 10 s for each answer.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url  # brings in its client for HTTP

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.HfHubHTTPError:
        return None
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:  # its client's own are HTTPErrors too
        return error
    except Exception:  # of a name that is none, or an answer that is not the hub's: who asks next says so
        return None
    return None


def refusal(error: BaseException, file: str, silent: Exception | None = None) -> str | None:
    """Why the hub did not give a file; None where it was asked for none, or that is not what went wrong.

    Args:
        error: of huggingface_hub, or what another library made of one.
        file: what was asked for, in words.
        silent: what :func:`away` gave, after which nothing but the hub's cache was looked into.
    """
    from huggingface_hub import constants, errors

    where = f"the hub ({constants.ENDPOINT})"
    for met in _chain(error):
        if isinstance(met, errors.OfflineModeIsEnabled):
            break
        if isinstance(met, errors.GatedRepoError):
            return f"{where} gives it to those alone who were admitted: ask for it there, and log in (hf auth login)"
        if isinstance(met, errors.RepositoryNotFoundError):
            return f"{where} has no such repository, or a private one; check the name, or log in (hf auth login)"
        if isinstance(met, errors.EntryNotFoundError) and not isinstance(met, errors.LocalEntryNotFoundError):
            return f"the repository has no file {_asked(met) or file}"
        if isinstance(met, errors.FileMetadataError):
            return f"what answers at {constants.ENDPOINT} is not the hub; check HF_ENDPOINT, and the proxy"
        if isinstance(met, errors.HfHubHTTPError):
            answer = f"{met.response.status_code} {met.response.reason_phrase}"
            if met.response.status_code in (401, 403):
                return f"{where} does not allow it, or has no such repository ({answer}); check the name and HF_TOKEN"
            if met.response.status_code != 429 and met.response.status_code < 500:
                return f"{where} does not give {file} ({answer}); check the name, HF_ENDPOINT, and the proxy"
            return f"{where} refuses for now ({answer}), and {file} is not in its cache here; try again later"
        if isinstance(met, errors.HTTPError | ConnectionError | TimeoutError):
            return _unreachable(met, where, file)
    else:
        if not any(isinstance(met, errors.LocalEntryNotFoundError) for met in _chain(error)):
            return None
    if silent is not None:
        return _unreachable(silent, where, file)
    return f"{file} is not in the hub's cache here, and HF_HUB_OFFLINE is set; fetch it where there is a network"


def _unreachable(error: BaseException, where: str, file: str) -> str:
    said = (str(error).strip().splitlines() or [""])[0][:200]
    said = f"{type(error).__name__}: {said}".rstrip(": ")
    return f"{where} cannot be reached ({said}), and {file} is not in its cache here; check the network"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was made of, the last one first."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _asked(error: BaseException) -> str | None:
    """The file that a request was for."""
    found = re.search(r"/resolve/[^/]+/([^?]+)", str(getattr(getattr(error, "response", None), "url", "")))
    return found[1] if found else None
