"""A file behind a URL, for as long as it is needed."""

from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from dino.runtime.options import UserError


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def name_in_url(url: str) -> str:
    """The last part of its path."""
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    return "download" if name in ("", "..") else name


def download(url: str, folder: Path) -> Path:
    """Fetch what a URL names into the folder, with a progress bar.

    Raises:
        UserError: it cannot be had.
    """
    from torch.hub import download_url_to_file

    file = folder / name_in_url(url)
    try:
        download_url_to_file(url, str(file))
    except (URLError, OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = error.reason if type(error) is URLError else error
        raise UserError(f"cannot download {url}: {reason}; is it right, and is there a network?") from error
    return file
